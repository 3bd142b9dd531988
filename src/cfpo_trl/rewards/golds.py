"""Reference answers as math-verify can read them."""

import re

ANSWER_MARK = "####"  # GSM8K's
MATHEMATICS = re.compile(r"\$|\\\(|\\\[|\\begin\{(equation|align|gather|displaymath|math)\b")
NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+\s*%?")
WORD = re.compile(r"(?<![\\a-zA-Z])[a-zA-Z]{3,}")


def normalise_gold(gold: object) -> str | None:
    r"""The gold as math-verify parses it, or None where there is none.

    GSM8K's answer behind `####` is taken out, and the last `\boxed{…}` of a worked solution; bare LaTeX such as `2x+3`
    or `\sqrt{2}`, which math-verify misreads or skips, is wrapped in `$…$`. Plain numbers, text with words, and what
    is marked as mathematics already stay as they are.
    """
    if gold is None:
        return None
    text = str(gold)
    if ANSWER_MARK in text:
        text = text.rsplit(ANSWER_MARK, 1)[1]
    boxed = last_boxed(text)
    if boxed is not None:
        text = f"${boxed}$"
    text = text.strip()
    if not text:
        return None
    if MATHEMATICS.search(text) or NUMBER.fullmatch(text) or ("\\" not in text and WORD.search(text)):
        return text
    return f"${text}$"


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` whose braces close, or None."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : position]
    return None
