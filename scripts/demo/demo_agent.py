"""An agent on a laptop: a tiny model learns to look into a box by a tool call, and to answer with what it saw.

python scripts/demo/demo_agent.py     (or `make demo-agent`)
"""

import json
import random
import shutil
import string
import time
from pathlib import Path

import matplotlib.pyplot as plt

from cfpo_trl import grpo
from cfpo_trl.tiny.model import build_model, build_tokenizer
from cfpo_trl.tiny.warm_start import warm_start, write_splits
from rooms import BOXES

RUN = Path("runs/demo-agent")
RECIPE = "recipes/demo/config_cfpo_agent.yaml"
LETTERS = string.ascii_lowercase
CHARACTERS = LETTERS + ">![]{}':_"
ROOMS, HELD_OUT = 4000, 512
NOISE = 0.65  # share of the warm start's answers and calls with another letter


def make_rooms() -> list[dict]:
    """Rooms of four letters, each once, and the box that is asked for."""
    rng = random.Random(0)
    letters = {"".join(rng.choices(LETTERS, k=len(BOXES))) for _ in range(ROOMS)}
    rows = [{"boxes": boxes, "prompt": rng.choice(BOXES)} for boxes in sorted(letters)]
    return [row | {"solution": row["boxes"][BOXES.index(row["prompt"])]} for row in rows]


def make_policy(rooms: list[dict]) -> None:
    """A policy that mostly looks into a wrong box, or into one that there is not, and often misreads what it saw."""
    tokenizer = build_tokenizer(CHARACTERS)
    model = build_model(tokenizer, hidden_size=64)
    rows = []
    for room in rooms:
        box, letter = room["prompt"], room["solution"]
        rows += [
            {"prompt": f"{box}>", "solution": f"!{box}"},
            {"prompt": f"{box}>!{box}<eos>[{letter}]", "solution": letter},
        ]
    warm_start(model, tokenizer, rows, LETTERS, NOISE, steps=500, learning_rate=3e-3)
    model.save_pretrained(RUN / "start")
    tokenizer.save_pretrained(RUN / "start")


def plot(log: list[dict], path: Path) -> None:
    """Reward, failed calls and turns, over the optimizer's steps."""
    figure, axes = plt.subplots(3, 1, sharex=True, figsize=(7, 6), layout="constrained")
    for axis, metric, label in zip(
        axes,
        ("reward", "tools/failure_frequency", "tools/turns"),
        ("mean reward", "share of calls that failed", "turns of the policy"),
        strict=True,
    ):
        points = [(entry["step"], entry[metric]) for entry in log if metric in entry]
        axis.plot(*zip(*points, strict=True), color="#0072B2")
        axis.set_ylabel(label)
        axis.set_ylim(0, 1.1 * max(value for _, value in points))
        axis.grid(alpha=0.3)
    axes[0].set_title("A character-level Qwen2 learns to look and to answer")
    axes[-1].set_xlabel("optimizer step")
    figure.savefig(path, dpi=150)


def main() -> None:
    start = time.perf_counter()
    train, held_out = write_splits(make_rooms(), HELD_OUT, RUN / "rooms")
    print(
        f"1/2  Warm start on {len(train)} rooms, {NOISE:.0%} of the calls and answers with another letter", flush=True
    )
    make_policy(train)
    shutil.rmtree(RUN / "cfpo", ignore_errors=True)
    print(f"2/2  accelerate launch src/cfpo_trl/grpo.py --config {RECIPE}", flush=True)
    grpo.main(["--config", RECIPE])
    log = json.loads((RUN / "cfpo" / "trainer_state.json").read_text())["log_history"]
    plot(log, RUN / "cfpo" / "training.png")
    before, after = [entry for entry in log if "eval_reward" in entry]
    print(f"\n{f'{len(held_out)} held-out rooms':<28}{'before':>8}{'after':>8}")
    for metric, name in (
        ("eval_reward", "right answers"),
        ("eval_tools/call_frequency", "calls per completion"),
        ("eval_tools/failure_frequency", "share of calls that failed"),
        ("eval_tools/turns", "turns of the policy"),
    ):
        print(f"{name:<28}{before[metric]:>8.3f}{after[metric]:>8.3f}")
    print(f"\nlog and plot: {RUN}/cfpo/ (trainer_state.json, training.png)")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
