"""Training in this process, or under Accelerate's launcher: signals reach all of it, and all of it is waited for."""

import ctypes
import importlib
import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import partial

import psutil
import torch

from .catalogue import engine
from .interrupt import SHUTDOWN_SECONDS
from .parent import end_with_parent

PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl
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
    sys.exit(run_in_group(command))


def run_in_group(command: list[str]) -> int:
    """Runs the command in a process group of its own; its status, when it and all that it has left have ended.

    SIGTERM and SIGINT are passed on to the whole group: a launcher of one process dies of them, and its process saves.
    When this process is killed, the launcher gets SIGTERM; when that one is, what it has left does.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(
            PR_SET_CHILD_SUBREAPER, 1
        )  # what outlives the launcher becomes a child of this process
    others = {child.pid for child in psutil.Process().children()}
    process = subprocess.Popen(
        command,
        env={SHUTDOWN_SECONDS: SHUTDOWN} | os.environ,
        process_group=0,
        preexec_fn=partial(end_with_parent, os.getpid()),
    )

    def pass_on(number: int, frame: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    status = process.wait()
    while left := [child for child in psutil.Process().children() if child.pid not in others]:
        for child in left if status < 0 else []:
            with suppress(psutil.NoSuchProcess):
                child.terminate()
        psutil.wait_procs(left)
    return status if status >= 0 else 128 - status
