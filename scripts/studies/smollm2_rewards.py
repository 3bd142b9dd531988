"""The reward of the pretrained model's study: what a small model says last, boxed or not."""

import re
from collections.abc import Sequence
from typing import Any

from cfpo_trl.rewards.texts import text_of

NUMBER = re.compile(r"-?\d+")


def last_number(completions: Sequence[Any], solution: Sequence[str], **kwargs: Any) -> list[float]:
    """1 where the last whole number of a completion is the solution, else 0."""
    said = [NUMBER.findall(text_of(completion)) for completion in completions]
    return [float(bool(numbers) and numbers[-1] == expected) for numbers, expected in zip(said, solution, strict=True)]
