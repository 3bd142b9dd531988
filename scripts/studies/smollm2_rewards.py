"""The reward of the pretrained model's study: the number with which a model goes on behind `=`."""

import re
from collections.abc import Sequence
from typing import Any

NUMBER = re.compile(r"-?\d+")


def first_number(completions: Sequence[str], solution: Sequence[str], **kwargs: Any) -> list[float]:
    """1 where the first whole number of a completion is the solution, else 0."""
    found = [NUMBER.search(completion) for completion in completions]
    return [
        float(number is not None and number[0] == expected) for number, expected in zip(found, solution, strict=True)
    ]
