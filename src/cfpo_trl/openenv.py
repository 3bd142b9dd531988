"""An environment on an OpenEnv server, as a recipe's `environment`: https://github.com/meta-pytorch/OpenEnv."""

import json
from typing import Any

from .rewards.scores import RewardError

INSTALL = "an OpenEnv environment needs its client: `pip install 'cfpo_trl[openenv]'`."


class OpenEnv:
    """A session on the server for each completion: the policy acts by the tool `step`, whose rewards add up.

    The server must allow as many sessions at a time as there are completions in a batch of rollouts. Where it fails,
    the run stops with a checkpoint: a policy is not paid for a server's fault.

    Args:
        url: Of the server, such as `http://127.0.0.1:8000`.
        action: Field of the environment's action that takes the policy's text.
        observation: Field of its observation that is shown; default all of it, as JSON.

    Raises:
        ImportError: openenv-core is not installed.
        ConnectionError: no server answers.
    """

    def __init__(self, url: str, action: str = "message", observation: str | None = None):
        try:
            from openenv.core.generic_client import GenericEnvClient
        except ImportError as error:
            raise ImportError(INSTALL) from error
        self._url, self._action, self._observation = url, action, observation
        self._client = GenericEnvClient(base_url=url).sync()
        self._client.connect()

    def reset(self, seed: int | None = None, **row: Any) -> str:
        """Begins an episode, by the row's `seed` where it has one; what it shows stands behind the prompt.

        Raises:
            RewardError: the server failed.
        """
        self._reward, self._done, self._failure = 0.0, False, ""
        try:
            return self._shown(self._client.reset(**({} if seed is None else {"seed": seed})))
        except Exception as error:
            raise RewardError(f"The environment at {self._url} failed: {type(error).__name__}: {error}") from error

    def step(self, text: str) -> str:
        """Acts in the environment.

        Args:
            text: The action.

        Returns:
            What the environment shows.
        """
        if self._done:
            raise ValueError("the episode is over")
        try:
            result = self._client.step({self._action: text})
        except RuntimeError:  # the environment's answer to an action that it does not understand
            raise
        except Exception as error:  # TRL makes a message to the policy of it: the run must not go on
            self._failure = f"{type(error).__name__}: {error}"
            raise
        self._reward += result.reward or 0.0
        self._done = bool(result.done)
        return self._shown(result)

    def get_reward(self) -> float:
        """The sum of the steps' rewards. Raises a `RewardError` where the server failed."""
        if self._failure:
            raise RewardError(f"The environment at {self._url} failed: {self._failure}")
        return self._reward

    def _shown(self, result: Any) -> str:
        observation = result.observation or {}
        if self._observation is None:
            return json.dumps(observation)
        return str(observation.get(self._observation, ""))
