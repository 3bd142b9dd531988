"""CFPO against GRPO: step time and peak memory, alternating in one process; and the soft clip against the clamp.

python scripts/benchmarks/benchmark.py [--rounds 15]     (or `make benchmark`)
"""

import argparse
import platform
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch

from cfpo_trl import soft_clip
from cfpo_trl.checks.cost import Size, Work, compare, size_here, steps

SHAPE = (64, 4096)
OF_CPUS = Size("4 layers of 256", 0.0, 256, 1024, 4, 4, 1024, rows=16, completion=256)


def show(name: str, cfpo: Work, grpo: Work, rounds: int) -> None:
    """Prints the medians, the median ratio and its quartiles, and the peaks."""
    found = compare(cfpo, grpo, rounds)
    low, middle, high = found.quartiles
    memory = [peak / 2**20 for peak in (found.cfpo_peak, found.grpo_peak)]
    print(
        f"{name:<34}{1000 * found.cfpo:>9.2f}{1000 * found.grpo:>9.2f}{middle:>8.3f}  [{low:.3f}, {high:.3f}]"
        f"{memory[0]:>9.1f}{memory[1]:>9.1f}{memory[0] / memory[1]:>8.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds; the median counts")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def clip(operator: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], dtype: torch.dtype) -> Work:
        log_ratio = (0.1 * torch.randn(SHAPE)).to(device, dtype).requires_grad_()
        advantages = torch.randn(SHAPE[0], 1).to(device)

        def work() -> None:
            ratio = log_ratio.exp()
            torch.min(ratio * advantages, operator(ratio, advantages) * advantages).sum().backward()

        return work

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"commit {commit}, torch {torch.__version__}, Python {platform.python_version()}, {where}")
    print(f"{options.rounds} rounds, medians; ms; ratio CFPO / GRPO with quartiles; peak MiB\n")
    print(f"{'':<34}{'CFPO':>9}{'GRPO':>9}{'ratio':>8}{'quartiles':>16}{'CFPO':>10}{'GRPO':>9}{'ratio':>8}")
    size = size_here() if device == "cuda" else OF_CPUS
    name = f"step, {size.name}, ({size.rows}, {size.completion})"
    show(name, *steps(size, Path("runs/benchmark"), gradient_checkpointing=False), options.rounds)
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        show(
            f"surrogate {SHAPE} {str(dtype).split('.')[1]}",
            clip(lambda ratio, advantages: soft_clip(ratio, advantages, 0.2), dtype),
            clip(lambda ratio, advantages: torch.clamp(ratio, 0.8, 1.2), dtype),
            options.rounds * 4,
        )
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak resident memory of the process: {resident:.1f} GiB")


if __name__ == "__main__":
    main()
