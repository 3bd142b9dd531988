r"""One formula, number or word as LaTeX that math-verify reads as its author meant it; or refused.

Three steps: ASCII, Unicode and sloppy LaTeX are rewritten (`REWRITTEN`); what could be meant in two ways is refused
(`AMBIGUOUS`, and the checks of lists); and whatever is left must be made of signs that are known to be read right.
"""

import re
import unicodedata
from collections.abc import Iterator
from itertools import pairwise

from .units import MAGNITUDES, split_unit


class UnreadableGold(ValueError):
    """A reference that is not surely understood; the message says what it may be, or what is unknown in it."""


def listed(names: str) -> set[str]:
    return set(names.split())


TEXT = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf)|mbox|hbox)\s*\{"
MARKED = re.compile(TEXT + r"([^{}]*)\}")
MARKED_LETTER = re.compile(r"(?<![\d)}])(?<![\d)}]\s)" + TEXT + r"\s*([A-Za-z])\s*\}")  # not a unit
CHOICE = re.compile(r"\(?\s*([A-Za-z])\s*\)?\.?")
WORD = re.compile(r"[A-Za-z]{2,}")
WORDS = re.compile(r"(?:[A-Za-z]{2,}|[aA])(?: (?:[A-Za-z]{2,}|a))*")
POINTS = re.compile(r"[A-H]{2,}")
NO_ANSWERS = {"nan", "null", "n/a", "na", "tbd"}
NO_ANSWERS_UNMARKED = {"none", "unknown"}
LONGEST = 2000  # characters; what is longer is prose
NUMBER_WORDS = listed(
    """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety half third quarter"""
) | set(MAGNITUDES)

GREEK = listed("alpha beta gamma delta epsilon theta lambda mu pi rho sigma tau phi omega")
FUNCTIONS = listed("arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln exp")
COMMANDS = GREEK | FUNCTIONS
COMMANDS |= listed(
    """frac sqrt binom cdot times div pm infty le leq leqslant ge geq geqslant ne neq lt gt in cup cap setminus
    emptyset mathbb left right circ displaystyle quad qquad lfloor rfloor lceil rceil vert lvert rvert overline min
    max gcd sum prod Gamma Delta Theta Lambda Pi Sigma Phi Omega varepsilon varphi ell"""
)
SYMBOLS = {
    **{unicodedata.lookup(f"GREEK SMALL LETTER {name.replace('mbd', 'md')}"): rf"\{name} " for name in GREEK},
    **{"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "−": "-", "±": r"\pm ", "%": "%", "％": "%"},
    **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in "},
    **{"∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "°": r"^{\circ}"},
    **{"\u00a0": " ", "\u2009": r"\,", "\u202f": r"\,", "√": r"\sqrt ", "∛": r"\sqrt[3]"},
    **dict.fromkeys("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ₀₁₂₃₄₅₆₇₈₉"),  # kept: they are rewritten together
}
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")

FACTOR_IN_BRACKETS = re.compile(
    r"(?<=[\d)])(?<![_^]\d)(?<![_^]\d\d)\s*\((?=\d+\))"
)  # `2(3)`, which would be a mixed number
SPACE = r"(?:\s|\\[,;:! ]|\\q?quad\b)"
LETTER_ENDS = r"(?![A-Za-z])"
REWRITTEN = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: f"^{{{m[0].translate(RAISED)}}}"),
        (r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: f"_{{{m[0].translate(LOWERED)}}}"),
        (rf"\\[dtc]frac{LETTER_ENDS}", r"\\frac"),
        (r"(\\q?quad)(?=[A-Za-z])", r"\1 "),
        (rf"\\varnothing{LETTER_ENDS}", r"\\emptyset"),
        (rf"\\(?:text)?degree{LETTER_ENDS}", r"^{\\circ}"),
        (r"(\d)\{,\}(\d)", r"\1.\2"),  # a decimal comma: those between thousands are gone
        (r"\*\*", "^"),
        (r"<=|=<", r"\\le "),
        (r">=|=>", r"\\ge "),
        (r"!=|<>", r"\\ne "),
        (r"\+/-|\+-", r"\\pm "),
        (r"(\d)\s*[xX]\s*(?=10\s*\^)", r"\1\\times "),
        (r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE](-?)\+?0*(\d+)(?!\w|\.\d)", r"\1\\times 10^{\2\3}"),
        (r"\*", r"\\cdot "),
        (rf"(?<![\\A-Za-z])(?:infinity|inf|oo){LETTER_ENDS}", r"\\infty "),
        (rf"(?<![\\A-Za-z])({'|'.join(sorted(FUNCTIONS | GREEK, key=len, reverse=True))}){LETTER_ENDS}", r"\\\1 "),
        (rf"(?<![\\A-Za-z])sqrt{LETTER_ENDS}|(?<![\\A-Za-z])sqrt(?=\d)", r"\\sqrt "),
        (r"\^\s*(-\s*[0-9a-zA-Z.]+|\d\d+)", r"^{\1}"),
        (r"(^|[(\[{,;=&])(\s*)\+\s*(?=[\w.\\])", r"\1\2"),
        (r"(?<![\d.])\.(?=\d)", "0."),
        (r"(?<=\d)\.(?=\s*(?:$|[,;)]))", ""),
        (rf"(?<![\d/.])(\d+){SPACE}+(\d+)\s*/\s*(\d+)(?![\d/.])", r"\1\\frac{\2}{\3}"),
        (r"\s+", " "),
    )
]
DEGREES = (  # of an angle in a function, whose argument is in radians
    re.compile(
        r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\s*\^\s*\{?\d\}?)?\s*(?:\\left)?[({]?\s*)(\d+(?:\.\d+)?)"
        r"\s*\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})"
    ),
    r"\1\\frac{\2\\pi}{180}",
)
UPRIGHT_I = re.compile(r"(?<=\d)\s*\\mathrm\s*\{\s*i\s*\}"), "i"
REWRITTEN += [(FACTOR_IN_BRACKETS, r"\\cdot ("), DEGREES, UPRIGHT_I]

