"""vLLM in the trainer's process, on a CPU: what it samples by is what the trainer trains."""

import json
import subprocess
import sys

import pytest

from conftest import ROOT, environment, generations, steps, train

DIFFERENCE = "sampling/sampling_logp_difference/mean"  # between training and sampling log-probs, over all tokens
MAIN = "import json, sys; from cfpo_trl import grpo; [grpo.main(arguments) for arguments in json.loads(sys.argv[1])]"
NO_SYNC = "from cfpo_trl.rollouts import generation as r; r.ColocatedRollouts.sync_weights = lambda self: None; "


def run(code: str, *runs: list[str]) -> None:
    command = [sys.executable, "-c", code, json.dumps(runs)]
    result = subprocess.run(command, cwd=ROOT, env=environment(), text=True, capture_output=True)
    assert result.returncode == 0, result.stderr[-4000:]


def test_reward_rises_and_log_probs_agree_after_every_sync(recipe, tmp_path):
    train(recipe(max_steps=40))
    log = generations(tmp_path / "run")
    assert len(log) == 20
    assert max(entry[DIFFERENCE] for entry in log) < 1e-4
    assert max(entry["cfpo/tv"] for entry in steps(tmp_path / "run")) > 0.01
    rewards = [entry["reward"] for entry in log]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2


def test_log_probs_disagree_when_the_sync_is_left_out(recipe, tmp_path):
    path = recipe()
    run(NO_SYNC + MAIN, ["--config", str(path)])
    log = generations(tmp_path / "run")
    assert log[0][DIFFERENCE] < 1e-4  # the engine starts from the same checkpoint
    assert log[-1][DIFFERENCE] > 0.01


def test_lora_and_no_correction(recipe, tmp_path):
    path = recipe(learning_rate=1e-2, lora_r=4, lora_dropout=0.0, lora_target_modules="all-linear")
    lora, plain = tmp_path / "lora", tmp_path / "plain"
    run(
        MAIN,
        ["--config", str(path), "--use_peft", "true", "--output_dir", str(lora)],
        ["--config", str(path), "--vllm_importance_sampling_correction", "false", "--output_dir", str(plain)],
    )
    assert (lora / "adapter_model.safetensors").exists()
    assert max(entry[DIFFERENCE] for entry in generations(lora)) < 1e-4
    assert generations(lora)[-1]["cfpo/ratio_min"] == pytest.approx(1, abs=1e-3)
    assert max(entry["cfpo/tv"] for entry in steps(lora)) > 0.01
    assert DIFFERENCE not in generations(plain)[-1]
    assert steps(plain)[1]["cfpo/tv"] > 0.01


def test_two_processes_with_an_engine_each(recipe, tmp_path):
    train(recipe(per_device_train_batch_size=32, max_steps=4), engine="ddp")
    log = generations(tmp_path / "run")
    assert max(entry[DIFFERENCE] for entry in log) < 1e-4
