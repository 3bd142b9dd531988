"""The training script: objectives, overrides, and what it says of mistakes."""

import json
import logging
import re
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cfpo_trl import CFPOConfig, grpo
from cfpo_trl.mistakes import Mistake
from cfpo_trl.running.recipe import RecipeParser
from cfpo_trl.tiny.model import build_model, build_tokenizer
from conftest import LETTERS


@pytest.fixture
def recipe(tmp_path):
    """A recipe for two steps on a tiny model, in a folder of its own."""
    tokenizer = build_tokenizer(LETTERS)
    build_model(tokenizer, hidden_size=32, layers=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows = [{"prompt": letter, "solution": letter} for letter in LETTERS]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
model_name_or_path: {tmp_path}/model
dtype: float32
dataset_name: {tmp_path}/data
reward_funcs: [exact_match]
per_device_train_batch_size: 16
num_generations: 8
max_completion_length: 3
learning_rate: 1.0e-2
num_iterations: 2
max_steps: 4
bf16: false
use_cpu: true
output_dir: {tmp_path}/cfpo
logging_steps: 1
save_strategy: "no"
"""
    )
    return path


def test_one_recipe_trains_both_objectives(recipe, tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    grpo.main(["--config", str(recipe)])
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    grpo.main(["--config", str(recipe), "--objective", "grpo", "--output_dir", str(tmp_path / "grpo")])
    logs = {
        name: json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        for name in ("cfpo", "grpo")
    }
    assert logs["cfpo"][0]["loss"] == logs["grpo"][0]["loss"]
    assert "cfpo/tv" in logs["cfpo"][1]
    assert "cfpo/tv" not in logs["grpo"][1]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("cfpo", "grpo")]
    assert weights[0].keys() == weights[1].keys()
    card = (tmp_path / "cfpo" / "README.md").read_text()
    assert "# Model Card for cfpo" in card
    assert "cagatan2026clipping" in card
    assert str(tmp_path) not in card


MISTAKES = [
    (["--loss_type", "sapo"], "loss_type='sapo' has no clip to replace"),
    (["--reward_funcs", "bleu"], "reward_funcs has 'bleu', which is no reward: use some of accuracy"),
    (["--objective", "ppo"], "argument --objective.*: invalid choice: 'ppo'"),
    (["--learning_rat", "3"], "--learning_rat is no option .did you mean '--learning_rate'"),
    (["--num_iteration", "3"], "--num_iteration is no option .did you mean '--num_iterations'"),
    (["--learning_rate", "fast"], "argument --learning_rate.*: invalid float value: 'fast'"),
    (["recipe.yaml"], "'recipe.yaml' belongs to no option; a recipe is given by --config recipe.yaml"),
    (
        ["--num_generations", "7"],
        r"per_device_train_batch_size × processes × steps_per_generation \(here 16\) must be",
    ),
    (["--model_name_or_path", ""], "No model: give model_name_or_path"),
    (["--model_name_or_path", "{folder}/modle"], "there is no such folder .did you mean '.*/model'"),
    (["--model_name_or_path", "{folder}/data"], "is a folder without a model's config.json"),
    (["--dataset_prompt_column", "promt"], "'promt' is not in the dataset .did you mean 'prompt'"),
    (["--reward_parameters", "{cosine: 1}"], "reward_parameters='{cosine: 1}' is no mapping .Expecting property name"),
    (["--benchmarks", "[1]"], "benchmarks='.1.' is no mapping; on the command line it is written as JSON"),
    (["--if_output_exists", "overwrite"], "argument --if_output_exists.*: invalid choice: 'overwrite'"),
    (["--reward_funcs", "os.pathh"], "reward_funcs has 'os.pathh', and os has no 'pathh' .did you mean 'path'"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(row[0])[:40] for row in MISTAKES])
def test_mistakes_before_any_model_is_loaded(recipe, tmp_path, arguments, message):
    arguments = [argument.replace("{folder}", str(tmp_path)) for argument in arguments]
    with pytest.raises(ValueError, match=message):
        grpo.main(["--config", str(recipe), *arguments])
    assert not (tmp_path / "cfpo").exists()


def test_a_recipe_that_is_not_there(recipe):
    with pytest.raises(ValueError, match=r"recipe.yml: there is no such file .did you mean '.*/recipe.yaml'"):
        grpo.main([f"--config={recipe.with_suffix('.yml')}"])
    with pytest.raises(ValueError, match="--config names no file; give a path, or the name of a recipe"):
        grpo.main(["--objective", "cfpo", "--config"])


def test_a_recipe_that_is_no_yaml(recipe):
    recipe.write_text("epsilon: [0.1\nseed: 3\n")
    with pytest.raises(Mistake, match="The recipe is no YAML: while parsing a flow sequence"):
        grpo.main(["--config", str(recipe)])


def test_unknown_objective_in_yaml(recipe):
    recipe.write_text(recipe.read_text() + "objective: ppo\n")
    with pytest.raises(ValueError, match="objective='ppo' is unknown; use one of cfpo, grpo"):
        grpo.main(["--config", str(recipe)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_steps: 1.5", "max_steps=1.5 is a number, and it takes a whole number"),
        ("learning_rate: [1.0e-6]", "learning_rate=[1e-06] is a list, and it takes a number"),
        ("learning_rate: null", "learning_rate=None is nothing, and it takes a number"),
        ("dataset_name: {a: b}", "dataset_name={'a': 'b'} is a mapping, and it takes a text or nothing"),
        ("run_name: 7", "run_name=7 is a whole number, and it takes a text or nothing"),
        ("reward_funcs: [7]", "reward_funcs=[7] is a list, and it takes list[str]"),
        ("bf16: 3", "bf16=3 is a whole number, and it takes true or false or nothing"),
        ("log_level: loud", "log_level='loud' is unknown; use one of detail, debug, info"),
        ("parallelism_config: {}", "parallelism_config={} is a mapping, and it takes "),
        ("loss_type: [grpo]", "loss_type=['grpo'] is a list, and it takes a text"),
    ],
)
def test_values_that_an_option_does_not_take(recipe, line, message):
    recipe.write_text(f"{recipe.read_text()}\n{line}\n")
    with pytest.raises(Mistake, match=re.escape(message)):
        grpo.main(["--config", str(recipe)])


def test_values_that_fit(recipe):
    more = (
        "learning_rate: 1\nmax_grad_norm: 1e0\nuse_liger_kernel: 'false'\ndatasets: [{path: a}]\nepsilon_high: null\n"
    )
    recipe.write_text(recipe.read_text().replace("learning_rate: 1.0e-2", "") + more)
    (_, training_args, _, mixture), _ = parse(recipe)
    assert (training_args.learning_rate, training_args.use_liger_kernel) == (1, False)
    assert [dataset.path for dataset in mixture.datasets] == ["a"]


def test_true_and_false_where_trl_takes_them_beside_a_text(recipe):
    recipe.write_text(recipe.read_text() + "resume_from_checkpoint: true\nscale_rewards: false\n")
    (_, training_args, *_), _ = parse(recipe)
    assert training_args.scale_rewards == "none"
    with pytest.raises(ValueError, match="resume_from_checkpoint=True, and there is no checkpoint in"):
        grpo.main(["--config", str(recipe)])


def parse(recipe, *arguments):
    parser = RecipeParser(grpo.ARGUMENTS)
    return parser.parse_args_and_config(["--config", str(recipe), *arguments]), parser


def test_numbers_that_yaml_reads_as_texts(recipe):
    more = "reward_weights: [1e-1]\nepsilon_high: 3E-1\nreward_parameters: {exact_match: {x: [1e3]}}\nseed: 3\n"
    recipe.write_text(recipe.read_text().replace("1.0e-2", "1e-2") + more)
    (script_args, training_args, *_), parser = parse(recipe)
    assert (training_args.learning_rate, training_args.epsilon_high) == (0.01, 0.3)
    assert training_args.reward_weights == [0.1]
    assert script_args.reward_parameters == {"exact_match": {"x": [1000.0]}}
    assert parser.given["learning_rate"] == 0.01
    assert "epsilon" not in parser.given


def test_without_a_gpu_bf16_is_off_by_itself(recipe, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    text = recipe.read_text()
    recipe.write_text(text.replace("bf16: false\nuse_cpu: true", "bf16: true"))
    (_, training_args, *_), parser = parse(recipe)
    assert not training_args.bf16
    assert parser.notes == ["There is no GPU here: bf16 is off. (With `use_cpu: true` it is as the recipe says.)"]
    recipe.write_text(text.replace("bf16: false", "bf16: true"))
    (_, training_args, *_), parser = parse(recipe)
    assert training_args.bf16
    assert parser.notes == []


def test_help_begins_with_our_own_options(capsys):
    with pytest.raises(SystemExit):
        RecipeParser(grpo.ARGUMENTS).parse_args_and_config(["--help"])
    text = capsys.readouterr().out
    assert text.splitlines()[0].endswith("--config RECIPE [--option value ...]")
    own, _, others = text.partition("options of TRL and transformers:")
    for option in ("--objective", "--reward_funcs", "--if_output_exists", "--penalty_slope", "--system_prompt"):
        assert option in own
    for option in ("--learning_rate", "--gradient_checkpointing", "--lora_r"):
        assert option in others
    assert len(own.splitlines()) < 150


def test_says_that_cfpo_is_grpo_where_it_is(recipe, tmp_path, caplog):
    grpo.main(["--config", str(recipe), "--num_iterations", "1", "--max_steps", "1"])
    assert caplog.text.count("all ratios are 1, and CFPO is GRPO") == 1
    caplog.clear()
    grpo.main(["--config", str(recipe), "--output_dir", str(tmp_path / "two"), "--max_steps", "1"])
    assert "CFPO is GRPO" not in caplog.text


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's own in the working directory."""

    def write(code: str) -> None:
        (tmp_path / "own_rewards.py").write_text(code)
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        sys.modules.pop("own_rewards", None)

    yield write
    sys.modules.pop("own_rewards", None)


def test_a_reward_of_one_s_own_reads_the_columns_by_their_own_names(recipe, tmp_path, module):
    rows = [{"question": letter, "answer": letter, "hint": "x"} for letter in LETTERS]
    (tmp_path / "data" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module(
        "def mine(completions, answer, hint, solution, **kwargs):\n"
        "    assert answer == solution and set(hint) == {'x'}\n"
        "    return [float(a in c) for a, c in zip(answer, completions)]\n"
    )
    columns = ["--dataset_prompt_column", "question", "--dataset_solution_column", "answer"]
    grpo.main(["--config", str(recipe), *columns, "--reward_funcs", "own_rewards.mine", "exact_match"])
    log = json.loads((tmp_path / "cfpo" / "trainer_state.json").read_text())["log_history"]
    assert {"rewards/mine/mean", "rewards/exact_match_reward/mean"} <= log[0].keys()


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("completions, prompt, **kwargs", "'own_rewards.mine', which asks for 'prompt' .did you mean 'prompts'"),
        ("completions, solutoin, **kwargs", "'own_rewards.mine', which asks for 'solutoin' .did you mean 'solution'"),
        ("completions, solution", "'own_rewards.mine', which takes no .*kwargs for what it does not use"),
    ],
)
def test_a_reward_that_cannot_be_called_is_refused_at_the_start(recipe, tmp_path, module, signature, message):
    module(f"def mine({signature}):\n    return [1.0 for completion in completions]\n")
    with pytest.raises(ValueError, match=message):
        grpo.main(["--config", str(recipe), "--reward_funcs", "own_rewards.mine"])
    assert not (tmp_path / "cfpo").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[1.0]", "Reward own_rewards.mine returned 1 rewards for 16 completions"),
        ("None", "Reward own_rewards.mine returned None; it must return a list with a number for each completion"),
        ("'1' * len(completions)", "Reward own_rewards.mine returned '1111"),
        ("['good'] * len(completions)", "Reward own_rewards.mine returned .'good', .*; it must return a list"),
        ("[float('nan')] * len(completions)", "Reward own_rewards.mine returned nan; where a reward does not apply"),
        ("[completions[99]]", "Reward own_rewards.mine raised IndexError: list index out of range"),
    ],
)
def test_a_reward_that_returns_something_else_is_named(recipe, module, capsys, value, message):
    module(f"def mine(completions, **kwargs):\n    return {value}\n")
    with pytest.raises(SystemExit) as exit:
        grpo.main(["--config", str(recipe), "--reward_funcs", "own_rewards.mine"])
    assert exit.value.code == 1
    assert message.split(".'")[0] in capsys.readouterr().out