SIDE_BY_SIDE = re.compile(rf"(?<![\d_^])\d+(?:\.\d+)?{SPACE}+\.?\d")
UNBRACED = re.compile(r"\\sqrt\s*\d\d|\\frac\s*\d\s*\d\d")
AMBIGUOUS = [
    (re.compile(pattern), what)
    for pattern, what in (
        (r"^\d+\s*-\s*\d+(?:\s*-\s*\d+)*$", "a date, a range or a difference"),
        (r"\d+\s*/\s*\d+\s*/\s*\d+", "a date, or a fraction of a fraction"),
        (r"\d+-\d+\s*(?:/|\\frac)", "a mixed number, or a difference"),
        (r"\d\.\d+\.\d", "a date, or points between thousands"),
        (r"^\d{1,2}:[0-5]\d(?::\d\d)?\b", "a time, or a ratio"),
        (r":\s*\d+\s*:", "a ratio of three"),
        (r"\d(?:st|nd|rd|th)\b", "an ordinal"),
        (r"\.\.|…|\\[lcv]?dots", "an ellipsis"),
        (r"\d\s*\\overline|\\overline\s*\{[^{}]*\d", "a repeating decimal, or digits"),
        (r"'|’|\"", "a prime, or a quotation"),
        (r"^[^=]*[\d)}]\s*\\?%.*\d", "a calculation with a percentage"),
        (r"<[a-z/]+>", "markup"),
        (r"^\(?[A-Z]\s*[).]\s*\S|^[A-Z]:\s", "a choice and its text"),
        (r"^[-+]?[\d.]+\s+[A-Z]$|\\circ\s*\}?\s*[A-Za-z]", "a unit, or a variable"),
        (r"\\log\s*\d+\s*\\cdot\s*\(|\\log\s*\d+\s*\(", "a base, or a factor"),
        (r"\bmod\b", "a remainder"),
        (r"\d\s*(?:am|pm|AM|PM)$", "a time"),
        (r"^0[xXbBo][\dA-Fa-f]+$", "digits of another base"),
        (SIDE_BY_SIDE.pattern, "two numbers side by side"),
    )
]

