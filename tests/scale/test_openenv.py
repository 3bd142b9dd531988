"""An agent in an environment on a real OpenEnv server."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from transformers import AutoTokenizer
from websockets.exceptions import ConnectionClosedError

from cfpo_trl.openenv import OpenEnv
from cfpo_trl.rewards.scores import RewardError
from cfpo_trl.tiny.model import build_model, build_tokenizer
from conftest import ROOT, environment, free_port, launch

CALL = {"type": "function", "function": {"name": "step", "arguments": {"text": "{content}"}}}
TEMPLATE = (
    "{%- for m in messages -%}{%- if m.tool_calls -%}{%- for c in m.tool_calls -%}"
    "{%- if 'text' in c.function.arguments -%}{{ '!' + c.function.arguments.text }}"
    "{%- else -%}{{ c.function.name + c.function.arguments | string }}"
    "{%- endif -%}{%- endfor -%}{{ '<eos>' }}{%- elif m.role == 'assistant' -%}{{ m.content + '<eos>' }}"
    "{%- else -%}{{ m.content }}{%- endif -%}{%- endfor -%}"
)
FIELDS = {
    "tool_calls": {"open": "!", "close": "<eos>", "content": "text", "repeats": True, "transform": CALL},
    "content": {"close": "<eos>", "content": "text"},
}


@pytest.fixture
def server():
    port = free_port()
    script = Path(__file__).with_name("openenv_server.py")
    process = subprocess.Popen([sys.executable, str(script), str(port)], env=environment(), cwd=ROOT)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 60
    while True:
        try:
            if requests.get(f"{url}/health", timeout=2).ok:
                break
        except requests.ConnectionError:
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.2)
    yield url, process
    process.kill()
    process.wait()


def test_an_episode_and_a_server_that_dies(server):
    url, process = server
    rooms = [OpenEnv(url, action="letter", observation="text") for _ in range(2)]
    assert [room.reset(seed=seed) for seed, room in enumerate(rooms)] == ["a", "a"]
    answers = {letter: rooms[0].step(letter) for letter in "abcdefghij" if rooms[0].get_reward() == 0}
    assert list(answers.values()).count("b") == 1
    assert rooms[0].get_reward() == 1.0
    assert rooms[1].get_reward() == 0.0  # a session of its own
    with pytest.raises(ValueError, match="the episode is over"):
        rooms[0].step("a")
    rooms[0].reset(seed=0)
    assert rooms[0].get_reward() == 0.0
    process.kill()
    with pytest.raises(ConnectionClosedError):
        rooms[0].step("a")
    with pytest.raises(RewardError, match=f"The environment at {url} failed"):
        rooms[0].get_reward()
    with pytest.raises(RewardError, match=f"The environment at {url} failed"):
        rooms[1].reset()
    with pytest.raises(ConnectionError):
        OpenEnv(url)


def test_a_recipe_trains_there_and_stops_where_it_dies(server, write_recipe, tmp_path):
    url, process = server
    tokenizer = build_tokenizer("abcdefghij!")
    build_model(tokenizer, hidden_size=32).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = write_recipe(
        tmp_path,
        leave_out=["dataset_name", "use_vllm", "reward_funcs"],
        model_name_or_path=str(tmp_path / "model"),
        environment="cfpo_trl.openenv.OpenEnv",
        environment_parameters={"url": url, "action": "letter", "observation": "text"},
        chat_template=TEMPLATE,
        response_template={"defaults": {"role": "assistant"}, "start_anchor_pattern": "$", "fields": FIELDS},
        max_tool_calling_iterations=2,
        max_completion_length=12,
        per_device_train_batch_size=16,
        num_generations=4,
        max_steps=4,
    )
    done = subprocess.run([*launch(None), "--config", str(recipe)], cwd=ROOT, env=environment(), capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert "rewards/OpenEnv/mean" in log[0]
    assert "tools/turns" in log[0]
    assert AutoTokenizer.from_pretrained(tmp_path / "run").response_template

    more = ["--max_steps", "100000", "--if_output_exists", "restart"]
    running = subprocess.Popen(
        [*launch(None), "--config", str(recipe), *more],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    time.sleep(20)
    assert running.poll() is None
    process.kill()
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 1
    assert f"The environment at {url} failed" in output
    assert list((tmp_path / "run").glob("checkpoint-*"))  # what was trained
