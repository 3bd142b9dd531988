"""A pool of math-verify processes that no completion can hang, blow up or outlive."""

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

WORKER = Path(__file__).with_name("verifier.py")
START_UP = 60.0  # seconds that a worker may take to import math-verify
FIRST_TRY = 1.0  # seconds for a task's first try; an ordinary one takes milliseconds
GRACE = 0.5  # seconds between the alarm in the worker and the kill from outside


@dataclass(frozen=True)
class Limits:
    """What the verification of a batch may cost.

    Args:
        seconds: Wall-clock limit for one completion; then it scores 0.
        budget: Wall-clock limit for a batch in seconds; what is not verified by then scores 0.
        memory_gib: Address space of a worker process.
        workers: Number of worker processes; default this machine's cores divided by the ranks on it, at most 8.
    """

    seconds: float = 5.0
    budget: float = 60.0
    memory_gib: float = 1.0
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("seconds", "budget", "memory_gib"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers={self.workers} must be at least 1, or absent for one per core.")

    def count(self) -> int:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return self.workers or max(1, min(8, len(os.sched_getaffinity(0)) // ranks))


@dataclass(frozen=True)
class Verdict:
    """What became of one completion.

    `status` is verified, no_answer (nothing to extract), unparseable_gold (then `reward` is None), timeout,
    out_of_memory, died (the worker, for another reason) or error. `gold` and `answer` are the texts that were parsed.
    """

    status: str
    reward: float | None
    gold: str = ""
    answer: str = ""


@dataclass
class Task:
    gold: str
    text: str
    seconds: float


@dataclass
class Worker:
    """One process, and what it is busy with: -1 while it starts, None when it waits for a task."""

    process: subprocess.Popen
    task: int | None = -1
    deadline: float = field(default_factory=lambda: time.monotonic() + START_UP)
    received: bytes = b""

    def send(self, index: int, task: Task) -> None:
        message = {"gold": task.gold, "text": task.text, "seconds": task.seconds}
        self.task, self.deadline = index, time.monotonic() + task.seconds + GRACE
        self.process.stdin.write(json.dumps(message).encode() + b"\n")
        self.process.stdin.flush()


class Waiting:
    """Indices of tasks sorted by gold, cut into a queue per worker, so that one worker parses a gold once for all."""

    def __init__(self, indices: list[int], workers: int):
        size = -(-len(indices) // workers)
        self.queues = [deque(indices[start : start + size]) for start in range(0, len(indices), size)]
        self.again: deque[int] = deque()  # second tries, when nothing else waits

    def take(self, slot: int) -> int | None:
        """The next task for the worker in this slot: its own, else one of the longest queue's last, else a retry."""
        if slot < len(self.queues) and self.queues[slot]:
            return self.queues[slot].popleft()
        longest = max(self.queues, key=len)
        if longest:
            return longest.pop()
        return self.again.popleft() if self.again else None


class VerifierPool:
    """Persistent workers, started at the first batch and replaced when they die or must be killed.

    Batches from several threads wait for each other. The workers end when this process does, also when it is killed:
    their stdin closes, and a kernel limit on CPU time ends one that is stuck in C code.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.workers: list[Worker] = []
        self.lock = threading.Lock()
        self.killed = 0  # workers replaced, over the pool's life
        atexit.register(self.close)

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts on (gold, completion) pairs, in order, within the limits' budget plus the workers' start-up."""
        unique = list(dict.fromkeys(pairs))
        with self.lock:
            try:
                verdicts = dict(zip(unique, self._judge(unique), strict=True))
            finally:
                for worker in [worker for worker in self.workers if worker.task is not None and worker.task >= 0]:
                    self._replace(worker)  # the budget or the user ended it: no late verdict may meet a later batch
        return [verdicts[pair] for pair in pairs]

    def close(self) -> None:
        """Ends the workers."""
        for worker in list(self.workers):
            self._kill(worker)

    def _start(self) -> Worker:
        memory = str(int(self.limits.memory_gib * 2**30))
        process = subprocess.Popen(
            [sys.executable, str(WORKER), memory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        worker = Worker(process)
        self.workers.append(worker)
        return worker

    def _kill(self, worker: Worker) -> None:
        self.workers.remove(worker)
        worker.process.kill()
        worker.process.wait()
        with contextlib.suppress(BrokenPipeError):  # unsent bytes have no reader
            worker.process.stdin.close()
        worker.process.stdout.close()

    def _judge(self, pairs: list[tuple[str, str]]) -> list[Verdict]:
        limits = self.limits
        tasks = [Task(gold, text, min(FIRST_TRY, limits.seconds)) for gold, text in pairs]
        verdicts: list[Verdict | None] = [None] * len(tasks)
        waiting = Waiting(sorted(range(len(tasks)), key=lambda index: tasks[index].gold), limits.count())
        failed_starts = 0
        end: float | None = None  # the budget starts when the first worker is ready

        def settle(worker: Worker, status: str) -> None:
            """The worker's task ended without a verdict: try it again, behind all others, with all of its time."""
            index = worker.task
            if status == "timeout" and tasks[index].seconds < limits.seconds:
                tasks[index].seconds = limits.seconds
                waiting.again.append(index)
            else:
                verdicts[index] = Verdict(status, 0.0)

        with selectors.DefaultSelector() as selector:
            for worker in self.workers:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            while any(verdict is None for verdict in verdicts) and (end is None or time.monotonic() < end):
                needed = min(limits.count(), sum(verdict is None for verdict in verdicts))
                while len(self.workers) < needed:
                    worker = self._start()
                    selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
                for slot, worker in enumerate(self.workers):
                    index = waiting.take(slot) if worker.task is None else None
                    if index is not None:
                        end = end or time.monotonic() + limits.budget
                        tasks[index].seconds = min(tasks[index].seconds, max(end - time.monotonic(), 0.01))
                        try:
                            worker.send(index, tasks[index])
                        except BrokenPipeError:  # it died while it waited; its closed stdout says so below
                            worker.task = None
                            waiting.again.append(index)

                deadlines = [worker.deadline for worker in self.workers if worker.task is not None]
                pause = min([*deadlines, end or float("inf")]) - time.monotonic()
                for key, _ in selector.select(max(pause, 0)):
                    worker = key.data
                    chunk = os.read(worker.process.stdout.fileno(), 65536)
                    worker.received += chunk
                    if not chunk:
                        selector.unregister(worker.process.stdout)
                        failed_starts += worker.task == -1
                        if worker.task is not None and worker.task >= 0:
                            settle(worker, "died")
                        self._replace(worker)
                    elif worker.received.endswith(b"\n"):
                        reply = json.loads(worker.received)
                        worker.received = b""
                        if worker.task >= 0:
                            if reply["status"] == "timeout":
                                settle(worker, "timeout")
                            else:
                                verdicts[worker.task] = Verdict(**reply)
                        worker.task = None
                for worker in [w for w in self.workers if w.task is not None and time.monotonic() > w.deadline]:
                    selector.unregister(worker.process.stdout)
                    failed_starts += worker.task == -1
                    if worker.task >= 0:
                        settle(worker, "timeout")
                    self._replace(worker)
                if failed_starts > 2:
                    raise RuntimeError(
                        f"The accuracy reward's worker failed to start {failed_starts} times: run "
                        f"`{sys.executable} {WORKER} {int(self.limits.memory_gib * 2**30)} </dev/null` to see why "
                        f"(memory_gib={self.limits.memory_gib} may be too small)."
                    )
        return [verdict or Verdict("timeout", 0.0) for verdict in verdicts]

    def _replace(self, worker: Worker) -> None:
        self.killed += 1
        self._kill(worker)


@cache
def _pool_of(limits: Limits, process_id: int) -> VerifierPool:
    return VerifierPool(limits)


def get_pool(limits: Limits) -> VerifierPool:
    """This process's pool with these limits; a forked child gets its own."""
    return _pool_of(limits, os.getpid())
