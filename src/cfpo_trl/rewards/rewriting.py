r"""ASCII, Unicode and sloppy LaTeX as LaTeX that math-verify reads as its author meant it."""

import re
import unicodedata

from .refusals import UnreadableGold, maybe_several
from .signs import FUNCTIONS, GREEK, LETTER_ENDS, SPACE

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
# `2(3)`, which would be a mixed number
FACTOR_IN_BRACKETS = re.compile(r"(?<=[\d)])(?<![_^]\d)(?<![_^]\d\d)\s*\((?=\d+\))")
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
SPACED = re.compile(
    r"(?<![\d.,\w^_])([1-9]\d{0,2})((?:(?:\{,\}|,\\!\s?|\\[,!:; ]\s?|~| )\d{3})+)(?!\d|\s*/|(?:\{,\}|\\[,!:; ]|~| )\d)"
)


def both_signs(text: str) -> list[str]:
    r"""`\frac{1 \pm \sqrt{5}}{2}` as its two values; math-verify knows the sign outside of braces."""
    found = list(re.finditer(r"\\pm(?![A-Za-z])", text))
    if len(found) != 1:
        return [text]
    before, behind = text[: found[0].start()], text[found[0].end() :]
    if before.count("{") == before.count("}"):
        return [text]
    return [f"{before}{sign}{behind}" for sign in "+-"]


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
