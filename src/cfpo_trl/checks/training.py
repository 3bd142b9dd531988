"""Trainings of the tiny model by recipe: it learns, it resumes, its adapters move."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from .task import recipe, train


def learning(out: Path) -> str:
    """Held-out accuracy, sampled, before and after 60 updates."""
    options = {"eval_strategy": "steps", "eval_steps": 60, "eval_on_start": True, "per_device_eval_batch_size": 200}
    file = recipe(out, "learning", max_steps=60, num_generations_eval=1, disable_tqdm=True, **options)
    scores = [entry["eval_reward"] for entry in train(file) if "eval_reward" in entry]
    assert scores[-1] > scores[0] + 0.1, f"held-out accuracy {scores[0]:.3f} became {scores[-1]:.3f}"
    return f"held-out accuracy {scores[0]:.3f} → {scores[-1]:.3f}"


def resume(out: Path) -> str:
    """A run of 12 updates, and one that is killed behind its first checkpoint and started again."""
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 4, "disable_tqdm": True}
    whole = recipe(out, "whole", **options)
    train(whole)
    file = recipe(out, "killed", **options)
    command = [sys.executable, "-m", "cfpo_trl.cli", "train", "--config", str(file)]
    process = subprocess.Popen(command, start_new_session=True)
    while not (out / "killed" / "checkpoint-4" / "trainer_state.json").exists():
        assert process.poll() is None, f"it ended by itself with status {process.returncode}"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    train(file)
    ends = [load_file(out / name / "model.safetensors") for name in ("whole", "killed")]
    difference = max((ends[0][name] - ends[1][name]).abs().max().item() for name in ends[0])
    assert difference < 1e-3, f"a weight differs by {difference:.1e} from the uninterrupted run's"
    return f"largest difference of a weight from the uninterrupted run's: {difference:.1e}"


def lora(out: Path) -> str:
    """Four updates of adapters."""
    return adapters(out, "lora", {})


def qlora(out: Path) -> str:
    """Four updates of adapters over weights of 4 bits."""
    return adapters(out, "qlora", {"load_in_4bit": True, "bf16": True, "dtype": "bfloat16"})


def adapters(out: Path, name: str, options: dict) -> str:
    lora = {"use_peft": True, "lora_r": 8, "lora_target_modules": ["q_proj", "v_proj"]}
    entries = train(recipe(out, name, max_steps=4, learning_rate=1e-2, **lora, **options))
    (file,) = (out / name).glob("adapter_model.safetensors")
    moved = max(value.abs().max().item() for key, value in load_file(file).items() if "lora_B" in key)
    assert moved > 0, "the adapters did not move"
    assert all(torch.tensor(entry["grad_norm"]).isfinite() for entry in entries), "a gradient is not finite"
    return f"largest weight of a B, which starts at 0: {moved:.1e}"