GROUPED = re.compile(r"[-+]?([1-9]\d{0,2})((?:,\d{3})+)(\.\d+)?")
SPACED = re.compile(
    r"(?<![\d.,\w^_])([1-9]\d{0,2})((?:(?:\{,\}|,\\!\s?|\\[,!:; ]\s?|~| )\d{3})+)(?!\d|\s*/|(?:\{,\}|\\[,!:; ]|~| )\d)"
)
MONEY = re.compile(r"([-+]?)\s*(?:US)?(?P<sign>\\\$|[$€£¥₹])\s*(?=[-+]?[\d.])")
MONEY_BEHIND = re.compile(r"(?<=\d)\s*(?P<sign>\\\$|[$€£¥₹])$")
CURRENCIES = {r"\$": "dollar", "$": "dollar", "€": "euro", "£": "gbp", "¥": "yen", "₹": "rupee"}
PERCENT = re.compile(r"(?<=[\d})])(?:\s|\\[,; ])*(?:\\?%|per ?cent|pct)$")
BASE = re.compile(r"(\d+)\s*_\s*\{?\s*(\d+)\s*\}?")
SEPARATOR = re.compile(r"[,;]?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|(?<![A-Za-z])(?:and|or)(?![A-Za-z]))|(?<!\\),\s")
SEMICOLON = re.compile(r"(?<!\\);")
COMMA = re.compile(r"(?<!\\),")
SPACE_AROUND = re.compile(rf"^{SPACE}+|{SPACE}+$")
RELATION = re.compile(r"[<>]|\\(?:leq?|leqslant|geq?|geqslant|lt|gt|neq?)(?![A-Za-z])")
MATRIX = re.compile(r"\\begin\s*\{array\}\s*\{[lcr|]*\}|\\(?:begin|end)\s*\{(?:[pbvBV]?matrix|array)\}")
SET = re.compile(r"\\mathbb\s*\{\s*[A-Z]\s*\}")
COMMAND = re.compile(r"\\([A-Za-z]+)|\\[{}%,;:! \\|]")
KNOWN = re.compile(r"[0-9A-Za-z\s+\-*/^_=<>!|()\[\]{},.;:&]")
OVER_SEVERAL = re.compile(
    r"/\s*(?:\d+(?:\.\d+)?|[A-Za-z]|\\pi)\s*"
    rf"(?:[A-Za-z(]|\\(?:left|sqrt|[dt]?frac|binom|{'|'.join(sorted(GREEK | FUNCTIONS))})(?![A-Za-z]))"
)
SHORT = re.compile(r"\\(?:frac|binom)\s*[A-Za-z]\s*\d")
BEHIND_A_LETTER = re.compile(  # but for `n 2^n`
    r"(?<!_)[A-Za-z]\s*\d+(?!\d|\s*\^\s*(?:\{[^{}]*[A-Za-z]|[A-Za-z]))|\d\s*[xX]\s*\d"
)
LETTERS_BEHIND = re.compile(rf"(?<=[\d)}}])((?:{SPACE}+(?!i(?![A-Za-z]))[A-Za-z])+)(?:\s*\^\s*\{{?\s*[23]\s*\}}?)?$")
UNKNOWN = re.compile(rf"\\(?:{'|'.join(GREEK - {'pi'})})(?![A-Za-z])")
MIXED = re.compile(r"\d\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}")


