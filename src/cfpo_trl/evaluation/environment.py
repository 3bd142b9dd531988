"""The environment in which lighteval runs: its pins exclude the trainer's, so it is made once, beside it.

python src/cfpo_trl/evaluation/environment.py      makes it (`make evaluate` and `cfpo evaluate` do it by themselves)

Nothing but the standard library is imported here: any Python makes it.
"""

import fcntl
import hashlib
import os
import subprocess
import sys
import venv
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

PACKAGE = Path(__file__).resolve().parent.parent
CONSTRAINTS = Path(__file__).with_name("constraints.txt")
NEEDED = ("lighteval", "transformers", "peft", "requests")
VARIABLES = (  # of `make evaluate`, each an option of `cfpo evaluate`
    *("MODEL", "TASK", "BACKEND", "SERVER", "SAMPLES", "TEMPERATURE", "TOP_P", "MAX_NEW_TOKENS", "METRIC"),
    *("SYSTEM_PROMPT", "BATCH_SIZE", "LIMIT", "SEED", "NUM_GPUS", "PARALLEL", "VLLM_PYTHON", "OUT"),
)
FOLDER = "CFPO_EVALUATION_ENVIRONMENT"  # the variable that names another folder than the default


def folder() -> Path:
    """Where the environment is: `.venvs/evaluate` in a checkout, else below the user's cache."""
    if FOLDER in os.environ:
        return Path(os.environ[FOLDER]).absolute()
    checkout = PACKAGE.parent.parent
    if (checkout / "Makefile").exists() and (checkout / "setup.py").exists():
        return checkout / ".venvs" / "evaluate"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "cfpo_trl" / f"evaluate-{fingerprint()}"


def fingerprint() -> str:
    return hashlib.sha256(CONSTRAINTS.read_bytes()).hexdigest()[:12]


def make() -> Path:
    """The environment's Python; makes the environment where it is missing or was made from other pins."""
    target = folder()
    target.mkdir(parents=True, exist_ok=True)
    python, stamp = target / "bin" / "python", target / "installed"
    with target.with_name(f"{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two evaluations may begin at a time
        if not stamp.exists() or stamp.read_text() != fingerprint():
            print(f"Making {target}, the evaluation's environment, once; some minutes.", file=sys.stderr, flush=True)
            venv.create(target, clear=True, with_pip=True)
            install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS)]
            # torch by its exact pin before the rest: a range may bring a different build.
            subprocess.run([*install, "torch"], check=True)
            subprocess.run([*install, *NEEDED], check=True)
            for tasks in target.glob("lib/python*/site-packages/lighteval/tasks/tasks"):
                (tasks / "tinyBenchmarks.pkl").touch()  # which lighteval would download at its import
            stamp.write_text(fingerprint())
    return python


def as_options(variables: Mapping[str, str]) -> list[str]:
    """The variables of `make evaluate` as options of `cfpo evaluate`."""
    return [f"--{name.lower().replace('_', '-')}={value}" for name, value in variables.items()]


def evaluate(arguments: list[str]) -> NoReturn:
    """`cfpo evaluate`."""
    run_in_environment("cfpo_trl.evaluation", arguments)


def compare(arguments: list[str]) -> NoReturn:
    """`cfpo compare`."""
    run_in_environment("cfpo_trl.evaluation.compare", arguments)


def run_in_environment(module: str, arguments: list[str]) -> NoReturn:
    """Becomes a module of this package there, so that signals and status are its own."""
    python = make()
    beside = python.parent.parent / "package" / hashlib.sha256(str(PACKAGE).encode()).hexdigest()[:12]
    beside.mkdir(parents=True, exist_ok=True)
    link = beside / PACKAGE.name  # the package alone, without what is installed beside it
    with suppress(FileExistsError):  # two evaluations may begin at a time
        link.symlink_to(PACKAGE)
    os.execve(python, [str(python), "-m", module, *arguments], os.environ | {"PYTHONPATH": str(beside)})


if __name__ == "__main__":
    if sys.argv[1:]:
        run_in_environment(sys.argv[1], sys.argv[2:])
    make()