def test_one_reward_may_be_a_text(recipe, tmp_path):
    recipe.write_text(recipe.read_text().replace("[exact_match]", "exact_match"))
    (script_args, *_), _ = parse(recipe)
    assert script_args.reward_funcs == ["exact_match"]


def test_the_configuration_s_own_options_are_documented():
    """Every option that CFPOConfig adds or changes is in its docstring."""
    for name in CFPOConfig.__annotations__:
        assert f"{name} (`" in CFPOConfig.__doc__


def test_the_tied_head_is_not_missed_at_a_resume(recipe, tmp_path, caplog):
    options = ["--save_strategy", "steps", "--save_steps", "2"]
    grpo.main(["--config", str(recipe), *options])
    (tmp_path / "cfpo" / "train_results.json").unlink()
    for name in ("checkpoint-4", "model.safetensors"):
        path = tmp_path / "cfpo" / name
        path.rename(tmp_path / name)
    logging.getLogger("transformers").propagate = True
    grpo.main(["--config", str(recipe), *options])
    assert "Going on from" in caplog.text
    assert "missing keys" not in caplog.text
    assert yaml.safe_load((tmp_path / "cfpo" / "resolved_recipe.yaml").read_text())["max_steps"] == 4


@pytest.mark.parametrize(
    ("iterations", "per_generation", "accumulation", "steps"),
    [(1, 1, 1, 1), (1, 4, 4, 1), (2, 8, 2, 8), (1, 6, 4, 3), (1, 3, 2, 3), (1, 2, 4, 1), (1, 2, 3, 2)],
)
def test_steps_behind_which_a_run_goes_on_exactly(iterations, per_generation, accumulation, steps):
    args = SimpleNamespace(
        num_iterations=iterations, steps_per_generation=per_generation, gradient_accumulation_steps=accumulation
    )
    assert grpo.steps_per_rollout(args) == steps
