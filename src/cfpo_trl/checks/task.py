"""The task of the checks: three digits backward, by a tiny model that half knows it; recipes and runs of it."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from ..tiny.model import build_model, build_tokenizer
from ..tiny.warm_start import warm_start, write_splits

if TYPE_CHECKING:
    from trl import GRPOTrainer

LETTERS = "0123456789"
RECIPE = {
    "objective": "cfpo",
    "dtype": "float32",
    "bf16": False,
    "gradient_checkpointing": False,
    "reward_funcs": ["exact_match"],
    "per_device_train_batch_size": 128,
    "num_generations": 8,
    "num_iterations": 2,
    "max_completion_length": 5,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "constant",
    "max_steps": 8,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "seed": 0,
}


def prepared(out: Path) -> Path:
    """The folder with `start`, the model, and `words`; made where it is not there."""
    folder = out / "task"
    if not (folder / "start" / "model.safetensors").exists():
        words = map("".join, itertools.product(LETTERS, repeat=3))
        train, _ = write_splits(
            [{"prompt": f"{word}>", "solution": word[::-1]} for word in words], 200, folder / "words"
        )
        tokenizer = build_tokenizer(LETTERS + ">")
        model = build_model(tokenizer)
        warm_start(model, tokenizer, train, LETTERS, 0.6, 150, 3e-3)
        model.save_pretrained(folder / "start")
        tokenizer.save_pretrained(folder / "start")
    return folder


def recipe(out: Path, name: str, **options: Any) -> Path:
    """Writes the recipe of a run of that name into `out`, with these options; returns its file. An older run goes.

    An option that is None is left out of it.
    """
    shutil.rmtree(out / name, ignore_errors=True)
    folder = prepared(out)
    own = {"model_name_or_path": str(folder / "start"), "dataset_name": str(folder / "words")}
    device = {} if torch.cuda.is_available() else {"use_cpu": True}
    file = out / f"{name}.yaml"
    options = RECIPE | device | own | {"output_dir": str(out / name)} | options
    file.write_text(yaml.safe_dump({key: value for key, value in options.items() if value is not None}))
    return file


def fixed_rollouts(prompts: list[str], trainer: "GRPOTrainer") -> dict[str, list]:
    """A `rollout_func`: half of them right, a function of the prompt and its copy."""
    tokenizer, copies = trainer.processing_class, Counter[str]()
    output: dict[str, list] = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
    for prompt in prompts:
        generator = random.Random(f"{prompt} {copies[prompt]}")
        copies[prompt] += 1
        answer = prompt[2::-1] if generator.random() < 0.5 else "".join(generator.choices(LETTERS, k=3))
        ids = [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id]
        output["prompt_ids"].append(tokenizer(prompt)["input_ids"])
        output["completion_ids"].append(ids)
        output["logprobs"].append([0.0] * len(ids))  # nothing corrects for them without vLLM
    return output


def train(file: Path, *launcher: str, **environment: str) -> list[dict[str, Any]]:
    """Trains the recipe by `cfpo train`; the log's entries. Raises an `AssertionError` with its last words."""
    command = [sys.executable, "-m", "cfpo_trl.cli", "train", *launcher, "--config", str(file)]
    result = subprocess.run(command, text=True, capture_output=True, env=os.environ | environment)
    print(result.stdout, result.stderr)
    assert result.returncode == 0, f"cfpo train ended with status {result.returncode}: {last_words(result.stderr)}"
    output = Path(yaml.safe_load(file.read_text())["output_dir"])
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry or "eval_loss" in entry]


def last_words(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no word"
