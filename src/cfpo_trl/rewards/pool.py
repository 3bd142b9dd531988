"""A pool of math-verify processes that no completion can hang, blow up or outlive."""

import atexit
import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path

WORKER = Path(__file__).with_name("verifier.py")
START_UP = 60.0  # seconds that a worker may take to import math-verify
FIRST_TRY = 1.0  # seconds for a task's first try; an ordinary one takes milliseconds
STARTING = -1  # what a worker is busy with before its first task
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
class Worker:
    """One process, and what it is busy with."""

    process: subprocess.Popen
    task: int | None = STARTING  # the index of its task, or None when it waits for one
    deadline: float = field(default_factory=lambda: time.monotonic() + START_UP)
    received: bytes = b""

    def send(self, index: int, gold: str, text: str, seconds: float) -> None:
        self.task, self.deadline = index, time.monotonic() + seconds + GRACE
        message = json.dumps({"gold": gold, "text": text, "seconds": seconds})
        self.process.stdin.write(message.encode() + b"\n")
        self.process.stdin.flush()


class Batch:
    """The (gold, completion) pairs of one batch: who is next, and what became of each.

    Sorted by gold and cut into a queue per worker, so that a worker parses a gold once for all of its completions.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]], limits: Limits):
        self.pairs, self.limits = pairs, limits
        self.verdicts: dict[int, Verdict] = {}
        self.end = math.inf  # the budget starts when the first worker is ready
        order = sorted(range(len(pairs)), key=lambda index: pairs[index][0])
        size = -(-len(order) // limits.count())
        self.queues = [deque(order[start : start + size]) for start in range(0, len(order), size)]
        self.second_try: deque[int] = deque()  # behind all others
        self.tried: set[int] = set()

    def pending(self) -> int:
        """How many verdicts are still to come; 0 when the budget is spent."""
        return len(self.pairs) - len(self.verdicts) if time.monotonic() < self.end else 0

    def take(self, slot: int) -> int | None:
        """The next task for the worker in this slot: its own, else the longest queue's last, else a second try."""
        if slot < len(self.queues) and self.queues[slot]:
            return self.queues[slot].popleft()
        longest = max(self.queues, key=len)
        if longest:
            return longest.pop()
        return self.second_try.popleft() if self.second_try else None

    def seconds(self, index: int) -> float:
        """How long this try may take; the first task's starts the budget."""
        if self.end == math.inf:
            self.end = time.monotonic() + self.limits.budget
        seconds = self.limits.seconds if index in self.tried else min(FIRST_TRY, self.limits.seconds)
        return min(seconds, max(self.end - time.monotonic(), 0.01))

    def settle(self, index: int, verdict: Verdict) -> None:
        """Keeps the verdict, or lets a completion that ran out of its short first try have a second one."""
        if verdict.status == "timeout" and index not in self.tried and self.limits.seconds > FIRST_TRY:
            self.tried.add(index)
            self.second_try.append(index)
        else:
            self.verdicts[index] = verdict


class VerifierPool:
    """Persistent workers, started at the first batch and replaced when they die or must be killed.

    Batches from several threads wait for each other. The workers end when this process does, also when it is killed:
    their stdin closes, and a kernel limit on CPU time ends one that is stuck in C code.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.workers: list[Worker] = []
        self.lock = threading.Lock()
        self.replaced = 0  # over the pool's life
        self.failed_starts = 0  # in a row
        atexit.register(self.close)

    def judge(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Verdicts on (gold, completion) pairs, in order, within the limits' budget plus the workers' start-up.

        Raises:
            RuntimeError: the workers do not start.
        """
        unique = list(dict.fromkeys(pairs))
        if not unique:
            return []
        with self.lock:
            batch = Batch(unique, self.limits)
            try:
                while pending := batch.pending():
                    self._hire(pending)
                    self._assign(batch)
                    self._collect(batch)
            finally:  # the budget or the user ended it: no late verdict may meet a later batch
                for worker in [worker for worker in self.workers if worker.task not in (None, STARTING)]:
                    self._replace(worker)
        verdict_of = {pair: batch.verdicts.get(index, Verdict("timeout", 0.0)) for index, pair in enumerate(unique)}
        return [verdict_of[pair] for pair in pairs]

    def close(self) -> None:
        """Ends the workers."""
        for worker in list(self.workers):
            self._kill(worker)

    def _hire(self, pending: int) -> None:
        while len(self.workers) < min(self.limits.count(), pending):
            command = [sys.executable, str(WORKER), str(int(self.limits.memory_gib * 2**30))]
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            self.workers.append(Worker(process))

    def _assign(self, batch: Batch) -> None:
        for slot, worker in enumerate(self.workers):
            index = batch.take(slot) if worker.task is None else None
            if index is None:
                continue
            try:
                worker.send(index, *batch.pairs[index], batch.seconds(index))
            except BrokenPipeError:  # it died while it waited, which its closed stdout will say
                worker.task = None
                batch.second_try.append(index)

    def _collect(self, batch: Batch) -> None:
        """Waits for the next verdict, death or deadline."""
        deadlines = [worker.deadline for worker in self.workers if worker.task is not None]
        pause = min([*deadlines, batch.end, time.monotonic() + START_UP]) - time.monotonic()
        readable = wait([worker.process.stdout for worker in self.workers], max(pause, 0))
        for worker in list(self.workers):
            if worker.process.stdout in readable:
                self._read(worker, batch)
            elif worker.task is not None and time.monotonic() > worker.deadline:
                self._lose(worker, batch, "timeout")

    def _read(self, worker: Worker, batch: Batch) -> None:
        chunk = os.read(worker.process.stdout.fileno(), 65536)
        if not chunk:
            self._lose(worker, batch, "died")
            return
        worker.received += chunk
        if worker.received.endswith(b"\n"):
            reply, worker.received = json.loads(worker.received), b""
            index, worker.task = worker.task, None
            if index == STARTING:
                self.failed_starts = 0
            else:
                batch.settle(index, Verdict(**reply))

    def _lose(self, worker: Worker, batch: Batch, status: str) -> None:
        self._replace(worker)
        if worker.task == STARTING:
            self.failed_starts += 1
            if self.failed_starts > 2:
                raise RuntimeError(
                    f"The accuracy reward's worker failed to start {self.failed_starts} times; "
                    f"memory_gib={self.limits.memory_gib} may be too small. "
                    f"To see why, run: {' '.join(worker.process.args)} </dev/null"
                )
        elif worker.task is not None:
            batch.settle(worker.task, Verdict(status, 0.0))

    def _replace(self, worker: Worker) -> None:
        self.replaced += 1
        self._kill(worker)

    def _kill(self, worker: Worker) -> None:
        self.workers.remove(worker)
        worker.process.kill()
        worker.process.wait()
        with contextlib.suppress(BrokenPipeError):  # unsent bytes have no reader
            worker.process.stdin.close()
        worker.process.stdout.close()


@cache
def _pool_of(limits: Limits, process_id: int) -> VerifierPool:
    return VerifierPool(limits)


def get_pool(limits: Limits) -> VerifierPool:
    """This process's pool with these limits; a forked child gets its own."""
    return _pool_of(limits, os.getpid())
