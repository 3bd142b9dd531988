"""Reward functions by name, or by dotted import path; each is imported and built when a recipe names it."""

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

# An attribute that starts with get_ is a factory: it takes a recipe's parameters and returns the reward.
REWARDS = {
    "accuracy": "cfpo_trl.rewards.accuracy.get_accuracy_reward",
    "reasoning_accuracy": "cfpo_trl.rewards.accuracy.get_reasoning_accuracy_reward",
    "cosine": "cfpo_trl.rewards.cosine.get_cosine_reward",
    "length": "cfpo_trl.rewards.length.length_reward",
    "exact_match": "cfpo_trl.rewards.exact_match.exact_match_reward",
    "format": "cfpo_trl.rewards.formats.get_format_reward",
    "tag_count": "cfpo_trl.rewards.formats.get_tag_count_reward",
    "code_format": "cfpo_trl.rewards.formats.get_code_format_reward",
    "reasoning_steps": "cfpo_trl.rewards.formats.reasoning_steps_reward",
    "repetition_penalty": "trl.rewards.get_repetition_penalty_reward",
    "soft_overlong": "trl.rewards.get_soft_overlong_punishment",
}
NEED_SOLUTION = {"accuracy", "reasoning_accuracy", "cosine", "length", "exact_match"}
NEED_THINK_OPENED = {"format", "tag_count", "code_format"}


def check_rewards(names: list[str], parameters: dict[str, dict[str, Any]]) -> None:
    """Raises a `ValueError` that names the valid choices for an unknown reward, or parameters of one not in use."""
    choices = f"use some of {', '.join(REWARDS)}, or a dotted import path such as my_package.rewards.my_reward"
    if not names:
        raise ValueError(f"reward_funcs is empty: {choices}.")
    for name in names:
        if name not in REWARDS and "." not in name:
            raise ValueError(f"reward_funcs has {name!r}, which is no reward: {choices}.")
    for name in parameters:
        if name not in names:
            raise ValueError(f"reward_parameters has {name!r}, which reward_funcs does not: {', '.join(names)}.")


def load_reward(name: str, parameters: dict[str, Any] | None = None) -> Callable[..., list[float | None]]:
    """The reward function of that name or dotted path, built with the parameters.

    Raises:
        ValueError: the module or attribute does not exist, or the reward does not take these parameters.
    """
    path = REWARDS.get(name, name)
    module_name, attribute = path.rsplit(".", 1)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a user's own module beside the recipe
    try:
        reward = getattr(importlib.import_module(module_name), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"reward_funcs has {name!r}, which cannot be imported: {error}.") from error
    if not attribute.startswith("get_"):
        if parameters:
            raise ValueError(f"reward_parameters gives {name} {sorted(parameters)}, and it takes none.")
        return reward
    try:
        return reward(**(parameters or {}))
    except TypeError as error:
        raise ValueError(f"reward_parameters of {name}: {error}.") from error
