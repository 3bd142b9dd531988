"""Two processes, on two GPUs where there are two, against one that has the whole batch."""

from functools import partial
from pathlib import Path

import torch

from .task import recipe, train

LOGGED = ("loss", "grad_norm", "reward", "cfpo/tv")
TOLERANCE = 1e-3  # relative; sums are in another order, and their differences grow from update to update


def two_as_one(out: Path, engine: str) -> str:
    """Loss, gradient norm, reward and TV of four updates on the same rollouts, by two processes and by one."""
    options = {"num_iterations": 4, "max_steps": 4, "rollout_func": "cfpo_trl.checks.task.fixed_rollouts"}
    one = train(recipe(out, "one-process", **options))
    halved = recipe(out, f"two-{engine}", per_device_train_batch_size=64, **options)
    kind = engine if torch.cuda.is_available() else f"cpu/{engine}"
    two = train(halved, "--engine", kind, "--num_processes", "2", "--main_process_port", "0")
    worst = max(
        abs(mine[name] - theirs[name]) / max(abs(theirs[name]), 1e-3)
        for mine, theirs in zip(two, one, strict=True)
        for name in LOGGED
        if name in theirs  # a reward is logged where rollouts are new
    )
    assert worst < TOLERANCE, f"a logged value is {worst:.1e} off, tolerance {TOLERANCE:g}"
    return f"loss, gradient norm, reward and TV to {worst:.1e} (tolerance {TOLERANCE:g})"


ddp, fsdp2, zero2, zero3 = (partial(two_as_one, engine=engine) for engine in ("ddp", "fsdp2", "zero2", "zero3"))
