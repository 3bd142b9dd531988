"""Gold tables for the rewards of form, the registry, and properties of both."""

import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfpo_trl.rewards import (
    exact_match_reward,
    get_code_format_reward,
    get_format_reward,
    get_tag_count_reward,
    load_reward,
    reasoning_steps_reward,
)
from cfpo_trl.rewards.registry import REWARDS, check_rewards

GOOD = "<think>\nfirst\nsecond\n</think>\n<answer>\n3\n</answer>"
CODE = "<think>a</think><answer>Here:\n```python\nprint(1)\n```\n</answer>"

FORMS = [  # completion, format, tag_count
    (GOOD, 1, 1.0),
    ("<think>a</think><answer>b</answer>", 1, 1.0),
    ("  <think></think>\n\n<answer></answer>\n", 1, 1.0),
    ("Sure! <think>a</think><answer>b</answer>", 0, 1.0),
    ("<think>a</think> so <answer>b</answer>", 0, 1.0),
    ("<think>a</think><answer>b</answer> done", 0, 1.0),
    ("<answer>b</answer><think>a</think>", 0, 1.0),
    ("<think>a<think>b</think><answer>c</answer>", 0, 0.75),
    ("<think>a</think><answer>b</answer><answer>c</answer>", 0, 0.5),
    ("<think>a</think><answer>b", 0, 0.75),
    ("<think>a", 0, 0.25),
    ("", 0, 0.0),
    ("<think>" + "x" * 100_000, 0, 0.25),
    ("<think>\0</think><answer>\ud800</answer>", 1, 1.0),
]


@pytest.mark.parametrize(("text", "right", "share"), FORMS)
def test_format_and_tag_count(text, right, share):
    message = [{"role": "assistant", "content": text}]
    assert get_format_reward()([text, message]) == [right, right]
    assert get_tag_count_reward()([text, message]) == [share, share]


def test_a_template_that_opens_think_does_not_cost_the_reward():
    completion = GOOD.removeprefix("<think>")
    assert get_format_reward()([completion]) == [0]
    assert get_format_reward(think_opened=True)([completion, GOOD]) == [1, 0]
    assert get_tag_count_reward(think_opened=True)([completion]) == [1]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (CODE, 1),
        (CODE.replace("python", "rust"), 0),
        (CODE.replace("<answer>", "<answer>```python\nx\n```"), 0),
        (GOOD, 0),
        (CODE.replace("\n```\n<", "<"), 0),
        (CODE.removesuffix("</answer>"), 0),
    ],
)
def test_code_format(text, right):
    assert get_code_format_reward()([text]) == [right]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("", 0),
        ("Step 1: a\nStep 2: b\nStep 3: c\nStep 4: d", 1),
        ("1. a\n2. b", 2 / 3),
        ("First, a. Next, b. Finally, c.", 1),
        ("- a\n* b", 2 / 3),
        ("version 1.2 is out - maybe", 0),
    ],
)
def test_reasoning_steps(text, score):
    assert reasoning_steps_reward([text]) == [pytest.approx(score)]


@pytest.mark.parametrize("text", ["\n" * 200_000, " " * 200_000, "1" * 200_000, "\t\n" * 100_000])
def test_reasoning_steps_takes_time_in_proportion(text):
    start = time.process_time()
    assert reasoning_steps_reward([text]) == [0]
    assert time.process_time() - start < 2.0  # a quadratic search takes minutes


def test_exact_match():
    completions = [" cat\n", [{"content": "cat"}], "cats", "cat", "7"]
    assert exact_match_reward(completions, ["cat", "cat", "cat", None, 7]) == [1, 1, 0, None, 1]
    assert exact_match_reward(["", "nan", "5", "5.5", ""], ["", float("nan"), 5.0, 5.5, " "]) == [
        None,
        None,
        1,
        1,
        None,
    ]


@given(st.text(max_size=300) | st.text("<>/thinkaswer`py \n", max_size=300))
def test_no_text_raises(text):
    for name in ("format", "tag_count", "code_format", "reasoning_steps"):
        (reward,) = load_reward(name)([text])
        assert 0 <= reward <= 1


def test_trl_s_rewards_by_name():
    assert load_reward("repetition_penalty", {"ngram_size": 2})(completion_ids=[[5] * 5]) == [-0.75]
    overlong = load_reward("soft_overlong", {"max_completion_len": 100, "soft_punish_cache": 20})
    assert overlong(completion_ids=[[1] * 90]) == [-0.5]


def test_every_name_loads():
    required = {
        "cosine": {"max_len": 10},
        "soft_overlong": {"max_completion_len": 10, "soft_punish_cache": 2},
    }
    for name in REWARDS:
        assert callable(load_reward(name, required.get(name)))


def test_dotted_path(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def constant(completions, **kwargs):\n    return [0.5] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_reward("my_rewards.constant")(["a", "b"]) == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"'my_rewards.missin', and my_rewards has no 'missin'"):
        load_reward("my_rewards.missin")
    sys.modules.pop("my_rewards")


@pytest.mark.parametrize(
    ("names", "parameters", "message"),
    [
        ([], {}, "reward_funcs is empty: use some of accuracy, "),
        (
            ["acuracy"],
            {},
            "reward_funcs has 'acuracy', which is no reward .did you mean 'accuracy'..: use some of accuracy, ",
        ),
        (["format"], {"cosine": {}}, "reward_parameters has 'cosine', which reward_funcs does not: format"),
    ],
)
def test_check_rewards(names, parameters, message):
    with pytest.raises(ValueError, match=message):
        check_rewards(names, parameters)


def test_wrong_parameters():
    with pytest.raises(ValueError, match="reward_parameters of cosine: .*'length'"):
        load_reward("cosine", {"length": 3})
    with pytest.raises(ValueError, match="reward_parameters gives exact_match"):
        load_reward("exact_match", {"strict": True})
