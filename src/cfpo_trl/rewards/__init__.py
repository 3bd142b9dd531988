"""Reward functions with TRL's signature: `reward(completions, **columns) -> list[float | None]`."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .accuracy import (
        accuracy_reward,
        get_accuracy_reward,
        get_reasoning_accuracy_reward,
        reasoning_accuracy_reward,
    )
    from .cosine import get_cosine_reward
    from .exact_match import exact_match_reward
    from .formats import get_code_format_reward, get_format_reward, get_tag_count_reward, reasoning_steps_reward
    from .length import length_reward
    from .registry import load_reward

_MODULE_OF = {
    "accuracy_reward": "accuracy",
    "exact_match_reward": "exact_match",
    "get_accuracy_reward": "accuracy",
    "get_code_format_reward": "formats",
    "get_cosine_reward": "cosine",
    "get_format_reward": "formats",
    "get_reasoning_accuracy_reward": "accuracy",
    "get_tag_count_reward": "formats",
    "length_reward": "length",
    "load_reward": "registry",
    "reasoning_accuracy_reward": "accuracy",
    "reasoning_steps_reward": "formats",
}

__all__ = [
    "accuracy_reward",
    "exact_match_reward",
    "get_accuracy_reward",
    "get_code_format_reward",
    "get_cosine_reward",
    "get_format_reward",
    "get_reasoning_accuracy_reward",
    "get_tag_count_reward",
    "length_reward",
    "load_reward",
    "reasoning_accuracy_reward",
    "reasoning_steps_reward",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
