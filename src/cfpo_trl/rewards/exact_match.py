"""The plainest verifiable reward: the completion is the solution."""

from typing import Any


def exact_match_reward(completions: list[Any], solution: list[str | None], **kwargs: Any) -> list[float | None]:
    """1 where the completion equals the solution, white space at both ends aside, else 0; None without a solution.

    Args:
        completions: Texts, or conversations whose last message is scored.
        solution: The expected texts.
    """
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [
        None if expected is None else float(text.strip() == expected.strip())
        for text, expected in zip(texts, solution, strict=True)
    ]
