"""LaTeX's signs and commands that references are known to use."""

import re


def listed(names: str) -> set[str]:
    return set(names.split())


TEXT = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf)|mbox|hbox)\s*\{"
MARKED = re.compile(TEXT + r"([^{}]*)\}")
MARKED_LETTER = re.compile(r"(?<![\d)}])(?<![\d)}]\s)" + TEXT + r"\s*([A-Za-z])\s*\}")  # not a unit
GREEK = listed("alpha beta gamma delta epsilon theta lambda mu pi rho sigma tau phi omega")
FUNCTIONS = listed("arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln exp")
COMMANDS = GREEK | FUNCTIONS
COMMANDS |= listed(
    """frac sqrt binom cdot times div pm infty le leq leqslant ge geq geqslant ne neq lt gt in cup cap setminus
    emptyset mathbb left right circ displaystyle quad qquad lfloor rfloor lceil rceil vert lvert rvert overline min
    max gcd sum prod Gamma Delta Theta Lambda Pi Sigma Phi Omega varepsilon varphi ell"""
)
SPACE = r"(?:\s|\\[,;:! ]|\\q?quad\b)"
LETTER_ENDS = r"(?![A-Za-z])"
BASE = re.compile(r"(\d+)\s*_\s*\{?\s*(\d+)\s*\}?")
MATRIX = re.compile(r"\\begin\s*\{array\}\s*\{[lcr|]*\}|\\(?:begin|end)\s*\{(?:[pbvBV]?matrix|array)\}")
SET = re.compile(r"\\mathbb\s*\{\s*[A-Z]\s*\}")
COMMAND = re.compile(r"\\([A-Za-z]+)|\\[{}%,;:! \\|]")
