"""AsyncCFPOTrainer with its real rollout process and a real vLLM server, on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from conftest import ROOT, environment, free_port, server_url_of, serving


@pytest.fixture(scope="module")
def served(write_recipe, model, tmp_path_factory):
    """A recipe whose server runs; TRL's asynchronous trainer always applies a chat template."""
    folder = tmp_path_factory.mktemp("asynchronous")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.response_template = {"defaults": {"role": "assistant"}, "fields": {"content": {"close": "<eos>"}}}
    tokenizer.save_pretrained(model)
    recipe = write_recipe(folder, vllm_mode="server", vllm_server_host="127.0.0.1", vllm_server_port=free_port())
    with serving(recipe, folder / "server.log"):
        yield recipe


def test_the_reward_rises_from_samples_some_versions_old(served, model, tmp_path):
    script = Path(__file__).with_name("asynchronous_run.py")
    command = [sys.executable, str(script), str(model), server_url_of(served), str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=400)
    assert result.returncode == 0, result.stderr[-4000:]
    run = json.loads((tmp_path / "run.json").read_text())
    log = [entry for entry in run["log"] if "cfpo/tv" in entry]
    assert len(log) == 40
    assert 0 < max(entry["staleness/max"] for entry in log) <= 4
    dropped = [entry["staleness/dropped"] for entry in log]
    assert sum(dropped) / len(dropped) < 0.05  # paced, not thrown away
    assert max(entry["cfpo/tv"] for entry in log) > 0.01
    rewards = [entry["reward"] for entry in log]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
    assert run["served"] == pytest.approx(run["ours"], abs=1e-4)  # the server answers by the last update's weights
