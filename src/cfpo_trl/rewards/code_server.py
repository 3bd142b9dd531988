"""Programs run by a Piston server, for clusters that allow no sandbox: https://github.com/engineer-man/piston."""

import time

import requests

from .sandbox import Limits, Run
from .scores import RewardError

STATUSES = {"TO": "timeout", "OL": "output_limit", "EL": "output_limit", "RE": "error", "SG": "error", "XX": "error"}
TRIES = 3
BUSY_SECONDS = 60.0  # for which a server may run as many programs as it can


class CodeServer:
    """Runs programs by Piston's `POST /api/v2/execute`; how far it isolates them is the server's own.

    Args:
        url: Such as `http://127.0.0.1:2000`.
        limits: Of each run; Piston's own bound them.

    Raises:
        ValueError: no Piston answers there, or one without Python.
    """

    def __init__(self, url: str, limits: Limits | None = None):
        self.url, self.limits = url.rstrip("/"), limits or Limits()
        try:
            answer = requests.get(f"{self.url}/api/v2/runtimes", timeout=10)
            answer.raise_for_status()
            versions = [one["version"] for one in answer.json() if one["language"] == "python"]
        except (requests.RequestException, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"server={url!r} is no Piston server that answers: {error}") from error
        if not versions:
            raise ValueError(f"server={url!r} has no Python; install its package python.")
        self.version = versions[-1]

    def run(self, program: str, stdin: str = "", seconds: float | None = None) -> Run:
        """What becomes of the program. Raises a `RewardError` where the server does not run it."""
        seconds = min(self.limits.seconds, self.limits.seconds if seconds is None else seconds)
        if seconds <= 0:
            return Run("timeout")
        body = {
            "language": "python",
            "version": self.version,
            "files": [{"name": "program.py", "content": program}],
            "stdin": stdin,
            "run_timeout": int(1000 * seconds),
            "run_memory_limit": self.limits.memory_mib * 2**20,
        }
        failures, busy_until = 0, time.monotonic() + BUSY_SECONDS
        while True:
            try:
                answer = requests.post(f"{self.url}/api/v2/execute", json=body, timeout=seconds + 30)
                if answer.status_code == 429 and time.monotonic() < busy_until:  # too many at a time
                    time.sleep(0.2)
                    continue
                answer.raise_for_status()
                return outcome(answer.json()["run"])
            except (requests.RequestException, ValueError, KeyError, TypeError) as error:
                failures += 1
                if failures == TRIES:
                    raise RewardError(f"The code server at {self.url} failed: {error}") from error


def outcome(run: dict) -> Run:
    """Piston's answer as a [`Run`]."""
    output = str(run["stdout"]).encode()
    if run.get("status"):
        return Run(STATUSES.get(run["status"], "error"), output)
    if run.get("signal") == "SIGKILL":
        return Run("timeout", output)
    if run["code"]:
        named = {"SyntaxError": "syntax_error", "IndentationError": "syntax_error", "MemoryError": "out_of_memory"}
        last = str(run.get("stderr", "")).rstrip().rsplit("\n", 1)[-1].partition(":")[0]
        return Run(named.get(last, "error"), output)
    return Run("ok", output)
