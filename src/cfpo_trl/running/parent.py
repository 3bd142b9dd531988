"""A process that ends with the one that started it, however that one ended (on Linux); imported in no time."""

import ctypes
import os
import signal
import sys

LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # Accelerate and torch set them
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with_launcher() -> None:
    """Has the kernel send SIGTERM when the launcher dies, so that this process saves and ends, too."""
    if any(name in os.environ for name in LAUNCHED):
        end_with_parent(os.getppid())


def end_with_parent(parent: int) -> None:
    """Has the kernel send SIGTERM to this process when its parent, the process `parent`, dies; exits where it has."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)
