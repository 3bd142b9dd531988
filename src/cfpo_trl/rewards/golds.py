r"""Reference answers: read as their author meant them, or refused with the reason; never silently something else.

math-verify searches a text for something that it can read: in `2 hours 30 minutes` it finds 30, in `2021-05-05` a
difference. Here all of a reference must be understood first. What comes out is LaTeX that math-verify reads whole:
`1 000 000` becomes `$1000000$`, `4,6,14` becomes `$4, 6, 14$`, `3*sqrt(5)` becomes `$3\cdot \sqrt{5}$`.
"""

import math
import re

from .boxes import joined_boxes
from .latex import GROUPED, read_formula
from .refusals import UnreadableGold

__all__ = ["UnreadableGold", "read_gold"]

ANSWER_MARK = re.compile(r"####[ \t]*(\S[^\n]*?)\s*\Z")  # GSM8K's last line
STATED = re.compile(r"(?:the )?(?:final )?answer(?: is\b|\s*[:=])\s*:?", re.IGNORECASE)


def read_gold(gold: object) -> str | None:
    r"""The reference as LaTeX in `$…$` that math-verify parses, all of it, as its author meant it.

    Read are numbers, percentages, amounts of money, measures, expressions in LaTeX, ASCII and Unicode, equations,
    inequalities, lists, sets, tuples, intervals, matrices, words and letters of choices; the boxes of a worked
    solution; GSM8K's last line behind `####`. The forms, and those that are refused, are listed in
    docs/data-and-rewards.md.

    Args:
        gold: A text, a number, or a list of them.

    Returns:
        None where there is no reference: None, NaN, an empty text or list. What it returns, it reads as itself.

    Raises:
        UnreadableGold: the reference is not surely understood.
    """
    if gold is None or (isinstance(gold, float) and math.isnan(gold)):
        return None
    if isinstance(gold, list | tuple):
        members = [read for member in gold if (read := read_gold(member)) is not None]
        return read_gold(", ".join(member.strip("$") for member in members)) if members else None
    if not isinstance(gold, str | int | float):
        raise UnreadableGold(f"a {type(gold).__name__}")
    text = str(gold).strip()
    return f"${read_formula(answer_of(text))}$" if text else None


def answer_of(text: str) -> str:
    """The answer of a worked solution, or the text itself.

    Raises:
        UnreadableGold: it has several boxes, a part of an expression in a box, or two answers that differ.
    """
    boxed, mark = joined_boxes(text), ANSWER_MARK.search(text)
    if boxed is None:
        if mark is None and "####" in text:
            raise UnreadableGold("text behind the answer at ####")
        if mark:
            return mark[1].replace(",", "") if GROUPED.fullmatch(mark[1]) else mark[1]  # GSM8K has no lists
        stated = STATED.match(text)
        return text[stated.end() :] if stated else text
    if mark:
        try:
            marked = read_formula(mark[1])
        except UnreadableGold:  # a headline
            return boxed
        if marked != read_formula(boxed):
            raise UnreadableGold("a box and an answer at #### that differ")
    return boxed
