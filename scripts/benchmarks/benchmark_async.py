"""Trained tokens per second, and the share of the time that the trainer waits: synchronous and asynchronous rollouts.

python scripts/benchmarks/benchmark_async.py     (the demo's model and words; one vLLM server; alternating in one run)
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback

from cfpo_trl import AsyncCFPOTrainer, CFPOTrainer, grpo

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "demo"))

from demo import prepare_if_missing  # noqa: E402
from demo_async import RECIPE, server  # noqa: E402

MODES = {"synchronous": None, "1 version": 1, "4 versions": 4}
SKIPPED = 5  # updates at the start, which fill the queue
SYNCHRONOUS = {"use_vllm": True, "vllm_mode": "server", "loss_type": "dapo", "steps_per_generation": 1}


class Clock(TrainerCallback):
    """When each update ended, and how many seconds of it the trainer waited for rollouts."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.waited: list[float] = []
        self.waiting = 0.0

    def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())
        self.waited.append(self.waiting)
        self.waiting = 0.0


def timed(base: type, clock: Clock) -> type:
    """The trainer with the clock."""

    class Timed(base):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **keywords: Any):
            super().__init__(*arguments, **keywords)
            self.add_callback(clock)

        def _generate(self, *arguments: Any, **keywords: Any) -> Any:  # GRPOTrainer's
            start = time.perf_counter()
            result = super()._generate(*arguments, **keywords)
            clock.waiting += time.perf_counter() - start
            return result

    return Timed


def measure(mode: str, updates: int, folder: Path) -> dict:
    """One training by that mode, in this process."""
    versions, clock, output = MODES[mode], Clock(), folder / "out"
    shutil.rmtree(output, ignore_errors=True)
    options = yaml.safe_load(RECIPE.read_text()) | {"max_steps": updates, "output_dir": str(output)}
    if versions is None:
        options = {name: value for name, value in options.items() if name not in ("max_staleness", "token_budget")}
        options |= SYNCHRONOUS | {"rollouts": "sync"}
    else:
        options |= {"max_staleness": versions}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(options))
    grpo.main(["--config", str(recipe)], timed(CFPOTrainer if versions is None else AsyncCFPOTrainer, clock))
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    log = [entry for entry in log if "loss" in entry][SKIPPED:]
    seconds = clock.ends[-1] - clock.ends[SKIPPED - 1]
    size = options["per_device_train_batch_size"]
    tokens = [entry.get("batch/trained_tokens_per_step") or entry["completions/mean_length"] * size for entry in log]
    waited = sum(clock.waited[SKIPPED:]) + sum(entry.get("perf/rollout_wait_s", 0.0) for entry in log)
    return {
        "tokens": sum(tokens) / seconds,
        "update": seconds / len(log),
        "waiting": waited / seconds,
        "age": statistics.mean(entry.get("staleness/mean", 0.0) for entry in log),
        "reward": statistics.mean(entry["reward"] for entry in log[-10:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=40)
    parser.add_argument("--mode", choices=MODES, help="one training against the server that runs; prints JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.mode:
            print(json.dumps(measure(args.mode, args.updates, Path(folder))))
            return
        prepare_if_missing()
        found: dict[str, list[dict]] = {mode: [] for mode in MODES}
        with server():
            for number in range(args.rounds):
                for mode in MODES:
                    command = [sys.executable, __file__, "--mode", mode, "--updates", str(args.updates)]
                    output = subprocess.run(command, text=True, capture_output=True)
                    if output.returncode:
                        sys.exit(output.stderr[-3000:])
                    found[mode].append(json.loads(output.stdout.splitlines()[-1]))
                    print(number, mode, found[mode][-1], flush=True)
    print("\n| | trained tokens/s | s per update | waiting | mean age | against synchronous, by round |")
    print("|---|---|---|---|---|---|")
    for mode, rounds in found.items():
        middle = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        pairs = zip(rounds, found["synchronous"], strict=True)
        ratios = ", ".join(f"{one['tokens'] / base['tokens']:.2f}" for one, base in pairs)
        print(
            f"| {mode} | {middle['tokens']:.0f} | {middle['update']:.2f} | {middle['waiting']:.0%} | "
            f"{middle['age']:.1f} | {ratios} |"
        )


if __name__ == "__main__":
    main()
