"""Rewards by name, dotted import path, model or URL; each is imported and built when a recipe names it."""

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

from ..imports import imported
from ..suggestions import nearest
from .custom import CustomReward, check_signature

# An attribute that starts with get_ is a factory: it takes a recipe's parameters and returns the reward.
REWARDS = {
    "accuracy": "cfpo_trl.rewards.accuracy.get_accuracy_reward",
    "reasoning_accuracy": "cfpo_trl.rewards.accuracy.get_reasoning_accuracy_reward",
    "cosine": "cfpo_trl.rewards.cosine.get_cosine_reward",
    "length": "cfpo_trl.rewards.length.length_reward",
    "exact_match": "cfpo_trl.rewards.exact_match.exact_match_reward",
    "code": "cfpo_trl.rewards.code.get_code_reward",
    "format": "cfpo_trl.rewards.formats.get_format_reward",
    "tag_count": "cfpo_trl.rewards.formats.get_tag_count_reward",
    "code_format": "cfpo_trl.rewards.formats.get_code_format_reward",
    "reasoning_steps": "cfpo_trl.rewards.formats.reasoning_steps_reward",
    "repetition_penalty": "trl.rewards.get_repetition_penalty_reward",
    "soft_overlong": "trl.rewards.get_soft_overlong_punishment",
}
NEED_SOLUTION = {"accuracy", "reasoning_accuracy", "cosine", "length", "exact_match"}
NEED_THINK_OPENED = {"format", "tag_count", "code_format"}
MODEL, SERVER = "cfpo_trl.rewards.model.RewardModel", "cfpo_trl.rewards.remote.RewardServer"
CHOICES = (
    f"use some of {', '.join(REWARDS)}, a dotted import path such as my_package.rewards.my_reward, a reward model's "
    "folder or hub name such as ./my-model or someone/model, or a reward server's URL"
)


def check_rewards(names: list[str], parameters: dict[str, dict[str, Any]]) -> None:
    """Raises a `ValueError` that names the valid choices for an unknown reward, or parameters of one not in use."""
    if not names:
        raise ValueError(f"reward_funcs is empty: {CHOICES}.")
    for name in names:
        if not (name in REWARDS or "/" in name or "." in name):
            raise ValueError(f"reward_funcs has {name!r}, which is no reward{nearest(name, REWARDS)}: {CHOICES}.")
        if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
            raise ValueError(f"reward_funcs has {name!r}, a folder without a model's config.json.")
    for name in parameters:
        if name not in names:
            raise ValueError(
                f"reward_parameters has {name!r}{nearest(name, names)}, which reward_funcs does not: "
                f"{', '.join(names)}."
            )


def load_reward(name: str, parameters: dict[str, Any] | None = None) -> Callable[..., list[float | None]]:
    """The reward of that name or dotted path, of that model (its name has a `/`) or URL, built with the parameters.

    Raises:
        ValueError: the module or attribute does not exist, the reward does not take these parameters, the model
            cannot be loaded, or no server listens.
    """
    path, given = REWARDS.get(name, name), dict[str, Any]()
    if "/" in name:
        path, given = (SERVER, {"url": name}) if "://" in name else (MODEL, {"model": name})
    reward = imported("reward_funcs", path, name)
    if not (given or path.rpartition(".")[2].startswith("get_")):
        if parameters:
            raise ValueError(f"reward_parameters gives {name} {sorted(parameters)}, and it takes none.")
        return reward
    try:
        return reward(**given, **(parameters or {}))
    except TypeError as error:
        raise ValueError(f"reward_parameters of {name}: {error}.") from error


def load_rewards(
    names: list[str], parameters: dict[str, dict[str, Any]], columns: Sequence[str]
) -> list[Callable[..., list[float | None]]]:
    """All of them, see [`load_reward`]; those of the user are checked, see [`~cfpo_trl.rewards.custom`].

    Raises:
        ValueError: two would have one name in the log, or one cannot be called with the dataset's columns.
    """
    rewards = []
    for name in names:
        reward = load_reward(name, parameters.get(name))
        if is_custom(name):
            check_signature(name, reward, columns)
        rewards.append(guarded(name, reward))
    logged = [reward.__name__ for reward in rewards]
    for name, called in zip(names, logged, strict=True):
        if logged.count(called) > 1:
            raise ValueError(
                f"reward_funcs has {name!r} and another that is called {called!r} in the log: their metrics would be "
                "one; rename a function or a model's folder."
            )
    return rewards


def guarded(name: str, reward: Callable[..., list[float | None]]) -> Callable[..., list[float | None]]:
    """The reward; a user's own as a [`CustomReward`], but for coroutines, which TRL awaits itself."""
    return CustomReward(name, reward) if is_custom(name) and not inspect.iscoroutinefunction(reward) else reward


def is_custom(name: str) -> bool:
    """Whether the name is a dotted path of the user's own."""
    return name not in REWARDS and "/" not in name and not name.startswith("cfpo_trl.")
