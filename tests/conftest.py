"""The tiny model that the tests train, and a trainer on it."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test reaches a hub

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from cfpo_trl import CFPOTrainer
from cfpo_trl.tiny.model import build_model, build_tokenizer

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and all that it starts

LETTERS = "abcdefghij"
CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}


def early_letters(completions, **kwargs):
    """A dense reward: the share of letters in the first half of the alphabet."""
    return [sum(letter in LETTERS[:5] for letter in text) / max(len(text), 1) for text in completions]


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(LETTERS)


@pytest.fixture(scope="session")
def prompts():
    return Dataset.from_list([{"prompt": first + second} for first in LETTERS for second in LETTERS])


@pytest.fixture
def build_trainer(tokenizer, prompts, tmp_path):
    """Builds a trainer of either class on a fresh tiny model: `build_trainer(CFPOTrainer, num_iterations=4)`."""

    def build(trainer_class: type[GRPOTrainer] = CFPOTrainer, config_class: type = GRPOConfig, **options):
        dtype = options.pop("dtype", torch.float32)
        arguments = {
            name: options.pop(name) for name in ("callbacks", "peft_config", "eval_dataset") if name in options
        }
        options = {
            "output_dir": str(tmp_path / trainer_class.__name__),
            "per_device_train_batch_size": 16,
            "num_generations": 8,
            "max_completion_length": 6,
            "learning_rate": 1e-3,
            "max_steps": 6,
            "logging_steps": 1,
            "save_strategy": "no",
            "seed": 3,
            **CPU,
            **options,
        }
        return trainer_class(
            options.pop("model", None) or build_model(tokenizer, hidden_size=32, layers=2).to(dtype),
            early_letters,
            config_class(**options),
            prompts,
            processing_class=tokenizer,
            **arguments,
        )

    return build
