"""A real OpenEnv server: the policy names a letter, and is told whether it comes before the hidden one.

python openenv_server.py PORT
"""

import random
import sys

import uvicorn
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

from equivalence_run import LETTERS


class Named(Action):
    letter: str


class Told(Observation):
    text: str = ""


class Letters(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self):
        super().__init__()
        self._state = State()

    def reset(self, seed=None, **kwargs):
        self.hidden = random.Random(seed).choice(LETTERS)
        return Told(text="a")

    def step(self, action, **kwargs):
        right = action.letter == self.hidden
        return Told(text="b" if right else "c", reward=float(right), done=right)

    @property
    def state(self):
        return self._state


if __name__ == "__main__":
    app = create_fastapi_app(Letters, Named, Told, max_concurrent_envs=64)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
