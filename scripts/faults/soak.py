"""Thousands of steps of the tiny model: does memory grow, or descriptors, threads, children, temporary files, time?

python scripts/faults/soak.py one --steps 5000     (the modes are those of chaos.py)

A row every five seconds in docs/faults/soak-<mode>.csv; then each slope from step 500 on, with its 95 % interval.
"""

import argparse
import csv
import os
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from cfpo_trl.studies.report import markdown
from chaos import MODES, OUT, ROOT, clear, marked, recipe_of, server_of, start

EVERY = 5.0  # seconds between two looks
LOGGED = 10  # steps between two logs
SETTLED = 500  # steps
FLAT = {  # the most that may be added in 1,000 steps
    "MiB": 10.0,  # Trainer's own log in memory is 3
    "descriptors": 1.0,
    "threads": 1.0,
    "processes": 0.5,
    "temporary files": 1.0,
    "seconds a step": 0.01,
    "log KiB": 150.0,  # 100 lines of 1 KiB, and those of two checkpoints
}


def look(mark: str, log: Path, temporary: Path) -> dict[str, float]:
    """Sums over all processes of the run; private memory, so that what they share counts once."""
    found = dict.fromkeys(["step", *FLAT], 0.0)
    for process in marked(mark):
        try:
            with process.oneshot():
                found["MiB"] += process.memory_full_info().uss / 2**20
                found["descriptors"] += process.num_fds()
                found["threads"] += process.num_threads()
                found["processes"] += 1
        except psutil.Error:
            continue  # it has just ended
    text = log.read_text(errors="replace")
    found["step"] = LOGGED * text.count("'grad_norm':")
    found["temporary files"] = sum(1 for _ in temporary.rglob("*"))
    found["log KiB"] = len(text) / 1024
    return found


def slope(rows: list[dict[str, float]], name: str) -> tuple[float, float, float]:
    """Of a least-squares line, in units per 1,000 steps, and its 95 % interval."""
    x = np.array([row["step"] / 1000 for row in rows])
    y = np.array([row[name] for row in rows])
    x = x - x.mean()
    found = (x * y).sum() / (x**2).sum()
    residual = y - y.mean() - found * x
    error = np.sqrt((residual**2).sum() / (len(x) - 2) / (x**2).sum())
    return found, found - 1.96 * error, found + 1.96 * error


def watch(name: str, steps: int, path: Path) -> list[dict[str, float]]:
    """Trains, and looks; the rows."""
    mode, run = MODES[name], f"soak-{name.replace(' ', '-')}"
    temporary = OUT / f"{run}-temporary"
    temporary.mkdir(exist_ok=True)
    os.environ["TMPDIR"] = str(temporary)
    options = {"max_steps": steps, "logging_steps": LOGGED, "save_steps": 500}
    file, log = recipe_of(name, mode, run, **options), OUT / f"{run}.log"
    log.unlink(missing_ok=True)
    rows: list[dict[str, float]] = []
    with server_of(mode, file, run, OUT / f"{run}-server.log"), path.open("w", newline="") as output:
        command = start(file, mode, run, log)
        before, since = 0.0, time.monotonic()
        while command.poll() is None:
            time.sleep(EVERY)
            row = look(run, log, temporary)
            if row["step"] > before and row["processes"]:
                row["seconds a step"] = (time.monotonic() - since) / (row["step"] - before)
                before, since = row["step"], time.monotonic()
                rows.append({key: round(value, 4) for key, value in row.items()})
                writer = csv.DictWriter(output, row, lineterminator="\n")
                if len(rows) == 1:
                    writer.writeheader()
                writer.writerow(rows[-1])
                output.flush()
    if command.returncode or clear(run):
        sys.exit(f"{name} ended with status {command.returncode}: {log}")
    return rows


def report(name: str, rows: list[dict[str, float]], settled: int, steps: int) -> list[str]:
    """Prints the slopes while it trained, in Markdown; what grows."""
    rows = [row for row in rows if settled <= row["step"] < steps]  # in the last look it may be ending
    print(f"{name}: {len(rows)} looks from step {settled} to {steps}")
    lines, grown = [], []
    for quantity, most in FLAT.items():
        found, low, high = slope(rows, quantity)
        flat = high < most
        grown += [] if flat else [quantity]
        ends = f"{rows[0][quantity]:.4g}", f"{rows[-1][quantity]:.4g}"
        lines.append(
            [quantity, *ends, f"{found:+.3f} [{low:+.3f}, {high:+.3f}]", f"{most:g}", "yes" if flat else "NO"]
        )
    print(markdown(lines, ["", "at first", "in the end", "slope per 1,000 steps [95 %]", "most", "flat"]))
    return grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--settled", type=int, default=SETTLED, help="steps that do not count")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "faults")
    options = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / f"soak-{options.mode.replace(' ', '-')}.csv"
    rows = watch(options.mode, options.steps, path)
    grown = report(options.mode, rows, options.settled, options.steps)
    sys.exit(f"grows: {', '.join(grown)}" if grown else 0)


if __name__ == "__main__":
    main()
