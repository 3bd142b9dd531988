"""The processes that train a study's runs, each one run after another: `python -m cfpo_trl.studies.worker PARENT`."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any

from .. import __version__
from .plan import Run

NOT_FINITE = ("probability tensor contains", "device-side assert")  # what sampling from NaN raises on CPUs and GPUs


class Worker:
    """A process that trains one run after another, on a GPU or a core of its own, so that it imports once."""

    def __init__(self, device: dict[str, str]):
        self.device = device
        self.process: subprocess.Popen | None = None

    def train(self, run: Run, keep_model: bool) -> None:
        """Leaves the run's `result.json`. Raises a `RuntimeError` with the reason where it did not end by itself."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cfpo_trl.studies.worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=os.environ | self.device,
                start_new_session=True,  # Ctrl-C is the parent's alone: it stops the workers, which save nothing
            )
        job = {"folder": str(run.folder), "cell": run.cell, "keep_model": keep_model}
        assert self.process.stdin
        assert self.process.stdout
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
        with (folder / "log.txt").open("a") as log:
            for stream in (1, 2):  # the process's own, which loggers hold on to
                os.dup2(log.fileno(), stream)
        answer = train(folder, job["cell"], job["keep_model"])
        sys.stdout.flush()
        answers.write(answer + "\n")


def train(folder: Path, cell: dict[str, Any], keep_model: bool) -> str:
    """One run, by the training script, and its result. Returns `done`, `not finite` (a result, too), or an error."""
    from .. import CFPOTrainer, grpo
    from .mismatch import mismatched
    from .objectives import trainer_of
    from .stale import stale

    commit()  # now: the files may change while it trains
    trainers = []

    def build_trainer(**arguments: Any) -> CFPOTrainer:
        trainer_class = mismatched(trainer_of(cell["objective"]), cell.get("rollout_dtype"))
        trainers.append(stale(trainer_class, cell.get("staleness", 0))(**arguments))
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
    """The commit that this process runs, with a + where files differed from it; the version where it is installed."""
    if not shutil.which("git"):
        return __version__
    described = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    return subprocess.run(described, capture_output=True, text=True).stdout.strip() or __version__


if __name__ == "__main__":
    work(int(sys.argv[1]))
