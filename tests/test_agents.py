"""Agents: what a recipe can say of them, and that only what the policy wrote is trained, counted and rewarded."""

import json
import random

import pytest
import torch
import yaml
from datasets import Dataset

from cfpo_trl import CFPOConfig, CFPOTrainer, grpo
from cfpo_trl.alignment import turns
from cfpo_trl.mistakes import Mistake
from cfpo_trl.rewards.texts import text_of
from cfpo_trl.running.agents import AgentArguments, check_agent, load_agent, placeholders
from cfpo_trl.tiny.model import build_model, build_tokenizer
from cfpo_trl.tiny.warm_start import warm_start
from conftest import CPU, LETTERS

DIGITS = "0123456789"
CALL = {"function": {"name": "guess", "arguments": {"digit": "{content}"}}, "type": "function"}
FIELDS = {
    "tool_calls": {"open": "!", "close": "<eos>", "content": "text", "repeats": True, "transform": CALL},
    "content": {"close": "<eos>", "content": "text"},
}
TEMPLATE = (
    "{%- for m in messages -%}{%- if m.tool_calls -%}{%- for c in m.tool_calls -%}"
    "{%- if 'digit' in c.function.arguments -%}{{ '!' + c.function.arguments.digit }}"
    "{%- else -%}{{ '!' + c.function.name + c.function.arguments | string }}{%- endif -%}{%- endfor -%}"
    "{{ '<eos>' }}"
    "{%- elif m.role == 'assistant' -%}{{ m.content + '<eos>' }}"
    "{%- elif m.role == 'tool' -%}{{ '[' + m.content + ']' }}"
    "{%- else -%}{{ m.content + '>' }}{%- endif -%}{%- endfor -%}"
)


class Search:
    """A digit to be found: each guess is answered by < or >, or =."""

    def __init__(self, best: float = 1.0):
        self.best = best

    def reset(self, seed: int = 0, **row) -> str:
        self.digit = random.Random(seed).randrange(10)
        self.found = False
        return "s"

    def guess(self, digit: str) -> str:
        """Says where the digit is.

        Args:
            digit: The guess.

        Returns:
            Its place.
        """
        self.found = self.found or int(digit) == self.digit
        return "=" if int(digit) == self.digit else "<" if self.digit < int(digit) else ">"

    def get_reward(self) -> float:
        return self.best if self.found else 0.0


class NoReset:
    def guess(self, digit: str) -> str:
        """Nothing."""


class Untyped:
    def reset(self, **row): ...

    def guess(self, digit):
        """Nothing.

        Args:
            digit: The guess.
        """


class Unreachable:
    def __init__(self):
        raise ConnectionError("no server")

    def reset(self, **row): ...


def add(one: int, other: int) -> int:
    """Adds.

    Args:
        one: A number.
        other: Another.
    """
    return one + other


def undocumented(one: int) -> int:
    return one


