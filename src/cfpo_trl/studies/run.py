"""Runs a study: objectives compared over a grid of options, matched in all else, several runs at a time.

cfpo study scripts/studies/quick.yaml     (or `make compare-objectives`)

The same command goes on where a killed study stopped. A run is one of `src/cfpo_trl/grpo.py`, from a recipe in a
folder of its own; all of them become one table, `table.parquet`, and `report.py` makes the report from it.
"""

import argparse
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import Any, TextIO

import yaml
from tqdm import tqdm

from ..mistakes import Mistake, checking
from .plan import Run, expand, load_study
from .report import report
from .results import table
from .worker import Worker


def devices(workers: int | None) -> list[dict[str, str]]:
    """Environments of the workers: one per GPU, else one per core; `workers` of them, round robin."""
    import torch

    gpus = torch.cuda.device_count()
    workers = workers or gpus or len(os.sched_getaffinity(0))
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": str(index % gpus)} for index in range(workers)]
    return [{"OMP_NUM_THREADS": "1"}] * workers


def sweep(study: dict[str, Any], runs: list[Run], count: int | None, minutes: float | None) -> None:
    """Trains the runs that have no result yet, `count` at a time; starts none after `minutes`."""
    todo = [run for run in runs if not run.result.exists()]
    for run in todo:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "recipe.yaml").write_text(yaml.safe_dump(run.script_recipe))
    workers = [Worker(device) for device in devices(count)]
    waiting = deque(todo)
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")

    def work_off(worker: Worker) -> None:
        while waiting and time.monotonic() < deadline:
            worker.train(waiting.popleft(), study.get("keep_models", False))
            progress.update()

    with (
        tqdm(total=len(runs), initial=len(runs) - len(todo), unit="run", smoothing=0) as progress,
        ThreadPoolExecutor(len(workers)) as threads,
    ):
        futures = [threads.submit(work_off, worker) for worker in workers]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            waiting.clear()
            while True:  # again where one had just taken a run, and began it behind the stop
                for worker in workers:
                    worker.stop()
                if not wait(futures, timeout=1).not_done:
                    break


def lock_output(output: Path) -> TextIO:
    """Keeps a second sweep out of the folder for as long as the file that it returns is open."""
    output.mkdir(parents=True, exist_ok=True)
    lock = (output / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Mistake(f"Another study works in {output}: wait for it, or stop it.") from None
    return lock


def main(arguments: list[str]) -> None:
    """Runs what has no result yet, and reports. Raises a `Mistake` where the study or a run is wrong."""
    parser = argparse.ArgumentParser(prog="cfpo study", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("study", help="YAML file of the study")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="run these parts alone; default: all")
    parser.add_argument("--workers", type=int, help="runs at a time; default: one per GPU, else one per core")
    parser.add_argument("--minutes", type=float, help="start no run after this time; the next call goes on")
    options = parser.parse_args(arguments)
    with checking():
        study = load_study(options.study)
        runs = expand(study)
    lock = lock_output(Path(study["output"]))
    if unknown := set(options.parts or []) - study["parts"].keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; {options.study} has {', '.join(study['parts'])}")
    todo = [run for run in runs if not options.parts or set(options.parts) & set(run.parts)]
    if "prepare" in study and not all(run.result.exists() for run in todo):
        subprocess.run([sys.executable, *study["prepare"].split()], check=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # SIGINT, too: a shell's background job would ignore it
        signal.signal(number, signal.default_int_handler)
    try:
        sweep(study, todo, options.workers, options.minutes)
    except (RuntimeError, KeyboardInterrupt) as stopped:
        reason = str(stopped) or "by a signal"
        sys.exit(f"Stopped: {reason}. What is finished is kept; the same command goes on from there.")
    output = Path(study["output"])
    shutil.copy(options.study, output / "study.yaml")
    everything = table(runs)
    everything.to_parquet(output / "table.parquet", index=False)
    print(f"{everything['run'].nunique()} of {len(runs)} runs in {output / 'table.parquet'}")
    print(f"Report: {report(output)}")
    lock.close()
