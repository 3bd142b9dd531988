"""The reward of a task whose digits have many ways to be written."""

from typing import Any

from scripts.studies.study_models import DIGITS, SYNONYMS, synonym

from cfpo_trl.rewards.exact_match import exact_match_reward

READ = str.maketrans({synonym(digit, number): digit for digit in DIGITS for number in range(SYNONYMS)})


def digits_match(completions: list[str], solution: list[str], **kwargs: Any) -> list[float | None]:
    """1 where the completion is the solution, a synonym taken for its digit, else 0."""
    return exact_match_reward([completion.translate(READ) for completion in completions], solution)
