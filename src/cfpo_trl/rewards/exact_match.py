"""The plainest verifiable reward: the completion is the solution."""

from typing import Any

from .texts import text_of


def exact_match_reward(completions: list[Any], solution: list[Any], **kwargs: Any) -> list[float | None]:
    """1 where the completion equals the solution, white space at both ends aside, else 0; None without a solution.

    Args:
        completions: Texts, or conversations whose last message is scored.
        solution: The expected texts.
    """
    return [
        None if expected is None else float(text_of(completion).strip() == str(expected).strip())
        for completion, expected in zip(completions, solution, strict=True)
    ]
