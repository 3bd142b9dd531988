"""Every recipe loads through the real parser, and the two of a pair differ in the objective alone."""

import inspect
from pathlib import Path

import pytest
import yaml
from trl import TrlParser, get_peft_config

from cfpo_trl.config import check_alignment, check_config
from cfpo_trl.grpo import recipe_parser
from cfpo_trl.reward_training import ARGUMENTS
from cfpo_trl.rewards import load_reward
from cfpo_trl.rewards.model import RewardModel
from cfpo_trl.running.asynchronous import check_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
CONFIGS = sorted(RECIPES.rglob("config_*.yaml"))
PAIRS = sorted(path for path in CONFIGS if path.name.startswith("config_cfpo"))
ON_CPU = ["--bf16", "false", "--use_cpu", "true"]


def name(path: Path) -> str:
    return str(path.relative_to(RECIPES))


def test_there_are_recipes():
    assert len(PAIRS) * 2 == len(CONFIGS) > 20


@pytest.mark.parametrize("path", CONFIGS, ids=name)
def test_loads(path):
    options = ["--config", str(path), *ON_CPU]
    script_args, training_args, model_args, _ = recipe_parser(options).parse_args_and_config(options)
    if script_args.rollouts == "async":
        check_recipe(training_args, model_args, script_args.reward_funcs)
    else:
        check_config(training_args)
        check_alignment(training_args)
    for reward in script_args.reward_funcs:
        parameters = (script_args.reward_parameters or {}).get(reward) or {}
        if "/" in reward:  # a model, which is not here
            inspect.signature(RewardModel).bind(reward, **parameters)
        else:
            load_reward(reward, parameters)
    assert training_args.reward_weights is None or len(training_args.reward_weights) == len(script_args.reward_funcs)
    assert script_args.objective in path.name
    assert training_args.report_to == []
    assert not training_args.push_to_hub
    assert (get_peft_config(model_args) is not None) == ("lora" in path.name)
    assert (script_args.rollouts == "async") == ("async" in path.name)
    if training_args.save_strategy == "steps" and script_args.rollouts == "sync":
        cycle = training_args.num_iterations * training_args.steps_per_generation
        assert training_args.save_steps % (cycle // training_args.gradient_accumulation_steps) == 0


@pytest.mark.parametrize("path", PAIRS, ids=name)
def test_pair_differs_in_the_objective_alone(path):
    cfpo, grpo = (yaml.safe_load(p.read_text()) for p in (path, path.with_name(path.name.replace("cfpo", "grpo"))))
    assert {key for key in cfpo.keys() | grpo.keys() if cfpo.get(key) != grpo.get(key)} == {"objective", "output_dir"}
    assert (cfpo["objective"], grpo["objective"]) == ("cfpo", "grpo")


@pytest.mark.parametrize("path", PAIRS, ids=name)
def test_every_recipe_is_in_the_table(path):
    folder = str(path.parent.relative_to(RECIPES))
    assert any(
        f"`{folder}`" in line and f"`{path.stem.removeprefix('config_cfpo').removeprefix('_') or 'base'}`" in line
        for line in (RECIPES / "README.md").read_text().splitlines()
    )


def test_reward_model_recipe_loads():
    path = RECIPES / "Qwen2.5-1.5B-Instruct" / "reward_model" / "config.yaml"
    parser = TrlParser(ARGUMENTS)
    data_args, training_args, *_ = parser.parse_args_and_config(["--config", str(path), *ON_CPU])
    assert data_args.dataset_name
    assert training_args.report_to == []
    assert not training_args.push_to_hub
    policy = yaml.safe_load((path.parent.parent / "rlhf" / "config_cfpo.yaml").read_text())
    assert policy["reward_funcs"] == [training_args.output_dir]
