"""math-verify's verdict on a completion, without what it would pay wrongly. Runs in the worker processes."""

import logging
import math
import re
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from latex2sympy2_extended import NormalizationConfig
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, latex2sympy
from latex2sympy2_extended.math_normalization import extract_boxed_content
from math_verify import LatexExtractionConfig, parse, parser, verify
from sympy import Eq, Symbol, nan, zoo
from sympy.core.function import AppliedUndef

from .latex import CURRENCIES, MONEY, MONEY_BEHIND
from .rewriting import DEGREES, FACTOR_IN_BRACKETS, SPACED, UPRIGHT_I, both_signs
from .signs import BASE, MARKED_LETTER
from .units import split_unit, without_unit
from .vetoes import (
    as_complex,
    as_large,
    in_order,
    in_the_same_base,
    in_the_same_unit,
    members,
    of_the_same_kind,
    precision_for,
    with_the_same_solutions,
    written_clearly,
)

# As trl.rewards.accuracy_reward reads a completion: the answer must be LaTeX, a box comes first. In addition \frac12
# and \sqrt3, which are LaTeX. Letters behind a number are a unit where the reference is a number, else variables.
FOR_NUMBERS = NormalizationConfig(units=True, malformed_operators=True)
FOR_LETTERS = NormalizationConfig(units=False, malformed_operators=True)
OF_GOLDS = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")

ONE_FORMULA = re.compile(
    r"(?!.*\b(?:not|or|and|no)\b)[A-Za-z ,:']+(?:\$+|\\[(\[])([^$]+?)(?:\$+|\\[)\]])[A-Za-z ,.']*"
)
CHOICES = set("ABCDEFGHIJabcdefghij")  # in either case; other letters are variables
IMAGINARY = re.compile(r"(?<=\d)i(?![A-Za-z])")  # math-verify knows i where it is a word
INDEX = re.compile(r"_\{?(\d+)\}?$")
ROUNDING = 6  # digits behind the point, math-verify's
THOUSANDS_OF_A_FACTOR = re.compile(
    r"(?<![\d,.(\[])(?<!\\\{)[1-9]\d{0,2}(?:,\d{3})+(?=\s*(?:\}|\\pi|\\sqrt|\\[dt]?frac|\^|[A-Za-z]))"
)
SAME_IN_ANSWERS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"°", r"^{\\circ}"),
        (r"\\(?:boldsymbol|bm)(?![A-Za-z])", r"\\mathbf"),
        (r"(?<=[\w)}])\.\s*$", ""),  # a sentence's
    )
]
SAME_IN_ANSWERS += [DEGREES, UPRIGHT_I, (FACTOR_IN_BRACKETS, r"\\cdot (")]


@dataclass(frozen=True)
class Gold:
    """A reference as math-verify read it, and what comparing it needs.

    Args:
        parsed: What [`math_verify.parse`] gave.
        is_number: No variable is in it, so that letters behind an answer's number are a unit.
        unit: Its unit, or empty.
        base: Of its digits where it states one, or empty.
        rounding: Digits behind the point at which numbers of its size are compared.
        values: Those of several unknowns in their order, which matters where an answer does not name them.
    """

    parsed: list
    is_number: bool
    unit: str
    base: str
    rounding: int
    values: list | None


