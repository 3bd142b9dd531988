"""The plainest verifiable reward: the completion is the solution."""

import math
from typing import Any

from .texts import text_of


def exact_match_reward(completions: list[Any], solution: list[Any], **kwargs: Any) -> list[float | None]:
    """1 where the completion equals the solution, white space at both ends aside, else 0; None without a solution.

    Args:
        completions: Texts, or conversations whose last message is scored.
        solution: The expected texts or numbers; None, NaN and an empty text are none.
    """
    return [
        float(text_of(completion).strip() == wanted) if (wanted := expected_text(expected)) else None
        for completion, expected in zip(completions, solution, strict=True)
    ]


def expected_text(expected: Any) -> str:
    """The solution as a text, empty where there is none; a column of whole numbers with a gap has 5 as 5.0."""
    if expected is None or (isinstance(expected, float) and math.isnan(expected)):
        return ""
    return str(int(expected) if isinstance(expected, float) and expected.is_integer() else expected).strip()