def read_formula(text: str) -> str:
    """The answer without the solution that leads to it, as LaTeX; see [`~cfpo_trl.rewards.golds.read_gold`]."""
    text = without_dollars(re.sub(r"\s+", " ", text).strip())
    text = re.sub(r"(?<=[^.])\.$", "", text).strip()  # a sentence's
    marked = MARKED.fullmatch(text)
    text = marked[1].strip() if marked else MARKED_LETTER.sub(r" \1", text)
    if text.lower() in NO_ANSWERS or (not marked and text.lower() in NO_ANSWERS_UNMARKED):
        raise UnreadableGold("no answer")
    if choice := CHOICE.fullmatch(text):
        return choice[1]
    if (WORDS if marked else WORD).fullmatch(text):  # several words are an answer where they are marked as text
        return read_words(text)
    if len(text) > LONGEST:
        raise UnreadableGold(f"a text of {len(text)} characters")
    if UNBRACED.search(text):
        raise UnreadableGold("digits behind a command without braces")
    text = rewrite(text)
    for pattern, what in AMBIGUOUS:
        if pattern.search(text):
            raise UnreadableGold(what)
    groups = [
        [signed for item in list_items(group) for signed in both_signs(item)] for group in split(text, SEMICOLON)
    ]
    if len(groups) > 1 and all(len(group) == 1 for group in groups):
        groups = [[item for group in groups for item in group]]
    check_groups(groups)
    return "; ".join(read_list(group) for group in groups)


def both_signs(text: str) -> list[str]:
    r"""`\frac{1 \pm \sqrt{5}}{2}` as its two values; math-verify knows the sign outside of braces."""
    found = list(re.finditer(r"\\pm(?![A-Za-z])", text))
    if len(found) != 1:
        return [text]
    before, behind = text[: found[0].start()], text[found[0].end() :]
    if before.count("{") == before.count("}"):
        return [text]
    return [f"{before}{sign}{behind}" for sign in "+-"]


def read_list(items: list[str]) -> str:
    check_list(items)
    return ", ".join(read_item(item, alone=len(items) == 1) for item in items)


def without_dollars(text: str) -> str:
    r"""The text without `$…$`, `\(…\)` and `\[…\]` around its formulas; a `$` that is money stays."""
    text = re.sub(r"(?<!\\)\\[()\[\]]|\$\$", "$", text)
    if len(re.findall(r"(?<!\\)\$", text)) % 2 == 0:
        text = re.sub(r"(?<!\\)\$", "", text)
    return text.strip()


def read_words(text: str) -> str:
    r"""Words as `\text{…}`, which is compared letter by letter; letters in a formula commute."""
    words = text.lower().split()
    if NUMBER_WORDS & {word.removesuffix("s") for word in words} | NUMBER_WORDS & set(words):
        raise UnreadableGold("a number in words")
    if POINTS.fullmatch(text):
        raise UnreadableGold("several choices, or points")
    if text.lower() in ("infinity", "inf", "oo"):
        return r"\infty"
    return rf"\{text}" if text in GREEK else rf"\text{{{text}}}"


def rewrite(text: str) -> str:
    """ASCII, Unicode and sloppy LaTeX as LaTeX."""
    text = "".join(SYMBOLS.get(sign) or vulgar_fraction(sign) for sign in text)
    if "begin" not in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # escaped twice
    text = SPACED.sub(join_thousands, text)
    for pattern, replacement in REWRITTEN:
        text = pattern.sub(replacement, text)
    return brace_radicands(text).strip()


