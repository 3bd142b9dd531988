"""Reward functions with TRL's signature: `reward(completions, **columns) -> list[float | None]`."""

from .exact_match import exact_match_reward

__all__ = ["exact_match_reward"]
