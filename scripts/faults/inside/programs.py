"""A reward of the fault harness: a few completions as programs that print them, run in the code reward's sandbox."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from cfpo_trl.rewards.code import CodeReward, get_code_reward

RUN = 6  # of each batch; every one takes a moment


@cache
def code_reward() -> CodeReward:
    return get_code_reward()


def printed(completions: Sequence[str], solution: Sequence[str], **columns: Any) -> list[float | None]:
    """Whether the first programs print the solution; None for the others."""
    programs = [f"```python\nimport time\ntime.sleep(0.2)\nprint({text!r})\n```" for text in completions[:RUN]]
    tests = [[{"input": "", "output": expected}] for expected in solution[:RUN]]
    scores = code_reward()(programs, tests=tests)
    return scores + [None] * (len(completions) - len(scores))
