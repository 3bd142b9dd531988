"""What math-verify takes for equal, and is not: each function is False where an answer must not be paid."""

import math
import re
from cmath import isfinite
from typing import Any

from math_verify import verify
from math_verify.grader import is_equation, is_relation, take_first_relation
from sympy import (
    Add,
    Derivative,
    Eq,
    Expr,
    FiniteSet,
    Float,
    Interval,
    Mul,
    Pow,
    Symbol,
    Tuple,
    binomial,
    cancel,
    expand,
    factorial,
    solve,
)
from sympy.core.function import AppliedUndef

from .refusals import SIDE_BY_SIDE, UNBRACED
from .units import MAGNITUDES, split_unit

MAGNITUDE = re.compile(rf"\b(?:{'|'.join(MAGNITUDES)})s?\b", re.IGNORECASE)
DIGITS = 50_000  # in base 2


def precision_for(*expressions: Any) -> int:
    """Digits to compare with: with math-verify's 15 all differences below 1e-15 are 0, and floats have no more."""
    return 15 if any(getattr(expression, "has", lambda *_: False)(Float) for expression in expressions) else 60


def written_clearly(formula: str) -> bool:
    """Not numbers side by side, nor digits behind a command without braces."""
    return not SIDE_BY_SIDE.search(formula) and not UNBRACED.search(formula)


def in_the_same_base(formula: str, base: str) -> bool:
    """math-verify reads the digits of `101_2` alone."""
    stated = re.search(r"\d\s*_\s*\{?\s*(\d+)", formula)
    return stated is None or stated[1] == (base or "10")


def in_the_same_unit(formula: str, unit: str) -> bool:
    """Not in thousands, in another unit than the reference's, or times a letter that is no unit."""
    if MAGNITUDE.search(formula) or re.search(r"\d[a-zA-Z]$", formula):
        return False
    found = split_unit(formula)[1]
    return not unit or not found or found == unit


def as_large(gold: Any, answer: Any) -> bool:
    """Two numbers do not differ by more than rounding, and exact ones not at all."""
    exact = [exact_values(expression) for expression in (gold, answer)]
    if None not in exact and exact[0] != exact[1]:
        return False
    expected, given = as_complex(gold), as_complex(answer)
    if expected is None or given is None or not (isfinite(expected) and isfinite(given)):
        return True
    return abs(expected - given) <= 1e-5 * max(abs(expected), abs(given))


def exact_values(expression: Any) -> list | None:
    """The fractions that a number or a list consists of, in their order of size; None where it has others."""
    found = members(expression) or [expression]
    if not all(isinstance(member, Expr) and not member.has(Float) and is_short(member) for member in found):
        return None
    values = [member.doit() for member in found]
    return sorted(values) if all(value.is_Rational for value in values) else None


def is_short(expression: Expr) -> bool:
    """Its powers, factorials and binomials have some thousands of digits at most: they can be written out."""
    for part in expression.atoms(Pow, factorial, binomial):
        base, exponent = (part.args[0], part.args[0]) if isinstance(part, factorial) else part.args
        length = min(math.log2(2 + abs(as_complex(base) or 0)), DIGITS)  # a base beyond floats is a part itself
        if not abs(as_complex(exponent) or 0) * length <= DIGITS:
            return False
    return True


def of_the_same_kind(gold: Any, answer: Any) -> bool:
    """Not the end points for an interval, or a value for an equation of several unknowns."""
    if is_inequality(gold) and isinstance(answer, FiniteSet):
        return any(is_inequality(member) for member in answer)
    if is_inequality(answer) and isinstance(gold, FiniteSet):
        return any(is_inequality(member) for member in gold)
    if not is_equation(gold) or is_equation(answer) or members(answer) is not None:
        return True
    # `x = 5` and `f(x) = x^2` name the value that they give; so does `AB = 5`, of points.
    named = take_first_relation(gold).lhs
    symbols = [str(symbol) for symbol in named.free_symbols]
    points = not isinstance(named, Add) and all(symbol.isupper() for symbol in symbols)
    ratio = isinstance(named, Mul) and any(isinstance(part, Pow) and part.exp == -1 for part in named.args)
    indexed = all("_" in symbol for symbol in symbols)
    return isinstance(named, Symbol | AppliedUndef | Derivative) or points or ratio or indexed


def is_inequality(expression: Any) -> bool:
    return is_relation(expression) and not is_equation(expression)


def with_the_same_solutions(gold: Any, answer: Any) -> bool:
    """Two equations without a solution are the same for math-verify: they must be multiples of each other."""
    if not isinstance(gold, Eq) or not isinstance(answer, Eq) or not all(isinstance(s, Expr) for s in gold.args):
        return True
    if isinstance(gold.lhs, Symbol | AppliedUndef) and not gold.rhs.has(gold.lhs):
        return True  # `y = …` has solutions
    first, second = (equation.lhs - equation.rhs for equation in (gold, answer))
    if expand(first - second) == 0 or (second != 0 and cancel(first / second).is_number):
        return True
    try:
        return bool(solve(gold, gold.free_symbols))
    except NotImplementedError:  # math-verify did not find them equal by their solutions either
        return True


def in_order(answer: Any, values: list, rounding: int) -> bool:
    """An answer without the unknowns' names gives their `values` in the reference's order."""
    found = members(answer.rhs if isinstance(answer, Eq) else answer)
    if found is None or any(isinstance(member, Eq) for member in found):
        return True  # math-verify compares the names
    return len(found) == len(values) and all(
        verify(
            [value],
            [member],
            float_rounding=rounding,
            numeric_precision=precision_for(value, member),
            timeout_seconds=None,
        )
        for value, member in zip(values, found, strict=True)
    )


def members(expression: Any) -> list | None:
    """The members of a set, a tuple or a pair in the order in which they are written; None of anything else."""
    if isinstance(expression, FiniteSet):
        return list(getattr(expression, "_unsorted_args", expression.args))
    if isinstance(expression, Interval):
        return [expression.start, expression.end]
    return list(expression) if isinstance(expression, Tuple) else None


def as_complex(expression: Any) -> complex | None:
    """The value of an expression that is a number, else None."""
    if not isinstance(expression, Expr) or expression.free_symbols:
        return None
    try:
        return complex(expression.evalf())
    except (TypeError, ValueError, OverflowError):
        return None
