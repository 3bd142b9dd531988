"""A user's own reward function: its signature is checked before the training, its returns at every call."""

import inspect
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

from ..suggestions import nearest
from .scores import RewardError, scored_together

logger = logging.getLogger("cfpo_trl")

# What TRL gives to every reward, beside the dataset's columns, and the columns that it keeps to itself.
GIVEN = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
KEPT = {"prompt", "completion"}
EXAMPLE = "def my_reward(completions, **kwargs): return [1.0 for completion in completions]"


def check_signature(name: str, reward: Callable, columns: Iterable[str]) -> None:
    """Raises a `ValueError` where the function cannot be called with what TRL gives it."""
    given = GIVEN | set(columns) - KEPT
    parameters = inspect.signature(reward).parameters.values()
    unknown = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in given
    ]
    if unknown:
        raise ValueError(
            f"reward_funcs has {name!r}, which asks for {unknown[0]!r}{nearest(unknown[0], given)}; a reward is given "
            f"{', '.join(sorted(given))}."
        )
    if not any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):
        raise ValueError(f"reward_funcs has {name!r}, which takes no **kwargs for what it does not use, as {EXAMPLE}.")


class CustomReward:
    """The function, with a `RewardError` on every process where one of them gets no list of numbers from it.

    Args:
        name: As the recipe has it.
        function: Returns a number for each completion, or None where it does not apply.
    """

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name, self.function = name, function
        self.__name__ = getattr(function, "__name__", type(function).__name__)  # TRL's name for it in the log

    def __call__(self, completions: Any, **kwargs: Any) -> list[float | None]:
        return scored_together(lambda: self.score(completions, **kwargs))

    def score(self, completions: Any, **kwargs: Any) -> list[float | None]:
        """As a call, for this process alone."""
        try:
            returned = self.function(completions=completions, **kwargs)
        except Exception as error:
            logger.exception("Reward %s:", self.name)
            raise RewardError(f"Reward {self.name} raised {type(error).__name__}: {error}") from error
        try:
            rewards = [None if reward is None else as_number(reward) for reward in returned]
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"Reward {self.name} returned {returned!r:.100}; it must return a list with a number for each "
                "completion, or None where it does not apply."
            ) from error
        if len(rewards) != len(completions):
            raise RewardError(
                f"Reward {self.name} returned {len(rewards)} rewards for {len(completions)} completions."
            )
        bad = [reward for reward in rewards if reward is not None and not math.isfinite(reward)]
        if bad:
            raise RewardError(f"Reward {self.name} returned {bad[0]}; where a reward does not apply, it is None.")
        return rewards


def as_number(reward: Any) -> float:
    """Raises a `TypeError` for a text, of which `float` would read the digits."""
    if isinstance(reward, str | bytes):
        raise TypeError(f"{reward!r} is a text")
    return float(reward)
