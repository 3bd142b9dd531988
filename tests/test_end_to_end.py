"""The documented commands, as processes of their own: launch, evaluate, resume after SIGKILL, stop on SIGTERM."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cfpo_trl.tiny.model import build_model, build_tokenizer
from conftest import LETTERS
from smollm2 import unpack

ROOT = Path(__file__).parent.parent
GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "src/cfpo_trl/grpo.py"]
TRAJECTORY = ("step", "loss", "reward", "grad_norm", "entropy", "cfpo/tv", "cfpo/penalty", "eval_reward")


@pytest.fixture
def recipe(tmp_path):
    """A YAML recipe: a local JSONL dataset, the accuracy and a format reward, evaluation during training."""
    tokenizer = build_tokenizer(LETTERS + "0123456789+=$\\boxed{} ")
    build_model(tokenizer, hidden_size=32, layers=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"question": f"{i}+{j}=", "answer": f"so #### {i + j}"} for i in range(10) for j in range(10)]
    (tmp_path / "data").mkdir()
    for split, part in (("train", rows[::2]), ("test", rows[1::2][:8])):
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
objective: cfpo
model_name_or_path: {tmp_path}/model
dtype: float32
dataset_name: {tmp_path}/data
dataset_prompt_column: question
dataset_solution_column: answer
reward_funcs: [accuracy, repetition_penalty]
reward_weights: [1.0, 0.5]
reward_parameters:
  repetition_penalty: {{ngram_size: 2}}
per_device_train_batch_size: 16
per_device_eval_batch_size: 8
num_generations: 8
max_completion_length: 6
learning_rate: 3.0e-3
num_iterations: 2
max_steps: 8
eval_strategy: steps
eval_steps: 4
save_strategy: steps
save_steps: 4
bf16: false
use_cpu: true
seed: 5
output_dir: {tmp_path}/whole
logging_steps: 1
"""
    )
    return path


def run(recipe: Path, *overrides: str, check: bool = True) -> subprocess.CompletedProcess:
    command = [*LAUNCH, "--config", str(recipe), *overrides]
    return subprocess.run(command, cwd=ROOT, check=check, text=True, capture_output=True)


def trajectory(output: Path) -> list[dict]:
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [{key: entry[key] for key in TRAJECTORY if key in entry} for entry in log if "train_runtime" not in entry]


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_run_goes_on_by_itself_and_equals_an_uninterrupted_one(recipe, tmp_path):
    whole = run(recipe)
    assert "The first prompt, as the model sees it:\n0+0=" in whole.stderr
    for name in (
        "model.safetensors",
        "tokenizer.json",
        "trainer_state.json",
        "train_results.json",
        "eval_results.json",
    ):
        assert (tmp_path / "whole" / name).exists()
    assert "CFPO" in (tmp_path / "whole" / "README.md").read_text()
    assert sum("eval_reward" in entry for entry in trajectory(tmp_path / "whole")) >= 2

    output = ["--output_dir", str(tmp_path / "killed")]
    command = [sys.executable, "src/cfpo_trl/grpo.py", "--config", str(recipe), *output, "--max_steps", "8"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "killed" / "checkpoint-4" / "trainer_state.json", process)
    process.kill()
    process.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    resumed = run(recipe, *output)
    assert "Going on from" in resumed.stderr
    assert trajectory(tmp_path / "killed") == trajectory(tmp_path / "whole")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_resume(recipe, tmp_path, number):
    output = tmp_path / "stopped"
    options = ["--output_dir", str(output), "--max_steps", "100000", "--save_steps", "50000", "--eval_strategy", "no"]
    command = [sys.executable, "src/cfpo_trl/grpo.py", "--config", str(recipe), *options, "--log_completions", "true"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(output / "completions" / "completions_00001.parquet", process)  # it trains
    process.send_signal(number)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "run the same command again" in printed
    (checkpoint,) = output.glob("checkpoint-*")
    step = json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]
    assert f"Stopped at step {step}" in printed


@pytest.mark.slow
def test_two_ranks_with_a_pool_of_workers_each(recipe, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch.append("src/cfpo_trl/grpo.py")
    options = ["--config", str(recipe), "--max_steps", "2", "--eval_strategy", "no"]
    result = subprocess.run([*launch, *options], cwd=ROOT, check=True, text=True, capture_output=True)
    assert "2 processes on cpu" in result.stderr
    log = json.loads((tmp_path / "whole" / "trainer_state.json").read_text())["log_history"]
    assert log[0]["accuracy/timeout"] == log[0]["accuracy/died"] == 0
    assert log[0]["num_tokens"] > 2 * 16 * 4  # the tokens of both ranks


@pytest.mark.slow
def test_lora_saves_an_adapter(recipe, tmp_path):
    options = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "all-linear", "--max_steps", "2"]
    run(recipe, *options, "--eval_strategy", "no")
    assert (tmp_path / "whole" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "whole" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reward_funcs", "acuracy"], "reward_funcs has 'acuracy', which is no reward"),
        (["--dataset_prompt_column", "problem"], "dataset_prompt_column='problem' is not in the dataset"),
        (["--dataset_solution_column", "gold"], "dataset_solution_column='gold' is not in the dataset"),
        (["--num_generations", "7", "--eval_strategy", "no"], r"must be divisible by num_generations \(7\)"),
        (["--dataset_name", "no/such/data"], "dataset_name='no/such/data' is no file or folder here"),
        (["--dataset_train_split", "training"], "dataset_train_split='training' is not in the dataset"),
        (["--loss_type", "sapo"], "loss_type='sapo' has no clip to replace"),
    ],
)
def test_fails_before_training_with_the_message(recipe, options, message):
    from cfpo_trl import grpo

    with pytest.raises(ValueError, match=message):
        grpo.main(["--config", str(recipe), *options])


def test_unknown_key_in_yaml(recipe):
    from cfpo_trl import grpo

    recipe.write_text(recipe.read_text() + "epsilom: 0.1\n")
    with pytest.raises(ValueError, match=r"The recipe has 'epsilom' \(did you mean 'epsilon'\?\), which is no option"):
        grpo.main(["--config", str(recipe)])


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not at ../shared/data/gsm8k")
def test_two_real_steps_of_smollm2_on_gsm8k(tmp_path):
    model = unpack(tmp_path / "smollm2")
    overrides = ["--model_name_or_path", str(model), "--dataset_name", str(GSM8K / "train.jsonl")]
    overrides += ["--bf16", "false", "--use_cpu", "true", "--gradient_checkpointing", "false"]
    overrides += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--num_generations", "4"]
    overrides += ["--max_completion_length", "48", "--max_steps", "2", "--num_iterations", "2", "--warmup_steps", "0"]
    overrides += ["--reward_funcs", "accuracy", "repetition_penalty"]  # so that some advantage is not 0
    overrides += ["--output_dir", str(tmp_path / "out"), "--save_strategy", "no"]
    result = run(ROOT / "recipes" / "SmolLM2-135M-Instruct" / "gsm8k" / "config_cfpo.yaml", *overrides)
    assert "7473 rows to train on" in result.stderr
    assert "<|im_start|>system\nReason step by step" in result.stderr
    first, second = (entry for entry in trajectory(tmp_path / "out") if "loss" in entry)
    assert first["cfpo/tv"] < 1e-6
    assert 0 < second["cfpo/tv"] < 0.1
    assert (tmp_path / "out" / "model.safetensors").exists()