class Judge:
    """judge(gold, text) -> verdict, with `status`, `reward`, and the texts of gold and answer that were parsed."""

    def __init__(self) -> None:
        logging.getLogger("math_verify").setLevel(logging.ERROR)
        # math-verify keeps its last 20 parses, and the patterns of one configuration; a batch needs more.
        parser.parse_latex_cached = lru_cache(maxsize=8192)(parser.parse_latex_cached.__wrapped__)
        parser.lazy_latex_regex = lru_cache()(parser.lazy_latex_regex.__wrapped__)
        parser.latex2sympy = partial(latex2sympy, conversion_config=ConversionConfig(lowercase_symbols=False))
        self.normalize = parser.normalize_latex
        parser.normalize_latex = self._normalize
        self.written: list[str] = []  # the formulas that the last answer was read from, with their units
        self.read = lru_cache(maxsize=4096)(read)
        self.is_right = lru_cache(maxsize=8192)(self._is_right)

    def __call__(self, gold: str, text: str) -> dict[str, Any]:
        read = self.read(gold)
        if read is None:
            return {"status": "unparseable_gold", "reward": None, "gold": "", "answer": ""}
        self.written.clear()
        config = FOR_NUMBERS if read.is_number else FOR_LETTERS
        answer = parse(
            text,
            [
                LatexExtractionConfig(
                    normalization_config=config, boxed_match_priority=0, try_extract_without_anchor=False
                )
            ],
            extraction_mode="first_match",
            parsing_timeout=None,
        )
        # The extracted text, not str() of the parsed answer: printing a tower of powers can take forever.
        shown = {"gold": show(read.parsed), "answer": show(answer)}
        if not answer:
            return {"status": "no_answer", "reward": 0.0, **shown}
        try:
            right = self.is_right(gold, tuple(answer), tuple(self.written))
        except TypeError:  # a mutable matrix cannot be a key
            right = self._is_right(gold, tuple(answer), tuple(self.written))
        return {"status": "verified", "reward": float(right), **shown}

    def _normalize(self, latex: str, config: NormalizationConfig) -> str:
        """Takes the place of math-verify's, which multiplies the groups of `1 000 000`, and hides a unit."""
        if config.boxed == "none":
            return self.normalize(latex, config)
        latex = extract_boxed_content(latex, mode=config.boxed)
        if formula := ONE_FORMULA.fullmatch(latex):
            latex = formula[1]
        for pattern, replacement in SAME_IN_ANSWERS:
            latex = pattern.sub(replacement, latex)
        latex = THOUSANDS_OF_A_FACTOR.sub(lambda match: match[0].replace(",", ""), latex)
        money = MONEY.search(latex) or MONEY_BEHIND.search(latex)
        latex = SPACED.sub(lambda match: re.sub(r"\D", "", match[0]), MONEY_BEHIND.sub("", MONEY.sub(r"\1", latex)))
        written = self.normalize(", ".join(both_signs(MARKED_LETTER.sub(r" \1", latex))), OF_GOLDS)
        self.written.append(written)
        if money and money["sign"] != "¥" and not split_unit(written)[1]:  # ¥ is of two currencies
            self.written.append(rf"{written}\text{{ {CURRENCIES[money['sign']]}}}")
        return IMAGINARY.sub(" i", without_unit(written) if config.units else written)

    def _is_right(self, gold: str, answer: tuple, written: tuple[str, ...]) -> bool:
        read = self.read(gold)
        assert read is not None  # the answers of an unreadable gold are not judged
        if isinstance(answer[0], Symbol) and str(read.parsed[0]) in CHOICES:
            return str(answer[0]).upper() == str(read.parsed[0]).upper()
        return (
            verify(
                read.parsed,
                list(answer),
                float_rounding=read.rounding,
                numeric_precision=precision_for(read.parsed[0], answer[0]),
                allow_set_relation_comp=True,
                timeout_seconds=None,
            )
            and all(written_clearly(formula) and in_the_same_base(formula, read.base) for formula in written)
            and (not read.is_number or all(in_the_same_unit(formula, read.unit) for formula in written))
            and ("%" in gold or any("%" in formula for formula in written) or as_large(read.parsed[0], answer[0]))
            and of_the_same_kind(read.parsed[0], answer[0])
            and with_the_same_solutions(read.parsed[0], answer[0])
            and (read.values is None or in_order(answer[0], read.values, read.rounding))
        )


def read(gold: str) -> Gold | None:
    """A reference from [`~cfpo_trl.rewards.golds.read_gold`]; None where math-verify cannot read all of it."""
    value, unit = split_unit(gold.strip("$"))
    parsed = parse(
        f"${IMAGINARY.sub(' i', value)}$", [LatexExtractionConfig(normalization_config=OF_GOLDS)], parsing_timeout=None
    )
    if not parsed or isinstance(parsed[0], str):
        return None
    expression = parsed[0]
    if getattr(expression, "has", lambda *_: False)(nan, zoo):
        return None
    if isinstance(expression, Eq) and isinstance(expression.lhs, AppliedUndef) and not expression.lhs.free_symbols:
        parsed[0] = expression = expression.rhs  # `f(2) = 5`
    base = BASE.fullmatch(value)
    sizes = [abs(size) for member in members(expression) or [expression] if (size := as_complex(member))]
    sizes = [size for size in sizes if math.isfinite(size)]
    return Gold(
        parsed,
        is_number=not getattr(expression, "free_symbols", None),
        unit=unit,
        base=base[2] if base else "",
        rounding=ROUNDING - min(0, math.floor(math.log10(min(sizes))) + 1) if sizes else ROUNDING,
        values=values_of_unknowns(expression),
    )


def values_of_unknowns(expression: Any) -> list | None:
    """The values of `x = 1, y = 2`, but not of `x_1 = 1, x_2 = 2`, which are the roots in any order."""
    equations = members(expression) or []
    if not equations or not all(isinstance(equation, Eq) for equation in equations):
        return None
    names = [str(equation.lhs) for equation in equations]
    indices = [index for name in names if (index := INDEX.search(name))]
    of_one = len({INDEX.sub("", name) for name in names}) == 1
    if len(set(names)) == 1 or (of_one and {int(index[1]) for index in indices} == set(range(1, len(names) + 1))):
        return None
    return [equation.rhs for equation in equations]


def show(parsed: list) -> str:
    """The text that a parsed answer was read from, at most 200 characters of it."""
    return next((item for item in reversed(parsed) if isinstance(item, str)), "")[:200]
