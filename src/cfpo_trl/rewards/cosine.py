"""The cosine reward: correctness scaled by length, https://huggingface.co/papers/2502.03373, appendix C.1."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from .accuracy import accuracy_reward


def get_cosine_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> Callable[..., list[float | None]]:
    """Short right answers score best, short wrong ones worst; the schedule of `trl.rewards.get_cosine_scaled_reward`.

    TRL's own verifies in the trainer's process, where a completion can hang it; this one takes our verdicts.

    Args:
        max_len: Length in tokens where the schedule ends.
        min_value_wrong: Reward of a wrong completion of length 0.
        max_value_wrong: Reward of a wrong completion of `max_len` tokens or more.
        min_value_correct: Reward of a right completion of `max_len` tokens or more.
        max_value_correct: Reward of a right completion of length 0.

    Returns:
        A reward function of completions, solutions and `completion_ids`; None where the accuracy reward is None.
    """

    def cosine_reward(
        completions: Sequence[Any],
        solution: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **kwargs: Any,
    ) -> list[float | None]:
        rewards: list[float | None] = []
        for right, ids in zip(accuracy_reward(completions, solution), completion_ids, strict=True):
            if right is None:
                rewards.append(None)
                continue
            short, long = (max_value_correct, min_value_correct) if right else (min_value_wrong, max_value_wrong)
            shortness = (1 + math.cos(math.pi * min(len(ids) / max_len, 1.0))) / 2
            rewards.append(long + (short - long) * shortness)
        return rewards

    return cosine_reward
