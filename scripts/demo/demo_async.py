"""The demo while a vLLM server goes on writing: the reward rises from rollouts some versions old; a plot.

python scripts/demo/demo_async.py     (or `make demo-async`; needs vLLM, here its CPU build)
"""

import json
import os
import shutil
import time
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib.pyplot as plt

import demo
from cfpo_trl import grpo
from cfpo_trl.rollouts.serving import serving

RECIPE = Path("recipes/demo/config_cfpo_async.yaml")
OUTPUT = demo.RUN / "async"
AGES = ("#9ecae1", "#6baed6", "#3182bd", "#08519c", "#08306b")


def server() -> AbstractContextManager:
    """The recipe's vLLM server."""
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": "1"}
    return serving(RECIPE, demo.RUN / "server.log", environment)


def plot(path: Path) -> None:
    """Reward, age of the rollouts, and drift by age, over the updates."""
    log = json.loads((OUTPUT / "trainer_state.json").read_text())["log_history"]
    log = [entry for entry in log if "staleness/mean" in entry]
    steps = [entry["step"] for entry in log]
    figure, (top, middle, bottom) = plt.subplots(3, 1, sharex=True, figsize=(7, 6.5), layout="constrained")
    top.plot(steps, [entry["reward"] for entry in log], color="#0072B2")
    top.set_ylabel("mean reward")
    top.set_title("A character-level Qwen2 learns while a server writes")
    ages = sorted({int(name.rpartition("_")[2]) for entry in log for name in entry if "staleness/share_" in name})
    shares = [[entry.get(f"staleness/share_{age}", 0.0) for entry in log] for age in ages]
    middle.stackplot(steps, shares, labels=[f"{age} old" for age in ages], colors=AGES)
    middle.set_ylabel("share of tokens, by\nversions of the policy")
    middle.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for age, color in zip(ages, AGES, strict=False):
        points = [(entry["step"], entry[f"cfpo/tv_{age}"]) for entry in log if f"cfpo/tv_{age}" in entry]
        bottom.scatter(*zip(*points, strict=True), color=color, s=8, label=f"{age} old")
    bottom.set_ylabel("total variation\n½·E|r − 1|")
    bottom.set_xlabel("update")
    for axis in (top, bottom):
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def main() -> None:
    start = time.perf_counter()
    demo.prepare_if_missing()
    shutil.rmtree(OUTPUT, ignore_errors=True)
    print(f"1/2  cfpo serve --config {RECIPE}", flush=True)
    with server():
        print(f"2/2  cfpo train --config {RECIPE}", flush=True)
        grpo.main(["--config", str(RECIPE)])
    held_out = [json.loads(line) for line in (demo.RUN / "words" / "test.jsonl").read_text().splitlines()]
    before, after = (demo.accuracy(folder, held_out, sample=True) for folder in (demo.RUN / "start", OUTPUT))
    plot(OUTPUT / "training.png")
    print(f"\nheld-out accuracy, sampled at T = 1: {before:.3f} before, {after:.3f} after")
    print(f"log and plot: {OUTPUT}/ (trainer_state.json, training.png)")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
