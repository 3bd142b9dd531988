"""What rewards that can fail share: the check of their scores, and one failure for all processes."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

Scores = TypeVar("Scores")


class RewardError(RuntimeError):
    """A reward model or server failed during the run; training saves a checkpoint and ends."""


def checked(scores: Any, count: int, source: str) -> list[float | None]:
    """The scores, if they are `count` numbers or None; else a `RewardError` says what `source` gave instead."""
    if not isinstance(scores, Sequence) or isinstance(scores, str) or len(scores) != count:
        got = f"{len(scores)} rewards" if isinstance(scores, list) else repr(scores)[:200]
        raise RewardError(f"{source} gave {got} for {count} completions; it must give a list of one number for each.")
    for index, score in enumerate(scores):
        if score is not None and (isinstance(score, bool) or not isinstance(score, int | float)):
            raise RewardError(f"{source} gave {score!r} for completion {index}; a reward is a number, or null.")
    bad = [index for index, score in enumerate(scores) if score is not None and not math.isfinite(score)]
    if bad:
        raise RewardError(
            f"{source} gave {len(bad)} of {count} rewards that are not finite, the first {scores[bad[0]]} for "
            f"completion {bad[0]}."
        )
    return list(scores)


def scored_together(score: Callable[[], list[Scores]]) -> list[Scores]:
    """What `score` returns; if it raises a `RewardError` on one process, it raises on all of them.

    Without that, the others would wait for the failed one's rewards until their collective's time-out.
    """
    scores: list[Scores] = []
    problem = None
    try:
        scores = score()
    except RewardError as error:
        problem = str(error)
    problems = [problem] if PartialState().num_processes == 1 else gather_object([problem])
    for problem in problems:
        if problem is not None:
            raise RewardError(problem)
    return scores
