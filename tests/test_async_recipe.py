"""What a recipe with `rollouts: async` takes and refuses, before any model is loaded."""

import json
import pickle
from types import SimpleNamespace

import pytest
import yaml
from datasets import Dataset

from cfpo_trl import AsyncCFPOConfig, grpo
from cfpo_trl.asynchronous import check_asynchronous
from cfpo_trl.mistakes import Mistake
from cfpo_trl.rewards import load_reward
from cfpo_trl.rollouts.server import serve_command
from cfpo_trl.running.asynchronous import check_conversations, that_pickle
from cfpo_trl.running.loading import check_response_template
from cfpo_trl.running.recipe import given_option
from cfpo_trl.tiny.model import build_tokenizer
from conftest import CPU, LETTERS

RECIPE = {
    "rollouts": "async",
    "model_name_or_path": "someone/model",
    "dataset_name": "reasoning_gym:chain_sum",
    "reward_funcs": ["accuracy", "format"],
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
}


@pytest.fixture
def recipe(tmp_path):
    def write(**options):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(RECIPE | {"output_dir": str(tmp_path / "out")} | options))
        return ["--config", str(path)]

    return write


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollouts": "often"}, "rollouts='often' is unknown; use one of sync, async"),
        ({"num_iterations": 2}, "'num_iterations'.* is no option with rollouts: async"),
        ({"loss_type": "dapo"}, "'loss_type'.* is no option with rollouts: async"),
        ({"use_vllm": False}, "needs a vLLM server, and the recipe has use_vllm: False"),
        ({"vllm_mode": "colocate"}, "vllm_mode: colocate; use true and server"),
        ({"max_staleness": 1}, "max_staleness=1 cannot hold"),
        ({"epsilon": 0}, "epsilon=0.* is no trust-region width"),
        ({"eval_strategy": "steps", "eval_steps": 5}, "eval_strategy='steps': .* does not evaluate; use 'no'"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type='cosine' needs max_steps"),
        ({"reward_weights": [1.0]}, "reward_weights has 1 numbers for 2 rewards"),
        ({"reward_weights": [1.0, 0.0]}, r"reward_weights=\[1.0, 0.0\] has a 0"),
        ({"reward_funcs": ["someone/reward-model"]}, "a reward model, and the rollout process sees no GPU; serve it"),
        ({"load_in_4bit": True}, "Quantized weights cannot be sent"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(recipe, options, message):
    with pytest.raises(Mistake, match=message):
        grpo.main(recipe(**options))


def test_zero3_is_refused(tmp_path):
    args = AsyncCFPOConfig(str(tmp_path), **CPU)
    args.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    with pytest.raises(ValueError, match="ZeRO-3 shards them, too; use FSDP2, DDP or ZeRO-2"):
        check_asynchronous(args)
    args.deepspeed_plugin.zero_stage = 2
    check_asynchronous(args)


def parse(arguments):
    return grpo.recipe_parser(arguments).parse_args_and_config(arguments)


def test_the_server_is_described_as_in_a_synchronous_recipe(recipe):
    arguments = recipe(vllm_server_host="node7", vllm_server_port=8123, max_prompt_length=100, dtype="bfloat16")
    script_args, args, model_args, _ = parse([*arguments, "--vllm_mode", "server", "--use_vllm", "true"])
    assert args.vllm_server_base_url == "http://node7:8123"
    command = serve_command(args, model_args, script_args.max_prompt_length)
    for flag, value in (("port", "8123"), ("host", "node7"), ("max-model-len", "2148"), ("dtype", "bfloat16")):
        assert command[command.index(f"--{flag}") + 1] == value
    _, args, *_ = parse([*arguments, "--vllm_server_base_url", "http://other:1/"])
    assert args.vllm_server_base_url == "http://other:1"


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        ([], "async"),
        (["--rollouts", "sync"], "sync"),
        (["--rollouts=sync"], "sync"),
        (["--epsilon", "0.1"], "async"),
    ],
)
def test_the_command_line_decides_before_the_recipe(recipe, arguments, value):
    assert given_option([*recipe(), *arguments], "rollouts") == value


def test_prompts_that_are_no_conversations_are_refused():
    with pytest.raises(ValueError, match="rollouts: async needs conversations"):
        check_conversations(Dataset.from_list([{"prompt": "a"}]), build_tokenizer(LETTERS))


def test_completions_must_be_readable_as_messages():
    tokenizer = build_tokenizer(LETTERS)
    tokenizer.chat_template = "{{ messages[0].content }}"
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "a"}]}])
    with pytest.raises(ValueError, match="give response_template, or a chat_template that TRL knows"):
        check_conversations(data, tokenizer)
    tokenizer.response_template = {"defaults": {"role": "assistant"}}
    check_conversations(data, tokenizer)


def test_a_response_template_that_transformers_cannot_read_is_refused():
    """TRL would fall back to the plain text, and no call would be one."""
    with pytest.raises(Mistake, match="response_template: .*must define 'start_anchor'"):
        check_response_template({"defaults": {"role": "assistant"}, "fields": {"content": {"close": "<eos>"}}})
    check_response_template({"start_anchor": ">", "fields": {"content": {"close": "<eos>"}}})


def test_a_response_template_is_a_mapping(recipe):
    with pytest.raises(Mistake, match="response_template='<eos>' is no mapping"):
        grpo.main(recipe(response_template="<eos>"))
    script_args, *_ = parse([*recipe(), "--response_template", json.dumps({"defaults": {"role": "assistant"}})])
    assert "assistant" in str(script_args.response_template)


async def awaited(completions, **kwargs):
    return [1.0 for _ in completions]


def test_rewards_go_to_the_rollout_process_by_name():
    names = ["format", "tests.awaited"]
    parameters = {"format": {"think_opened": True}}
    rewards = [load_reward("format", parameters["format"]), awaited]
    with pytest.raises(AttributeError):  # a closure
        pickle.dumps(rewards[0])
    given, coroutine = that_pickle(names, parameters, rewards)
    assert coroutine is awaited
    given = pickle.loads(pickle.dumps(given))
    assert given.__name__ == "format_reward"
    assert given(completions=["x</think><answer>1</answer>", "x"]) == [1.0, 0.0]
