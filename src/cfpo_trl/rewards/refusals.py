"""What is not surely understood: each check raises an `UnreadableGold` that says what it may be."""

import re

from .signs import BASE, COMMAND, COMMANDS, FUNCTIONS, GREEK, MARKED, MATRIX, SET, SPACE


class UnreadableGold(ValueError):
    """A reference that is not surely understood; the message says what it may be, or what is unknown in it."""


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
RELATION = re.compile(r"[<>]|\\(?:leq?|leqslant|geq?|geqslant|lt|gt|neq?)(?![A-Za-z])")
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


def maybe_several(first: str, groups: list[str]) -> bool:
    """Whether `153,370` and `153 370 371` may be several numbers: no group is shorter, and none begins with 0."""
    return len(first) == 3 and not any(group.startswith("0") for group in groups)


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
