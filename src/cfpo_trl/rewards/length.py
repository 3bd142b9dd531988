"""The length reward of Kimi k1.5, https://arxiv.org/abs/2501.12599, section 2.3.3."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from .accuracy import accuracy_reward


def length_reward(
    completions: Sequence[Any],
    solution: Sequence[Any],
    prompts: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    **kwargs: Any,
) -> list[float | None]:
    """λ = 0.5 − (length − shortest) / (longest − shortest) within each prompt's group; min(0, λ) where it is wrong.

    A group of equal lengths scores 0. Lengths are in tokens. A group is what one process holds of a prompt's
    completions: keep `per_device_train_batch_size` a multiple of `num_generations`.

    Returns:
        Rewards in [−0.5, 0.5]; None where the accuracy reward is None.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        groups[repr(prompt)].append(index)
    lengths = [len(ids) for ids in completion_ids]
    rewards: list[float | None] = list(accuracy_reward(completions, solution))
    for members in groups.values():
        shortest, longest = (bound(lengths[index] for index in members) for bound in (min, max))
        for index in members:
            if rewards[index] is None:
                continue
            value = 0.5 - (lengths[index] - shortest) / (longest - shortest) if longest > shortest else 0.0
            rewards[index] = value if rewards[index] else min(0.0, value)
    return rewards
