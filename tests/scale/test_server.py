"""A real vLLM server on a CPU, started by the documented script; its weights come over a folder."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cfpo_trl.rollouts.health import health_problem
from cfpo_trl.rollouts.server import wait_for_health
from conftest import ROOT, environment, free_port, generations, kill, launch, serving, steps, train, until

DIFFERENCE = "sampling/sampling_logp_difference/mean"
SECONDS_TO_STOP = 60  # README: 30 s of patience, the last request, a checkpoint


@pytest.fixture(scope="module")
def served(write_recipe, tmp_path_factory):
    """A recipe whose server runs."""
    folder = tmp_path_factory.mktemp("served")
    recipe = write_recipe(folder, vllm_mode="server", vllm_server_host="127.0.0.1", vllm_server_port=free_port())
    with serving(recipe, folder / "server.log"):
        yield recipe


def test_two_processes_learn_and_log_probs_agree_after_every_sync(served, tmp_path):
    output = tmp_path / "run"
    options = ["--output_dir", str(output), "--per_device_train_batch_size", "32", "--max_steps", "40"]
    train(served, *options, engine="ddp")
    log = generations(output)
    assert len(log) == 20
    assert max(entry[DIFFERENCE] for entry in log) < 1e-4
    rewards = [entry["reward"] for entry in log]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2


def test_a_resumed_zero3_run_equals_an_uninterrupted_one(served, tmp_path):
    """All is compared: a seed in every request makes the server's samples a function of prompt and weights."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ["--per_device_train_batch_size", "32", "--max_steps", "8", "--save_strategy", "steps"]
    options += ["--save_steps", "4", "--generation_kwargs", '{"seed": 0}']
    train(served, *options, "--output_dir", str(whole), engine="zero3")

    options += ["--output_dir", str(killed)]
    process = subprocess.Popen(
        [*launch("zero3"), "--config", str(served), *options],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until((killed / "checkpoint-4" / "trainer_state.json").exists, 120, process)
    kill(process)
    shutil.rmtree(killed / "checkpoint-8", ignore_errors=True)
    (killed / "train_results.json").unlink(missing_ok=True)
    assert "Going on from" in train(served, *options, engine="zero3").stderr

    logs = steps(killed), steps(whole)
    assert len(logs[0]) == len(logs[1]) == 8
    for entry, expected in zip(*logs, strict=True):
        for name in expected.keys() - {"step_time"}:
            assert entry[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7), (expected["step"], name)
    weights, expected = (load_file(path / "model.safetensors") for path in (killed, whole))
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-6)


def test_wrong_model(served, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    result, seconds = fail(served, "--model_name_or_path", str(other))
    assert f"serves '{model}', the recipe trains '{other}'" in result.stderr
    assert seconds < 30


def test_too_short_sequences(served):
    result, _ = fail(served, "--max_completion_length", "100")
    assert "holds sequences of 14 tokens (--max-model-len), the recipe needs 108" in result.stderr


def test_no_server(recipe):
    path = recipe(vllm_mode="server", vllm_server_port=free_port(), vllm_server_timeout=2.0)
    result, seconds = fail(path)
    assert "No vLLM server at http://0.0.0.0:" in result.stderr
    assert "cfpo serve --config" in result.stderr
    assert seconds < 30


def fail(recipe, *options: str) -> tuple[subprocess.CompletedProcess, float]:
    start = time.monotonic()
    result = train(recipe, *options, check=False)
    assert result.returncode == 1
    assert "Loading weights" not in result.stderr
    return result, time.monotonic() - start


def test_no_development_endpoints(recipe, tmp_path):
    """A server that someone started by hand, without what the exchange of weights needs."""
    port = free_port()
    path = recipe(vllm_mode="server", vllm_server_host="127.0.0.1", vllm_server_port=port)
    model = yaml.safe_load(path.read_text())["model_name_or_path"]
    flags = ["--model", model, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags],
            env=environment(VLLM_CPU_KVCACHE_SPACE="1"),
            stdout=log,
            stderr=log,
        )
    try:
        wait_for_health(f"http://127.0.0.1:{port}", 240)
        result, seconds = fail(path)
    finally:
        kill(server)
    assert "VLLM_SERVER_DEV_MODE=1 in its environment" in result.stderr
    assert seconds < 30


def test_launch_script_starts_and_stops_the_server(recipe, tmp_path):
    port = free_port()
    path = recipe(vllm_server_port=port, per_device_train_batch_size=32, max_steps=2)
    binaries = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(
        ["scripts/launch/train.sh", str(path)],
        cwd=ROOT,
        env=environment(ENGINE="cpu/ddp", GPUS="0", SERVER_GPUS="1", PATH=binaries),
        text=True,
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert generations(tmp_path / "run")[0][DIFFERENCE] < 1e-4
    assert health_problem(f"http://127.0.0.1:{port}")  # gone


def test_slow_to_start_then_killed_then_back(recipe, tmp_path):
    """The trainer waits for the server, stops with a checkpoint when it dies, and goes on when it is back."""
    path = recipe(
        vllm_mode="server",
        vllm_server_host="127.0.0.1",
        vllm_server_port=free_port(),
        vllm_server_timeout=240.0,
        per_device_train_batch_size=32,
        max_steps=100_000,
    )
    output = tmp_path / "run"
    with serving(path, tmp_path / "server.log", seconds=0) as server:
        trainer = subprocess.Popen(
            [*launch("ddp"), "--config", str(path), "--log_completions", "true"],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        until(lambda: len(list((output / "completions").glob("*"))) > 1, 300, trainer)  # it trains
        kill(server)
        start = time.monotonic()
        printed, errors = trainer.communicate(timeout=SECONDS_TO_STOP)
    assert "Waiting for the vLLM server at http://127.0.0.1:" in errors
    assert trainer.returncode == 1
    assert "is gone (30 s)" in printed
    (checkpoint,) = output.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert f"Stopped at step {step}" in printed
    print(f"stopped {time.monotonic() - start:.0f} s after the server's death, at step {step}")

    with serving(path, tmp_path / "server.log"):
        train(path, "--max_steps", str(step + 2), "--if_output_exists", "continue", engine="ddp")
    assert [entry["step"] for entry in steps(output)][-1] == step + 2
    assert generations(output)[-1][DIFFERENCE] < 1e-4
