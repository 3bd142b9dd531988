"""Runs a study: objectives compared over a grid of options, matched in all else, several runs at a time.

python scripts/compare.py scripts/studies/quick.yaml     (or `make compare-objectives`)

The same command goes on where a killed study stopped. A run is one of `src/cfpo_trl/grpo.py`, from a recipe in a
folder of its own; all of them become one table, `table.parquet`, and `compare_report.py` makes the report from it.
"""

import argparse
import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
import yaml
from tqdm import tqdm

from cfpo_trl.recipe import with_numbers

REQUIRED = {"output", "recipe", "rollout_batches", "evaluations", "parts"}
STUDY_KEYS = REQUIRED | {"prepare", "keep_models", "follow"}
NOT_FINITE = ("probability tensor contains", "device-side assert")  # what sampling from NaN raises on CPUs and GPUs
SHARED = {  # of every run; a study's recipe overrides it
    "eval_strategy": "steps",
    "eval_on_start": True,
    "save_strategy": "no",
    "report_to": "none",
    "push_to_hub": False,
    "disable_tqdm": True,
    "steps_per_generation": 1,
    "num_iterations": 1,
}


@dataclass(frozen=True)
class Run:
    """One cell of a grid: the options that the study names, the whole recipe, the folder of its results, its parts."""

    cell: dict[str, Any]
    recipe: dict[str, Any]
    folder: Path
    parts: list[str]

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    @property
    def script_recipe(self) -> dict[str, Any]:
        """The recipe as the training script takes it."""
        objective = "grpo" if self.cell["objective"] == "grpo" else "cfpo"
        return self.recipe | {"objective": objective, "output_dir": str(self.folder)}


def load_study(path: str | Path) -> dict[str, Any]:
    """The study in a YAML file. Raises a `ValueError` that names an unknown or missing key and the choices."""
    study = with_numbers(yaml.safe_load(Path(path).read_text()))
    if unknown := study.keys() - STUDY_KEYS:
        raise ValueError(
            f"{path} has {', '.join(sorted(unknown))}; a study's keys are {', '.join(sorted(STUDY_KEYS))}."
        )
    if missing := REQUIRED - study.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}.")
    for name, part in study["parts"].items():
        if part.keys() != {"question", "grid"} or not {"objective", "seed"} <= part["grid"].keys():
            raise ValueError(f"part {name} of {path} needs a question, and a grid with at least objective and seed.")
        others = sorted(set(as_list(part["grid"]["objective"])) - {"cfpo"})
        if "penalty_slope" in part["grid"] and others:
            raise ValueError(
                f"part {name} of {path} varies penalty_slope, which changes nothing in {', '.join(others)}; compare "
                "the objectives cfpo, bounded-1, bounded-1.25, ... or give penalty_slope a part of objective cfpo."
            )
    return study


def expand(study: dict[str, Any]) -> list[Run]:
    """All runs of the study, each once although parts share some; within a part seed by seed.

    Every run gets `rollout_batches` batches of rollouts, whatever it makes of them, and as many evaluations.
    """
    base = study["recipe"]
    base = with_numbers(yaml.safe_load(Path(base).read_text())) if isinstance(base, str) else base
    runs: dict[str, Run] = {}
    for name, part in study["parts"].items():
        choices = [as_list(value) for value in part["grid"].values()]
        cells = [dict(zip(part["grid"], values, strict=True)) for values in itertools.product(*choices)]
        for cell in sorted(cells, key=lambda cell: cell["seed"]):
            recipe = SHARED | base | cell
            cycle = steps_per_rollout(recipe, name)
            recipe |= {
                "max_steps": study["rollout_batches"] * cycle,
                "eval_steps": study["rollout_batches"] * cycle // study["evaluations"],
                "logging_steps": cycle,
            }
            digest = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
            folder = Path(study["output"]) / "runs" / digest
            runs.setdefault(digest, Run(cell, recipe, folder, [])).parts.append(name)
    return list(runs.values())


def as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def steps_per_rollout(recipe: dict[str, Any], part: str) -> int:
    """Optimizer steps that share a batch of rollouts. Raises a `ValueError` where they are no whole number."""
    batches = recipe["num_iterations"] * recipe["steps_per_generation"]
    accumulated = recipe.get("gradient_accumulation_steps", 1)
    if batches % accumulated:
        raise ValueError(
            f"part {part}: gradient_accumulation_steps={accumulated} does not divide the {batches} batches that share "
            "their rollouts (num_iterations × steps_per_generation); make steps_per_generation a multiple of it."
        )
    return batches // accumulated