def tokenizer_for_calls():
    tokenizer = build_tokenizer(DIGITS + "abcdefghijklmnopqrstuvwxyz><=![]{}':_ ")
    tokenizer.chat_template = TEMPLATE
    anchor = {"start_anchor_pattern": "$"}  # a message begins where the prompt ends
    tokenizer.response_template = {"defaults": {"role": "assistant"}, **anchor, "fields": FIELDS}
    return tokenizer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": ["add"]}, "tools has 'add', which is no dotted path"),
        ({"tools": ["no_such_module.add"]}, "cannot be imported"),
        ({"tools": ["test_agents.ad"]}, r"test_agents has no 'ad' \(did you mean 'add'\?\)"),
        ({"tools": ["test_agents.undocumented"]}, "'test_agents.undocumented', which is no tool: .*docstring"),
        ({"environment": "test_agents.NoReset"}, "has no method reset"),
        ({"environment": "test_agents.Untyped"}, "'test_agents.Untyped.guess', which is no tool: .*type hint"),
        ({"environment": "test_agents.Unreachable"}, "cannot be made: ConnectionError: no server"),
        (
            {"environment": "test_agents.Search", "environment_parameters": {"worst": 1}},
            "cannot be made: TypeError: .*worst",
        ),
        (
            {"environment": {"one": "test_agents.Search"}, "environment_parameters": {"on": {}}},
            r"environment_parameters has 'on' \(did you mean 'one'\?\), no environment: one",
        ),
    ],
)
def test_what_is_no_tool_or_environment_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        load_agent(AgentArguments(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"environment_parameters": {"a": 1}}, "environment_parameters is given, and no environment"),
        ({"rollout_func": "a.b", "tools": ["a.c"]}, "TRL ignores its env_mask"),
        ({"environment": "{"}, "is no mapping"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        AgentArguments(**options)


def test_environments_with_parameters_and_tools():
    args = AgentArguments(
        tools=["test_agents.add"],
        environment='{"one": "test_agents.Search", "two": "test_agents.Search"}',
        environment_parameters={"two": {"best": 3.0}},
    )
    agent = load_agent(args)
    assert set(agent.options()) == {"tools", "environment_factory"}
    assert [agent.environment[name]().best for name in ("one", "two")] == [1.0, 3.0]
    assert agent.rewards_itself
    assert [tool.__name__ for tool in agent.shown({"environment": "one"})["tools"]] == ["add", "guess"]
    tokenizer = tokenizer_for_calls()
    data = Dataset.from_list([{"environment": "one"}, {"environment": "three"}])
    with pytest.raises(ValueError, match="column environment has 'three', no environment: one, two"):
        check_agent(agent, data, tokenizer)
    with pytest.raises(ValueError, match="a column `environment` names one for each row; it is missing"):
        check_agent(agent, Dataset.from_list([{"prompt": "a"}]), tokenizer)
    check_agent(agent, data.select([0]), tokenizer)


@pytest.mark.parametrize(
    ("template", "response", "message"),
    [
        ("{{ messages[0].content }}", True, "drops tool calls or their results"),
        (TEMPLATE, False, "could not read them from completions; give response_template"),
        ("{{ messages | length }}" + TEMPLATE, True, "writes earlier turns in another way"),
    ],
)
def test_chat_templates_that_cannot_call(template, response, message):
    agent = load_agent(AgentArguments(environment="test_agents.Search"))
    tokenizer = tokenizer_for_calls()
    tokenizer.chat_template = template
    if not response:
        tokenizer.response_template = None
    with pytest.raises(ValueError, match=message):
        check_agent(agent, Dataset.from_list([{"prompt": "a"}]), tokenizer)


def test_what_a_tool_wrote_last_earns_nothing():
    calls = [{"role": "assistant", "tool_calls": [CALL], "content": ""}, {"role": "tool", "content": "4"}]
    assert text_of(calls) == ""
    assert text_of([*calls, {"role": "assistant", "content": "4"}]) == "4"
    assert text_of([{"content": "4"}]) == "4"


@pytest.mark.parametrize(
    ("mask", "count"), [([1, 1, 0, 1], 2), ([0, 1], 1), ([0, 0], 0), ([1, 0, 1, 0, 1], 3), ([], 0)]
)
def test_turns(mask, count):
    assert turns(mask) == count


@pytest.fixture
def agent_trainer(tmp_path):
    def build(options=None, model=None, rows=None, **arguments):
        tokenizer = tokenizer_for_calls()
        args = CFPOConfig(
            str(tmp_path / "out"),
            **{
                "per_device_train_batch_size": 16,
                "num_generations": 4,
                "max_completion_length": 24,
                "max_tool_calling_iterations": 4,
                "logging_steps": 1,
                "save_strategy": "no",
                "seed": 3,
                **CPU,
                **(options or {}),
            },
        )
        model = model or build_model(tokenizer, hidden_size=32, layers=2)
        rows = rows or [{"prompt": [{"role": "user", "content": ""}], "seed": seed} for seed in range(32)]
        return CFPOTrainer(
            model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **arguments
        )

    return build


def random_masks(prompts, trainer):
    """Completions of random tokens, of which tools wrote some at random; the log-probs are off the policy's."""
    rng = random.Random(len(prompts))
    prompt_ids = [[2, 3] for _ in prompts]
    completions = [rng.choices(range(2, 12), k=rng.randint(3, 9)) for _ in prompts]
    masks = [[int(rng.random() < 0.6) for _ in ids] for ids in completions]
    for mask in masks:
        mask[0] = 1
    logprobs = [[-2.0] * len(ids) for ids in completions]
    return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": logprobs, "env_mask": masks}


@pytest.mark.parametrize("loss_type", ["bnpo", "grpo"])
def test_no_token_that_a_tool_wrote_counts_in_loss_gradient_or_metrics(agent_trainer, loss_type):
    """In fp64, through the whole trainer, against the paper's objective over the policy's own tokens."""
    trainer = agent_trainer(
        {"num_iterations": 2, "max_steps": 2, "loss_type": loss_type, "learning_rate": 0.05},
        reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in map(text_of, completions)],
        rollout_func=random_masks,
    )
    trainer.model.double()
    checked, original = [], trainer.compute_loss

    def compare(model, inputs, *arguments, **keywords):
        trainer.model.zero_grad()
        loss = original(model, inputs, *arguments, **keywords)
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        length = inputs["completion_ids"].shape[1]
        attended = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        logits = model(input_ids=ids, attention_mask=attended).logits[:, -length - 1 : -1]
        logps = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None])[..., 0]
        old = inputs.get("old_per_token_logps")
        ratio = (logps - (logps.detach() if old is None else old)).exp()
        advantages = inputs["advantages"][:, None]
        objective = ratio * advantages - advantages.abs() * (ratio - 1) ** 2 / (2 * 0.2)
        own = (inputs["completion_mask"] * inputs["tool_mask"]).double()
        assert 0 < own.sum() < inputs["completion_mask"].sum()
        per_completion = (objective * own).sum(1) / own.sum(1)
        expected = -((objective * own).sum() / own.sum() if loss_type == "bnpo" else per_completion.mean())
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)
        reference = torch.autograd.grad(expected, list(model.parameters()))
        size = max(gradient.abs().max() for gradient in reference)
        assert all((mine - other).abs().max() <= 1e-6 * size for mine, other in zip(gradients, reference, strict=True))
        checked.append((((ratio - 1).abs() * own).sum() / own.sum() / 2).item())
        return loss

    trainer.compute_loss = compare
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "cfpo/tv" in entry]
    assert [entry["cfpo/tv"] for entry in logged] == pytest.approx(checked, rel=1e-4, abs=1e-6)
    assert checked[1] > 0.01
    assert logged[0]["tools/turns"] > 1
    assert logged[0]["tools/tokens"] > 1
    assert logged[0]["completions/length_q50"] < 6  # of the policy's own


