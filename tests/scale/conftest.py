"""A tiny model, a recipe that rolls out with vLLM, and processes that run it as a user would."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import pytest
import yaml

from cfpo_trl.rollouts import serving as vllm_serving
from cfpo_trl.tiny.model import build_model, build_tokenizer
from equivalence_run import LETTERS

ROOT = Path(__file__).parent.parent.parent
CONFIGS = ROOT / "recipes" / "accelerate_configs"


def environment(**extra: str) -> dict[str, str]:
    """One thread a process, so that several share two cores; rewards are imported from this folder."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}/tests/scale:{ROOT}/scripts",
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "MASTER_PORT": str(free_port()),  # of a colocated engine
        **extra,
    }


def accelerate(engine: str) -> list[str]:
    """Arguments of Python that launch by the CPU twin of a configuration, on a port that no other test uses."""
    config = ["--config_file", str(CONFIGS / "cpu" / f"{engine}.yaml")]
    return ["-m", "accelerate.commands.launch", *config, "--main_process_port", "0"]


def launch(engine: str | None) -> list[str]:
    """The documented command without its recipe: plain Python, or Accelerate with the CPU twin of a configuration."""
    start = [sys.executable]
    if engine:
        start += accelerate(engine)
    return [*start, "src/cfpo_trl/grpo.py"]


def train(recipe: Path, *overrides: str, engine: str | None = None, check: bool = True) -> subprocess.CompletedProcess:
    command = [*launch(engine), "--config", str(recipe), *overrides]
    result = subprocess.run(command, cwd=ROOT, env=environment(), text=True, capture_output=True)
    assert result.returncode == 0 or not check, result.stderr[-4000:]
    return result


def serving(recipe: Path, log: Path, seconds: float = 240) -> AbstractContextManager[subprocess.Popen]:
    """The server that `cfpo serve` starts from a recipe; ends with the block, or when a test kills it."""
    return vllm_serving.serving(recipe, log, environment(), seconds)


def server_url_of(recipe: Path) -> str:
    options = yaml.safe_load(recipe.read_text())
    return f"http://{options['vllm_server_host']}:{options['vllm_server_port']}"


def kill(process: subprocess.Popen) -> None:
    """Kills the process and all that it started, whatever groups they are in."""
    if process.poll() is None:
        root = psutil.Process(process.pid)
        for member in [root, *root.children(recursive=True)]:
            member.kill()
    process.wait()


def until(condition, seconds: float, process: subprocess.Popen) -> None:
    """Waits for a condition while the process lives."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def steps(output: Path) -> list[dict]:
    """What was logged at each step."""
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry]


def generations(output: Path) -> list[dict]:
    """What was logged at the steps that began with new rollouts."""
    return [entry for entry in steps(output) if "reward" in entry]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer(LETTERS)
    build_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def write_recipe(model, tmp_path_factory):
    """Writes a recipe with a dense reward into a folder: `write_recipe(folder, vllm_mode="colocate")`.

    `leave_out` names options that it is not to have.
    """
    prompts = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    rows = [{"prompt": first + second, "solution": "-"} for first in LETTERS for second in LETTERS]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(folder: Path, leave_out=(), **options) -> Path:
        options = {
            "model_name_or_path": str(model),
            "dtype": "float32",
            "dataset_name": str(prompts),
            "max_prompt_length": 8,
            "reward_funcs": ["equivalence_run.share_of_vowels"],
            "per_device_train_batch_size": 64,
            "num_generations": 8,
            "max_completion_length": 6,
            "num_iterations": 2,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "max_steps": 8,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_vllm": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": True,
            "seed": 3,
            "output_dir": str(folder / "run"),
            **options,
        }
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in options.items() if name not in leave_out}))
        return path

    return write


@pytest.fixture
def recipe(write_recipe, tmp_path):
    return lambda **options: write_recipe(tmp_path, **options)