class Worker:
    """A process that trains one run after another, on a GPU or a core of its own, so that it imports once."""

    def __init__(self, device: dict[str, str]):
        self.device = device
        self.process: subprocess.Popen | None = None

    def train(self, run: Run, keep_model: bool) -> None:
        """Leaves the run's `result.json`. Raises a `RuntimeError` with the reason where it did not end by itself."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | self.device,
                start_new_session=True,  # Ctrl-C is the parent's alone: it stops the workers, which save nothing
            )
        job = {"folder": str(run.folder), "cell": run.cell, "keep_model": keep_model}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if answer != "done":  # a GPU that met NaN is of no more use to its process
            self.stop()
        if answer not in ("done", "not finite"):
            raise RuntimeError(f"{answer or 'the process was killed'}; its log is {run.folder / 'log.txt'}")

    def stop(self) -> None:
        process, self.process = self.process, None
        if process:
            process.kill()
            process.wait()


def work(parent: int) -> None:
    """The worker's side: a job per line of stdin, a line of stdout on how it ended; ends with its parent."""

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        job = json.loads(line)
        folder = Path(job["folder"])
        with (folder / "log.txt").open("a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
            answer = train(folder, job["cell"], job["keep_model"])
        answers.write(answer + "\n")


def train(folder: Path, cell: dict[str, Any], keep_model: bool) -> str:
    """One run, by the training script, and its result. Returns `done`, `not finite` (a result, too), or an error."""
    from cfpo_trl import CFPOTrainer, grpo
    from objectives import build

    commit()  # now: the files may change while it trains
    trainers = []

    def build_trainer(**arguments: Any) -> CFPOTrainer:
        trainer_class = CFPOTrainer  # with its own penalty_slope
        if cell["objective"] != "cfpo":
            operator = staticmethod(build(cell["objective"]))
            trainer_class = type("ComparedTrainer", (CFPOTrainer,), {"soft_clip": operator})
        trainers.append(trainer_class(**arguments))
        return trainers[0]

    start, failure = time.perf_counter(), None
    try:
        grpo.main(["--config", str(folder / "recipe.yaml")], trainer_class=build_trainer)
    except (Exception, SystemExit) as error:  # the parent raises what is no result
        traceback.print_exc()
        failure = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        if not any(sign in failure for sign in NOT_FINITE):
            return failure
    state = json.loads((folder / "trainer_state.json").read_text()) if not trainers else vars(trainers[0].state)
    write_result(folder, cell, state["log_history"], time.perf_counter() - start, failure)
    if not keep_model:
        for weights in folder.glob("*model*.safetensors"):
            weights.unlink()
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return "not finite" if failure else "done"


def write_result(folder: Path, cell: dict[str, Any], history: list, seconds: float, failure: str | None) -> None:
    """At one go, so that a result that exists is whole."""
    result = {"cell": cell, "commit": commit(), "seconds": seconds, "failure": failure, "history": history}
    partial = folder / "result.part"
    partial.write_text(json.dumps(result))
    partial.replace(folder / "result.json")


@cache
def commit() -> str:
    """The commit that this process runs, with a + where files differed from it when it started."""
    described = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(described, capture_output=True, text=True).stdout.strip()


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
        try:
            for future in as_completed([threads.submit(work_off, worker) for worker in workers]):
                future.result()
        finally:
            waiting.clear()
            for worker in workers:
                worker.stop()


def lock_output(output: Path) -> TextIO:
    """Keeps a second sweep out of the folder for as long as the file that it returns is open."""
    output.mkdir(parents=True, exist_ok=True)
    lock = (output / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"Another compare.py works in {output}: wait for it, or stop it.")
    return lock


def table(runs: list[Run]) -> pd.DataFrame:
    """A row per run and logged step: the run, its options, seed, commit, seconds, failure, step, and all metrics.

    Training's metrics stand beside those of the evaluation (`eval_…`) at the same step; what a run did not log is NaN.
    """
    rows = []
    options = {option: [run.recipe.get(option) for run in runs] for run in runs for option in run.cell}
    # What the report cannot sort as it is becomes text: lists, mappings, and what some runs leave to its default.
    texts = {name for name, values in options.items() if any(v is None or isinstance(v, list | dict) for v in values)}
    for run in runs:
        if not run.result.exists():
            continue
        result = json.loads(run.result.read_text())
        cycle = run.recipe["logging_steps"]
        steps: dict[int, dict[str, Any]] = {0: {}}
        for entry in result["history"]:
            if "train_runtime" not in entry:
                steps[entry["step"]] = entry | steps.get(entry["step"], {})  # a resumed run evaluates once more
        facts = {"run": run.folder.name, "parts": " ".join(run.parts)}
        chosen = {option: run.recipe.get(option) for option in options}
        facts |= {option: str(value) if option in texts else value for option, value in chosen.items()}
        facts |= {key: result[key] for key in ("commit", "seconds", "failure")}
        for step, metrics in sorted(steps.items()):
            rows.append(facts | metrics | facts | {"step": step, "rollout_batches": step / cycle})  # facts prevail
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", nargs="?", help="YAML file of the study")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="run these parts alone; default: all")
    parser.add_argument("--workers", type=int, help="runs at a time; default: one per GPU, else one per core")
    parser.add_argument("--minutes", type=float, help="start no run after this time; the next call goes on")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    from compare_report import report  # after the workers' way out: they need no plots

    study = load_study(options.study)
    lock = lock_output(Path(study["output"]))
    runs = expand(study)
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


if __name__ == "__main__":
    main()
