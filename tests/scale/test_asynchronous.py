"""AsyncCFPOTrainer with its real rollout process and a real vLLM server, on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from transformers import AutoTokenizer

from conftest import ROOT, environment, free_port, kill, server_url_of, serving, until

SECONDS_TO_STOP = 60  # 30 s of patience, what was in the queue, a checkpoint


@pytest.fixture
def recipe(write_recipe, model, tmp_path):
    """Of a server for TRL's asynchronous trainer, which always applies a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.response_template = {"defaults": {"role": "assistant"}, "fields": {"content": {"close": "<eos>"}}}
    tokenizer.save_pretrained(model)
    return write_recipe(tmp_path, vllm_mode="server", vllm_server_host="127.0.0.1", vllm_server_port=free_port())


def command(recipe, model, output: Path, steps: int) -> list[str]:
    script = Path(__file__).with_name("asynchronous_run.py")
    return [sys.executable, str(script), str(model), server_url_of(recipe), str(output), str(steps)]


def run(arguments: list[str]) -> None:
    result = subprocess.run(arguments, cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=400)
    assert result.returncode == 0, result.stderr[-4000:]


def test_the_reward_rises_from_samples_some_versions_old(recipe, model, tmp_path):
    with serving(recipe, tmp_path / "server.log"):
        run(command(recipe, model, tmp_path / "out", 40))
    found = json.loads((tmp_path / "out" / "run.json").read_text())
    log = [entry for entry in found["log"] if "cfpo/tv" in entry]
    assert len(log) == 40
    assert 0 < max(entry["staleness/max"] for entry in log) <= 4
    dropped = [entry["staleness/dropped"] for entry in log]
    assert sum(dropped) / len(dropped) < 0.05  # paced, not thrown away
    assert max(entry["cfpo/tv"] for entry in log) > 0.01
    rewards = [entry["reward"] for entry in log]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
    assert found["served"] == pytest.approx(found["ours"], abs=1e-4)  # the server answers by the last update's weights


def test_a_server_that_dies_stops_the_training_with_a_checkpoint_and_the_same_command_goes_on(recipe, model, tmp_path):
    output = tmp_path / "out"
    with serving(recipe, tmp_path / "server.log") as server:
        process = subprocess.Popen(
            command(recipe, model, output, 100_000),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        until((output / "checkpoint-10" / "trainer_state.json").exists, 300, process)
        workers = psutil.Process(process.pid).children(recursive=True)
        kill(server)
        _, errors = process.communicate(timeout=SECONDS_TO_STOP)
    assert process.returncode == 1
    assert "RolloutServerError" in errors.splitlines()[-1]
    assert not psutil.wait_procs(workers, timeout=5)[1]
    step = max(int(path.name.removeprefix("checkpoint-")) for path in output.glob("checkpoint-*"))
    state = json.loads((output / f"checkpoint-{step}" / "rollout_state.json").read_text())
    trained = step * 64 // 8
    assert 0 < state["prompt_index"] <= trained  # a resumed run begins with the first prompt that is not trained

    with serving(recipe, tmp_path / "server.log"):
        run(command(recipe, model, output, step + 3))
    log = json.loads((output / "run.json").read_text())["log"]
    assert [entry["step"] for entry in log if "cfpo/tv" in entry] == list(range(1, step + 4))
