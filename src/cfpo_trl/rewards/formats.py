"""Rewards for the form of a completion: <think>…</think><answer>…</answer>, its tags, its steps, its code block."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from .texts import text_of

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
FORM = re.compile(r"\s*<think>.*</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)
STEP = re.compile(r"Step \d+:|^[ \t]*\d+[.)]\s|^[ \t]*[-*]\s|\b(?:First|Second|Third|Next|Finally),", re.MULTILINE)
STEPS_WANTED = 3

Reward = Callable[..., list[float]]


def _whole(completion: Any, think_opened: bool) -> str:
    return ("<think>" if think_opened else "") + text_of(completion)


def _answer(text: str) -> str | None:
    """What stands between the answer tags of a text in the right form, each tag once; else None."""
    # Counted first: a text without the tags costs no search.
    match = FORM.fullmatch(text) if all(text.count(tag) == 1 for tag in TAGS) else None
    return match and match.group(1)


def get_format_reward(think_opened: bool = False) -> Reward:
    """1 where the completion is <think>…</think><answer>…</answer>, each tag once and nothing around them, else 0.

    Args:
        think_opened: The chat template ends the prompt with `<think>`, so the completion starts inside it.
    """

    def format_reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
        return [float(_answer(_whole(completion, think_opened)) is not None) for completion in completions]

    return format_reward


def get_tag_count_reward(think_opened: bool = False) -> Reward:
    """0.25 for each of the four tags that occurs exactly once.

    Args:
        think_opened: The chat template ends the prompt with `<think>`, which then counts as the completion's.
    """

    def tag_count_reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
        texts = [_whole(completion, think_opened) for completion in completions]
        return [sum(text.count(tag) == 1 for tag in TAGS) / len(TAGS) for text in texts]

    return tag_count_reward


def get_code_format_reward(language: str = "python", think_opened: bool = False) -> Reward:
    """1 where the completion has the form of the format reward and its answer holds one block of code, else 0.

    Args:
        language: The language named behind the three backticks that open the block.
        think_opened: The chat template ends the prompt with `<think>`.
    """
    opening = f"```{language}\n"

    def code_format_reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
        answers = [_answer(_whole(completion, think_opened)) or "" for completion in completions]
        return [
            float(
                answer.count("```") == 2
                and answer.count(opening) == 1
                and answer.index(opening) < answer.rindex("```")
            )
            for answer in answers
        ]

    return code_format_reward


def reasoning_steps_reward(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """The number of visible steps ("Step 1:", numbered and bulleted lines, "First,", …) over 3, at most 1."""
    return [min(1.0, len(STEP.findall(text_of(completion))) / STEPS_WANTED) for completion in completions]
