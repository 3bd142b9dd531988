"""Learning on the tiny model, and a killed run that goes on as if nothing had happened."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

HERE = Path(__file__).parent
TRAJECTORY = ("loss", "reward", "grad_norm", "entropy", "cfpo/tv", "cfpo/penalty")


def trajectory(trainer) -> list[dict]:
    return [{key: log[key] for key in TRAJECTORY if key in log} for log in trainer.state.log_history if "loss" in log]


def test_reward_rises(build_trainer):
    trainer = build_trainer(
        per_device_train_batch_size=64, num_iterations=4, max_steps=80, learning_rate=3e-3, loss_type="grpo"
    )
    trainer.train()
    rewards = [log["reward"] for log in trainer.state.log_history if "reward" in log]
    assert rewards[0] < 0.6
    assert sum(rewards[-3:]) / 3 > 0.95


@pytest.mark.slow
def test_resumed_after_sigkill_equals_uninterrupted(build_trainer, tmp_path):
    """Checkpoints fall between batches of rollouts: see docs/resume.md."""
    options = {"num_iterations": 2, "max_steps": 8, "save_strategy": "steps", "save_steps": 4, "learning_rate": 3e-3}
    whole = build_trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.train()

    script = f"""
import os, signal, sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent / "scripts")!r}]
from conftest import *
from transformers import TrainerCallback
class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)
tokenizer = build_tokenizer(LETTERS)
rows = Dataset.from_list([{{"prompt": first + second}} for first in LETTERS for second in LETTERS])
options = {options!r} | dict(per_device_train_batch_size=16, num_generations=8, max_completion_length=6, seed=3)
args = GRPOConfig({str(tmp_path / "killed")!r}, logging_steps=1, **CPU, **options)
model = build_model(tokenizer, hidden_size=32, layers=2)
CFPOTrainer(model, early_letters, args, rows, processing_class=tokenizer, callbacks=[Kill()]).train()
"""
    killed = subprocess.run([sys.executable, "-c", script], env=os.environ, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    checkpoint = get_last_checkpoint(str(tmp_path / "killed"))
    assert checkpoint.endswith("checkpoint-4")

    resumed = build_trainer(output_dir=str(tmp_path / "killed"), **options)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert trajectory(resumed) == trajectory(whole)
    weights = [load_file(tmp_path / run / "checkpoint-8" / "model.safetensors") for run in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
