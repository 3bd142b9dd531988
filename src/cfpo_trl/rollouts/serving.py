"""A recipe's vLLM server for as long as a block runs: for demos, checks and benchmarks."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import yaml

from .server import wait_for_health

GRACE = 20.0  # seconds for a process to end by itself


@contextmanager
def serving(
    recipe: Path, log: Path, environment: Mapping[str, str] | None = None, seconds: float = 300.0
) -> Iterator[subprocess.Popen]:
    """Runs `cfpo serve` on the recipe; it answers when the block begins, and is gone with all its processes after it.

    Args:
        recipe: A recipe's YAML, whose server is on this machine.
        log: File for what the server says.
        environment: Of the server; default: this process's.
        seconds: To get healthy; 0 does not wait.

    Raises:
        RuntimeError: the server ended; names the log.
        ConnectionError: it is not healthy in time.
    """
    command = [sys.executable, "-m", "cfpo_trl.cli", "serve", "--config", str(recipe)]
    with log.open("a") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)

    def check_it_runs() -> None:
        if process.poll() is not None:
            raise RuntimeError(f"The vLLM server ended with status {process.returncode}; its log is {log}.")

    try:
        if seconds:
            wait_for_health(local_url(recipe), seconds, check_it_runs)
        yield process
    finally:
        end_all(process)


def local_url(recipe: Path) -> str:
    """Where the recipe's server listens on this machine, by TRL's default port where the recipe names none."""
    return f"http://localhost:{yaml.safe_load(recipe.read_text()).get('vllm_server_port', 8000)}"


def end_all(process: subprocess.Popen) -> None:
    """Ends the process and all that it started, whatever groups they are in; kills what does not end in time."""
    if process.poll() is None:
        started = psutil.Process(process.pid).children(recursive=True)
        for one in (process, *started):
            with suppress(psutil.NoSuchProcess):
                one.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        for one in (process, *psutil.wait_procs(started, timeout=GRACE)[1]):
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()
