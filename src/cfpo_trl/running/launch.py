"""Training in this process, or under Accelerate's launcher: signals reach all of it, and all of it is waited for."""

import importlib
import os
import sys

import torch

from .catalogue import engine
from .group import run_in_group
from .interrupt import SHUTDOWN_SECONDS

SHUTDOWN = "600"  # a step may take long; torch's launcher would kill after 30 s what has not ended


def train(arguments: list[str]) -> None:
    """`cfpo train`: a policy."""
    launch("cfpo_trl.grpo", arguments)


def train_reward(arguments: list[str]) -> None:
    """`cfpo reward`: a reward model."""
    launch("cfpo_trl.reward_training", arguments)


def launch(module: str, arguments: list[str]) -> None:
    """Runs the training script `module` in this process, or by `accelerate launch` with what stands before `--config`.

    `--engine zero3` stands for `--config_file` and the package's configuration of that name. Without options the
    launcher is used where there are several GPUs.

    Raises:
        SystemExit: with the status of the training, where the launcher was used.
        Mistake: there is no such engine, or what the training raises in this process.
    """
    start = next((i for i, argument in enumerate(arguments) if argument.partition("=")[0] == "--config"), 0)
    options, rest = arguments[:start], arguments[start:]
    if not options and torch.cuda.device_count() <= 1:
        importlib.import_module(module).main(rest)
        return
    if "--engine" in options:
        place = options.index("--engine")
        name = "".join(options[place + 1 : place + 2])
        options[place : place + 2] = ["--config_file", str(engine(name))]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *options, "--module", module, *rest]
    sys.exit(run_in_group(command, {SHUTDOWN_SECONDS: SHUTDOWN} | os.environ))
