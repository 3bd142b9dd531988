"""Signals to the documented launches: nothing is lost, nothing goes on as an orphan; and how their mistakes end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cfpo_trl.tiny.model import build_model, build_tokenizer
from conftest import LETTERS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SCRIPT = "src/cfpo_trl/grpo.py"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
ONE = [*LAUNCH, "--cpu", SCRIPT]
FREE_PORT = ["--main_process_port", "0"]  # several tests launch at a time
TWO = [*LAUNCH, "--config_file", "recipes/accelerate_configs/cpu/ddp.yaml", *FREE_PORT, SCRIPT]
REWARD = """
import pathlib, time
def slow(completions, **kwargs):
    pathlib.Path({started!r}).touch()
    time.sleep({seconds})
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def recipe(tmp_path):
    """A recipe whose reward says that it trains, and takes its time."""
    tokenizer = build_tokenizer(LETTERS)
    build_model(tokenizer, hidden_size=32, layers=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("".join(f'{{"prompt": "{letter}"}}\n' for letter in LETTERS))

    def write(seconds: float) -> Path:
        (tmp_path / "slow_rewards.py").write_text(REWARD.format(started=str(tmp_path / "started"), seconds=seconds))
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"""
model_name_or_path: {tmp_path}/model
dtype: float32
dataset_name: {tmp_path}/data
reward_funcs: [slow_rewards.slow]
per_device_train_batch_size: 8
num_generations: 8
max_completion_length: 3
max_steps: 10000
bf16: false
use_cpu: true
disable_tqdm: true
output_dir: {tmp_path}/out
save_steps: 10000
"""
        )
        return path

    return write


def start(command: list[str], recipe: Path, folder: Path, **environment: str) -> subprocess.Popen:
    """Starts the launch as the leader of a process group, and returns when it trains."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        [*command, *([] if command[-1] == str(recipe) else ["--config", str(recipe)])],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(folder), "PATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (folder / "started").exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1.0)  # all of its processes train
    return process


def end(process: subprocess.Popen, folder: Path) -> tuple[str, int]:
    """What it printed, and the step of the checkpoint that it left; no process of it is left."""
    output, _ = process.communicate(timeout=120)  # ends when the last process that could print has ended
    alive = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or ())]
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE], output
    (checkpoint,) = (folder / "out").glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return output, state["global_step"]


@pytest.mark.parametrize("command", [ONE, TWO], ids=["one", "two"])
@pytest.mark.parametrize("whole_group", [False, True], ids=["launcher", "group"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_or_to_all_saves_once_and_leaves_no_orphan(
    recipe, tmp_path, command, whole_group, number
):
    process = start(command, recipe(0.2), tmp_path)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    output, step = end(process, tmp_path)
    assert f"Stopped at step {step}; saved in" in output
    assert process.returncode != 0


def test_a_launcher_that_is_killed_does_not_leave_its_process_training(recipe, tmp_path):
    process = start(ONE, recipe(0.2), tmp_path)
    process.kill()
    output, step = end(process, tmp_path)
    assert f"Stopped at step {step}" in output


@pytest.mark.parametrize("engine", ["cpu/ddp"])
def test_train_sh_passes_a_signal_on_and_waits_for_a_step_longer_than_torch_s_launcher_does(recipe, tmp_path, engine):
    path = recipe(36.0)
    process = start(["scripts/launch/train.sh", str(path)], path, tmp_path, ENGINE=engine, GPUS="0")
    began = time.monotonic()
    process.terminate()
    output, step = end(process, tmp_path)
    assert f"Stopped at step {step}" in output
    assert time.monotonic() - began > 30
    assert process.returncode != 0


def run(command: list[str], *options: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, **kwargs)


@pytest.mark.parametrize(
    "command", [[sys.executable, SCRIPT], [*LAUNCH, "--cpu", "--quiet", SCRIPT]], ids=["py", "acc"]
)
def test_the_last_thing_said_of_a_mistake_is_one_line(recipe, command):
    path = recipe(0.0)
    for options, message in (
        (
            ["--learning_rat", "3"],
            "error: --learning_rat is no option (did you mean '--learning_rate'?); --help lists",
        ),
        (
            ["--reward_funcs", "acuracy"],
            "error: reward_funcs has 'acuracy', which is no reward (did you mean 'accuracy'",
        ),
    ):
        result = run(command, "--config", str(path), *options, cwd=ROOT)
        assert result.returncode == 1
        assert result.stderr.splitlines()[-1].startswith(message)
        assert "Traceback" not in result.stderr


def test_modules_of_the_user_are_not_shadowed_by_ours(recipe, tmp_path):
    """The script is run by its path, and its folder has a data.py, a config.py and a rewards/, too."""
    path = recipe(0.0)
    (tmp_path / "rewards.py").write_text("import data, config\ndef mine(completions, **kwargs):\n" + " " * 4)
    with (tmp_path / "rewards.py").open("a") as file:
        file.write("return [data.SCORE + config.MORE for completion in completions]\n")
    (tmp_path / "data.py").write_text("SCORE = 1.0\n")
    (tmp_path / "config.py").write_text("MORE = 0.5\n")
    (tmp_path / "data").rename(tmp_path / "rows")
    options = ["--config", str(path), "--reward_funcs", "rewards.mine", "--max_steps", "1"]
    options += ["--dataset_name", str(tmp_path / "rows")]
    result = run([sys.executable, str(ROOT / SCRIPT)], *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["log_history"][0]["reward"] == 1.5