def vulgar_fraction(sign: str) -> str:
    top, slash, bottom = unicodedata.normalize("NFKC", sign).partition("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}" if slash and bottom else sign


def join_thousands(match: re.Match) -> str:
    groups = re.findall(r"\d{3}", match[2])
    if re.fullmatch(r"(?: \d{3})+", match[2]) and maybe_several(match[1], groups):
        raise UnreadableGold("one number, or several")
    return match[1] + "".join(groups)


def maybe_several(first: str, groups: list[str]) -> bool:
    """Whether `153,370` and `153 370 371` may be several numbers: no group is shorter, and none begins with 0."""
    return len(first) == 3 and not any(group.startswith("0") for group in groups)


def brace_radicands(text: str) -> str:
    r"""`\sqrt (x + 1)` and `\sqrt 3` with braces."""
    radical = re.compile(r"(\\sqrt(?:\[3\])?)\s*(\(|\d+|[A-Za-z](?![A-Za-z]))")
    position = 0
    while found := radical.search(text, position):
        end, inside = found.end(), found[2]
        if inside == "(":
            end = closing(text, found.end())
            inside = text[found.end() : end - 1]
        text = f"{text[: found.start()]}{found[1]}{{{inside}}}{text[end:]}"
        position = found.start() + len(found[1])
    return text


def closing(text: str, start: int) -> int:
    """Where the bracket that is open at `start` has closed."""
    depth = 1
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    raise UnreadableGold("a bracket that does not close")


def list_items(text: str) -> Iterator[str]:
    """The members of a list, or the text itself; commas between thousands are joined."""
    for part in split(text, SEPARATOR):
        yield from split_commas(SPACE_AROUND.sub("", part))


def split(text: str, separator: re.Pattern) -> Iterator[str]:
    """The parts between separators that stand in no bracket."""
    depth = start = position = 0
    while position < len(text):
        found = separator.match(text, position) if depth == 0 else None
        if found:
            yield text[start:position]
            start = position = found.end()
        else:
            depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(text[position], 0)
            position += 1
    yield text[start:]


def split_commas(item: str) -> list[str]:
    """The numbers between commas without spaces, or one number whose thousands they separate."""
    bare = split_unit(PERCENT.sub("", MONEY_BEHIND.sub("", MONEY.sub(r"\1", item, count=1))))[0]
    if grouped := GROUPED.fullmatch(bare):
        if bare == item and maybe_several(grouped[1], grouped[2].split(",")[1:]):
            raise UnreadableGold("one number, or several")
        return [item.replace(",", "")]
    if re.search(r"\d,0\d\d(?!\d)", item) or (re.search(r"\d,\d{3}(?!\d)", item) and re.search(r",\s|;", item)):
        raise UnreadableGold("thousands, or several numbers")
    parts = [SPACE_AROUND.sub("", part) for part in split(item, COMMA)]
    if any(before[-1:].isdigit() and re.match(r"\d{3}(?!\d)", part) for before, part in pairwise(parts)):
        raise UnreadableGold("thousands, or several numbers")
    if any(re.fullmatch(r"[-+]?0\d+", part) for part in parts[1:]):
        raise UnreadableGold("a decimal comma, or several numbers")
    two = re.fullmatch(r"[-+]?(\d+),(\d+)(?:\s*[A-Za-z\\%].*)?", item)
    if two and (len(two[2]) > 1 or two[1] == "0"):
        raise UnreadableGold("a decimal comma, or two numbers")
    return parts


def check_groups(groups: list[list[str]]) -> None:
    """Refuses semicolons between lists, but for the values of the same unknowns in each: `x=1,y=2; x=3,y=4`."""
    unknowns = {tuple(item.partition("=")[0].strip() for item in group) for group in groups}
    if len(groups) > 1 and (len(unknowns) > 1 or not all("=" in item for group in groups for item in group)):
        raise UnreadableGold("lists of lists")


def check_list(items: list[str]) -> None:
    """Refuses lists of which math-verify, for which they are sets, would lose something."""
    if len(items) == 1:
        return
    bare = [re.sub(r"\s", "", item) for item in items]
    if not all(bare):
        raise UnreadableGold("a list with nothing between two commas")
    if len(set(bare)) < len(bare):
        raise UnreadableGold("a list with one member twice, and math-verify compares sets")
    if any(RELATION.search(item) for item in items):
        raise UnreadableGold("several inequalities, which may hold together or in turn")
    unknowns = [item.split("=")[0] for item in bare if "=" in item]
    if len(set(unknowns)) > 1 and not len(set(unknowns)) == len(unknowns) == len(items):
        raise UnreadableGold("several unknowns, and not one value for each")


def read_item(item: str, alone: bool) -> str:
    """One member of a list, or the whole answer, with its unit marked as text."""
    unit = ""
    if behind := MONEY_BEHIND.search(item):
        item, unit = item[: behind.start()], CURRENCIES[behind[1]]
    elif before := MONEY.match(item):
        item, unit = before[1] + item[before.end() :], CURRENCIES[before[2]]
    elif percent := PERCENT.search(item):
        item = item[: percent.start()] + r"\%"
    else:
        check_letter_behind(item)
        letters = LETTERS_BEHIND.search(item)
        item, unit = (without_spaces(item, letters), "") if letters else split_unit(item)
    if unit and not alone:
        raise UnreadableGold("a list with units")
    if unit and re.search("[A-Za-z]", COMMAND.sub("", item)):
        raise UnreadableGold("letters, which may be variables or units")
    check_signs(item)
    check_letters(item)
    check_products(item)
    if any(int(top) >= int(bottom) for top, bottom in MIXED.findall(item)):
        raise UnreadableGold("a mixed number, or a product")
    return item + (rf"\text{{ {unit}}}" if unit else "")


def check_letter_behind(item: str) -> None:
    """Refuses `3 m` and `2 s`; `2 n` and `a = 3 m` are products, as some write them."""
    if found := LETTERS_BEHIND.search(item):
        value = COMMAND.sub("", item[: found.start()])
        if found[1].strip() in set("mgshl") and not re.search("[A-Za-z=]", value):
            raise UnreadableGold("a unit, or a variable")


def without_spaces(item: str, letters: re.Match) -> str:
    """`2n` of `2 n`: behind a space a single letter would be a unit."""
    return item[: letters.start()] + re.sub(SPACE, "", item[letters.start() :])


def check_signs(item: str) -> None:
    """Refuses commands and signs that are not known to be read right, and numbers whose base would be ignored."""
    formula = SET.sub(" x ", MATRIX.sub(" ", item))
    for command in COMMAND.finditer(formula):
        if command[1] and command[1] not in COMMANDS:
            raise UnreadableGold("text in a formula" if MARKED.match(formula, command.start()) else command[0])
    for sign in COMMAND.sub("", formula):
        if not KNOWN.match(sign):
            raise UnreadableGold(f"the sign {sign}")
    if re.search(r"\d\s*_", item) and not BASE.fullmatch(item):
        raise UnreadableGold("numbers of another base in a formula")
    if not re.search(r"[0-9A-Za-z]", item):
        raise UnreadableGold("no number, letter or symbol")


def check_letters(item: str) -> None:
    """Refuses words: letters are variables where three at most touch a digit, an operator or a bracket."""
    formula = COMMAND.sub(" ", SET.sub(" ", MATRIX.sub(" ", re.sub(r"_\s*\{[A-Za-z0-9]*\}", "", item))))
    for letters in re.finditer(r"[A-Za-z]{2,}", formula):
        touches = re.search(r"[\d)}{^_=+\-*/(|:]\s?$", formula[: letters.start()])
        touches = touches or re.match(r"[\d(^_*/|})]|\s*[-+=/:]", formula[letters.end() :])
        if len(letters[0]) > 3 or not touches or re.match(r"\d\s", formula[letters.start() - 2 :]):
            raise UnreadableGold(f"the text {letters[0]!r}")
    if "=" in item and not re.search("[A-Za-z]", formula) and not UNKNOWN.search(item):
        raise UnreadableGold("a calculation")


def check_products(item: str) -> None:
    """Refuses `1/2x`, and a digit behind a letter: an index, an exponent, or the value of a unit's next part."""
    if OVER_SEVERAL.search(item):
        raise UnreadableGold("a fraction times something, or over it")
    if BEHIND_A_LETTER.search(COMMAND.sub("~", SHORT.sub("~", SET.sub("~", MATRIX.sub("~", item))))):
        raise UnreadableGold("a digit behind a letter")
