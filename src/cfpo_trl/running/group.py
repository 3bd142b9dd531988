"""Runs a command, and ends when it and all that it started have ended: nothing of it is left behind (on Linux).

python -m cfpo_trl.running.group COMMAND …     (in no time, and with little memory: `cfpo serve` becomes it)
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial

import psutil

from .parent import end_with_parent

PR_SET_CHILD_SUBREAPER = 36  # of Linux's prctl: what outlives the command becomes a child of this process
GRACE = 20.0  # seconds for what a server has left


def run_in_group(command: list[str], environment: Mapping[str, str] | None = None, grace: float | None = None) -> int:
    """Runs the command in a process group of its own; its status, when it and all that it has left have ended.

    SIGTERM and SIGINT are passed on to the whole group: a launcher of one process dies of them, and its process saves.
    When this process is killed, the command gets SIGTERM; when the command is, what it has left does.

    Args:
        command: And its arguments.
        environment: Of the command; default: this process's.
        grace: Seconds that what is left may take to end before it is killed; default: what it takes.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    others = {child.pid for child in psutil.Process().children()}
    process = subprocess.Popen(
        command, env=environment, process_group=0, preexec_fn=partial(end_with_parent, os.getpid())
    )

    def pass_on(number: int, frame: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    status = process.wait()
    while left := [child for child in psutil.Process().children() if child.pid not in others]:
        for child in left if status < 0 or grace is not None else []:
            with suppress(psutil.NoSuchProcess):
                child.terminate()
        for child in psutil.wait_procs(left, grace)[1]:
            with suppress(psutil.NoSuchProcess):
                child.kill()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(run_in_group(sys.argv[1:], grace=GRACE))
