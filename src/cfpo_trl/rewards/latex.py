r"""One formula, number or word as LaTeX that math-verify reads as its author meant it; or refused.

Three steps: ASCII, Unicode and sloppy LaTeX are rewritten (rewriting.py); what could be meant in two ways is refused
(refusals.py); and whatever is left must be made of signs that are known to be read right (signs.py).
"""

import re
from collections.abc import Iterator
from itertools import pairwise

from .refusals import (
    AMBIGUOUS,
    LETTERS_BEHIND,
    MIXED,
    UNBRACED,
    UnreadableGold,
    check_groups,
    check_letters,
    check_list,
    check_products,
    check_signs,
    maybe_several,
)
from .rewriting import both_signs, rewrite
from .signs import COMMAND, GREEK, MARKED, MARKED_LETTER, SPACE, listed
from .units import MAGNITUDES, split_unit

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
GROUPED = re.compile(r"[-+]?([1-9]\d{0,2})((?:,\d{3})+)(\.\d+)?")
MONEY = re.compile(r"([-+]?)\s*(?:US)?(?P<sign>\\\$|[$€£¥₹])\s*(?=[-+]?[\d.])")
MONEY_BEHIND = re.compile(r"(?<=\d)\s*(?P<sign>\\\$|[$€£¥₹])$")
CURRENCIES = {r"\$": "dollar", "$": "dollar", "€": "euro", "£": "gbp", "¥": "yen", "₹": "rupee"}
PERCENT = re.compile(r"(?<=[\d})])(?:\s|\\[,; ])*(?:\\?%|per ?cent|pct)$")
SEPARATOR = re.compile(r"[,;]?\s*(?:\\text\s*\{\s*(?:and|or)\s*\}|(?<![A-Za-z])(?:and|or)(?![A-Za-z]))|(?<!\\),\s")
SEMICOLON = re.compile(r"(?<!\\);")
COMMA = re.compile(r"(?<!\\),")
SPACE_AROUND = re.compile(rf"^{SPACE}+|{SPACE}+$")


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


def read_item(item: str, alone: bool) -> str:
    """One member of a list, or the whole answer, with its unit marked as text."""
    unit = ""
    if behind := MONEY_BEHIND.search(item):
        item, unit = item[: behind.start()], CURRENCIES[behind[1]]
    elif before := MONEY.match(item):
        item, unit = before[1] + item[before.end() :], CURRENCIES[before[2]]
    elif percent := PERCENT.search(item):
        item = item[: percent.start()] + r"\%"
    elif letters := LETTERS_BEHIND.search(item):
        item = product_with(letters)
    else:
        item, unit = split_unit(item)
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


def product_with(letters: re.Match) -> str:
    """`2n` of `2 n`: behind a space a letter would be a unit; refuses `3 m` and `2 s`, which may have one."""
    value, behind = letters.string[: letters.start()], letters[0]
    if letters[1].strip() in set("mgshl") and not re.search("[A-Za-z=]", COMMAND.sub("", value)):
        raise UnreadableGold("a unit, or a variable")
    return value + re.sub(SPACE, "", behind)
