r"""The answer in the boxes of a worked solution; refused where a box holds a part of an expression."""

import re
from collections.abc import Iterator
from itertools import pairwise

from .refusals import UnreadableGold
from .signs import COMMANDS, SPACE, TEXT
from .units import MAGNITUDES

BOX = re.compile(r"\\f?boxed\s*\{")
BETWEEN_BOXES = re.compile(r"(?:[\s$,;]|\\[()\[\],;: ]|\\q?quad\b|(?:\\text\s*\{\s*)?\b(?:and|or)\b(?:\s*\})?)*")
PERCENT = re.compile(r"\$*(?:\s|\\[,; ])*(?:\\?%|per ?cent\b|pct\b)")

_GAP = rf"(?:{SPACE}|\$|\\[()\[\]])*"
_COMMAND = rf"\\(?:{'|'.join(sorted(COMMANDS - {'quad', 'qquad', 'displaystyle', 'in'}))})(?![A-Za-z])"
_SIGN = r"[+\-*/^_!|]"
# What ends a formula or a paragraph: nothing beyond it belongs to the box.
APART = re.compile(r"\n\s*\n|\\\]|\\\[|\${1,2}\s*\n|\*\*|__|--|</?[A-Za-z][^<>]*>")
BEFORE_A_PART = re.compile(rf"(?:\d(?:[ ~]|\\[,;:! ])*|(?:{_SIGN}|<|>|\d\s*:|{_COMMAND}){_GAP})\Z")
BEHIND_A_PART = re.compile(
    rf"[A-Za-z]|(?:[ ~]|\\[,;:! ])*\d|{_GAP}(?:(?!\^\s*\{{?\s*\\circ){_SIGN}|[<>]|:\s*\d|,\s*\d|{_COMMAND}"
    rf"|(?:\\text\s*\{{\s*)?(?:(?:{'|'.join(MAGNITUDES)})|(?:and|or)\b\s*\}}?{_GAP}(?:[-+.\d]|\\(?!f?boxed)[a-z])))"
)


def joined_boxes(text: str) -> str | None:
    """The content of the box; of several with nothing but commas, `and` and `or` between them a list; else None.

    Raises:
        UnreadableGold: a box does not close, holds a part of an expression, or there are several that differ.
    """
    boxes = list(find_boxes(text))
    if not boxes:
        return None
    contents = [text[begin:end].strip() for _, begin, end in boxes]
    if len(set(contents)) > 1:
        for (_, _, end), (start, _, _) in pairwise(boxes):
            if not BETWEEN_BOXES.fullmatch(text[end + 1 : start]):
                raise UnreadableGold("several boxes with different contents")
    if any(is_a_part(text[:start], text[end + 1 :]) for start, _, end in boxes):
        raise UnreadableGold("a box around a part of an expression")
    percent = r"\%" if PERCENT.match(text, boxes[-1][2] + 1) else ""
    return ", ".join(dict.fromkeys(contents)) + percent


def is_a_part(before: str, behind: str) -> bool:
    """Whether what stands around a box makes it a part: an operator, a factor, a bracket or an argument's brace."""
    before, behind = APART.split(before)[-1], APART.split(behind, maxsplit=1)[0]
    bracket = re.search(rf"(?<!\\)([(\[]){SPACE}*$", before)
    if bracket and not re.match(rf"{SPACE}*{re.escape({'(': ')', '[': ']'}[bracket[1]])}", behind):
        return True
    if re.search(r"(?<!\\)\{\s*$", before) and not re.search(rf"{TEXT}\s*$", before):
        return True
    return bool(BEFORE_A_PART.search(before) or BEHIND_A_PART.match(behind))


def find_boxes(text: str) -> Iterator[tuple[int, int, int]]:
    r"""Where each `\boxed{…}` starts, its content starts, and its content ends."""
    position = 0
    while opening := BOX.search(text, position):
        depth = 1
        for found in re.compile(r"\\.|[{}]").finditer(text, opening.end()):
            depth += {"{": 1, "}": -1}.get(found[0], 0)
            if depth == 0:
                break
        else:
            raise UnreadableGold("a box that does not close")
        yield opening.start(), opening.end(), found.start()
        position = found.end()
