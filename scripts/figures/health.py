"""Draws docs/health.png: the metrics of a healthy and of a sick run, on the demo's task (`make demo` first).

python scripts/figures/health.py
"""

import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt

from cfpo_trl import grpo

RUNS = Path("runs/health")
RECIPE = ["--config", "recipes/demo/config_cfpo.yaml", "--steps_per_generation", "1", "--num_iterations", "8"]
RECIPE += ["--per_device_train_batch_size", "256", "--max_steps", "400", "--logging_steps", "8", "--warmup_steps", "0"]
RECIPE += [
    "--lr_scheduler_type",
    "constant",
    "--disable_tqdm",
    "true",
    "--eval_strategy",
    "steps",
    "--eval_steps",
    "40",
]
RECIPE += ["--num_generations_eval", "1", "--per_device_eval_batch_size", "1000"]
RATES = {"healthy": ("1e-4", "#0072B2"), "sick": ("7e-4", "#D55E00")}  # the learning rate is all that differs
PANELS = {
    "reward": "mean reward",
    "cfpo/tv": "cfpo/tv",
    "cfpo/outside": "cfpo/outside",
    "grad_norm": "grad_norm",
    "entropy": "entropy",
    "eval_reward": "held-out reward",
}
LOGARITHMIC = {"cfpo/tv", "grad_norm"}


def main() -> None:
    figure, axes = plt.subplots(2, 3, figsize=(10, 5), sharex=True, layout="constrained")
    for name, (rate, color) in RATES.items():
        folder = RUNS / name
        shutil.rmtree(folder, ignore_errors=True)
        grpo.main([*RECIPE, "--learning_rate", rate, "--output_dir", str(folder)])
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        for axis, metric in zip(axes.flat, PANELS, strict=True):
            points = [(entry["step"], entry[metric]) for entry in log if metric in entry]
            axis.plot(*zip(*points, strict=True), color=color, label=f"{name}: learning rate {rate}")
    for axis, (metric, label) in zip(axes.flat, PANELS.items(), strict=True):
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
        if metric in LOGARITHMIC:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
    axes[0, 0].legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("optimizer step")
    figure.savefig(Path("docs") / "health.png", dpi=120)


if __name__ == "__main__":
    main()