def make_searcher(tokenizer):
    """A policy that guesses any digit, whatever it was told, and stops at = or when it likes."""
    rng, rows = random.Random(0), []
    model = build_model(tokenizer, hidden_size=32, layers=2)
    for _ in range(400):
        text = "s>"
        for _ in range(rng.randint(1, 4)):
            digit = rng.choice(DIGITS)
            rows.append({"prompt": text, "solution": f"!{digit}"})
            text += f"!{digit}<eos>[{rng.choice('<>')}]"
        rows.append({"prompt": f"{text[:-3]}[=]", "solution": "."})
    warm_start(model, tokenizer, rows, DIGITS, 0.0, steps=120, learning_rate=3e-3)
    return model


@pytest.mark.slow
def test_an_agent_of_several_turns_that_its_environment_rewards(agent_trainer):
    tokenizer = tokenizer_for_calls()
    trainer = agent_trainer(
        {"max_steps": 80, "per_device_train_batch_size": 64, "num_generations": 8, "learning_rate": 2e-3},
        model=make_searcher(tokenizer),
        environment_factory=Search,
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert all(entry["tools/turns"] > 1.5 for entry in log[:3])
    for entry in log:  # each call is a turn, and so is an answer, where there is one
        assert entry["tools/call_frequency"] - 0.1 <= entry["tools/turns"] <= entry["tools/call_frequency"] + 1
    first, last = (sum(entry["rewards/Search/mean"] for entry in part) / 5 for part in (log[:5], log[-5:]))
    assert last > first + 0.05


@pytest.fixture
def recipe(tmp_path):
    def write(**options):
        tokenizer = tokenizer_for_calls()
        build_model(tokenizer, hidden_size=32, layers=2).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        path = tmp_path / "recipe.yaml"
        defaults = {
            "model_name_or_path": str(tmp_path / "model"),
            "dtype": "float32",
            "environment": "test_agents.Search",
            "max_tool_calling_iterations": 3,
            "per_device_train_batch_size": 16,
            "num_generations": 4,
            "max_completion_length": 24,
            "max_steps": 2,
            "num_iterations": 2,
            "logging_steps": 1,
            **CPU,
            "save_strategy": "no",
            "output_dir": str(tmp_path / "out"),
        }
        path.write_text(yaml.safe_dump({k: v for k, v in (defaults | options).items() if v is not None}))
        return ["--config", str(path)]

    return write


def logged(tmp_path):
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry]


def test_a_recipe_without_data_and_rewards(recipe, tmp_path, capsys):
    """The environment makes the prompts, and rewards; the log of completions shows who speaks."""
    grpo.main(recipe(log_completions=True))
    assert "ASSISTANT" in capsys.readouterr().out
    assert "rewards/Search/mean" in logged(tmp_path)[0]
    assert "tools/failure_frequency" in logged(tmp_path)[0]


def test_a_recipe_with_tools_and_data(recipe, tmp_path):
    rows = [{"prompt": letter, "solution": letter} for letter in LETTERS]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    grpo.main(
        recipe(environment=None, tools=["test_agents.add"], dataset_name=str(data), reward_funcs=["exact_match"])
    )
    assert "tools/call_frequency" in logged(tmp_path)[0]


def test_a_recipe_with_a_rollout_function(recipe, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": letter, "solution": "1"}) + "\n" for letter in LETTERS))
    options = {"rollout_func": "test_agents.random_masks", "environment": None, "reward_funcs": ["exact_match"]}
    grpo.main(recipe(dataset_name=str(data), **options))
    assert logged(tmp_path)[0]["tools/turns"] > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"environment": None}, "reward_funcs is empty"),
        ({"environment": "test_agents.Untyped"}, "which is no tool"),
        ({"max_steps": -1}, "max_steps says how long to train"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "Without data there is none to evaluate on"),
        ({"environment": None, "tools": ["test_agents.add"], "reward_funcs": ["exact_match"]}, "No data"),
    ],
)
def test_recipes_that_lack_something(recipe, options, message):
    with pytest.raises(Mistake, match=message):
        grpo.main(recipe(**options))


def test_placeholders_fill_a_batch(tmp_path):
    args = CFPOConfig(str(tmp_path), per_device_train_batch_size=8, steps_per_generation=2, max_steps=1, **CPU)
    assert len(placeholders(args)["train"]) == 16
