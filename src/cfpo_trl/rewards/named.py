"""A reward that pickles, whatever it is made of: each process builds it from its name."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from .registry import guarded, load_reward


class NamedReward:
    """A recipe's reward, for the rollout process of an asynchronous training.

    Args:
        name: As the recipe has it.
        parameters: As the recipe has them.
        logged: Its name in the log.
    """

    def __init__(self, name: str, parameters: dict[str, Any] | None, logged: str):
        self.name, self.parameters = name, parameters
        self.__name__ = logged

    @cached_property
    def reward(self) -> Callable[..., list[float | None]]:
        return guarded(self.name, load_reward(self.name, self.parameters))

    def __call__(self, **columns: Any) -> list[float | None]:
        return self.reward(**columns)
