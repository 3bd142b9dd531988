"""Whether an inference server is well."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any

import requests

SECONDS_TO_ANSWER = 5.0  # for a request that needs no computation
PATIENCE = 30.0  # seconds for which a server may be unwell before it is given up


class RolloutServerError(RuntimeError):
    """The vLLM server failed during the run. Sent to a process that waits for completions, it raises on unpacking."""

    def __iter__(self) -> Iterator:
        raise self


def health_problem(url: str) -> str | None:
    """None where the server and its engine are well, else what is wrong."""
    try:
        status = requests.get(f"{url}/health", timeout=SECONDS_TO_ANSWER).status_code
    except requests.RequestException as error:
        return f"{type(error).__name__}, it does not answer"
    return None if status == 200 else f"/health answers with status {status}"


class PatientHealth:
    """Gives a server up when it has been unwell at each look for `PATIENCE` seconds.

    Args:
        url: Of the server.
    """

    def __init__(self, url: str):
        self.url = url
        self.unwell_since: float | None = None

    def check(self) -> None:
        """Looks once. Raises a `RolloutServerError` where its patience is at an end."""
        problem, now = health_problem(self.url), time.monotonic()
        self.unwell_since = None if problem is None else self.unwell_since or now
        if self.unwell_since is not None and now - self.unwell_since > PATIENCE:
            raise RolloutServerError(f"The vLLM server at {self.url} is gone ({PATIENCE:g} s): {problem}.")


def watched(url: str, request: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the request returns or raises. A server that is about to end may keep its connection open and never answer.

    Raises:
        RolloutServerError: the server at `url` was unwell for `PATIENCE` seconds meanwhile.
    """
    answer, health = in_thread(request, *args, **kwargs), PatientHealth(url)
    while not wait([answer], timeout=2.0).done:
        health.check()
    return answer.result()


def in_thread(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future:
    """Runs the function in a thread that does not keep the process alive."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
