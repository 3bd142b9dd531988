"""A pool of math-verify processes that no completion can hang, blow up or outlive."""

import atexit
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("verifier.py")
START_UP = 60.0  # seconds that a worker may take to import math-verify
TRIES = (0.25, 1.0)  # seconds for a task's first tries; an ordinary one takes milliseconds
STARTING = -1  # what a worker is busy with before its first task
GRACE = 0.25  # seconds between the alarm in the worker and the kill from outside


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
    budget: float = 25.0
    memory_gib: float = 1.0
    workers: int | None = None

    def __post_init__(self) -> None:
        for name in ("seconds", "budget", "memory_gib"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers={self.workers} must be at least 1, or absent for one per core.")

    def count(self) -> int:
        return self.workers or min(8, cores_of_rank())


def cores_of_rank() -> int:
    """This machine's cores divided by the ranks on it, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


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


class Worker:
    """One process that has imported math-verify, its child that verifies, and the task that it is busy with."""

    def __init__(self, memory: int):
        self.command = [sys.executable, str(WORKER), str(memory)]
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that one signal ends both
        )
        assert self.process.stdin
        assert self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.child: int | None = None  # its process id
        self.received = b""
        self.start()

    def start(self) -> None:
        self.task: int | None = STARTING  # the index of its task, or None when it waits for one
        self.deadline = time.monotonic() + START_UP

    def send(self, index: int, gold: str, text: str, seconds: float) -> None:
        self.task, self.deadline = index, time.monotonic() + seconds + GRACE
        message = json.dumps({"id": index, "gold": gold, "text": text, "seconds": seconds})
        self.stdin.write(message.encode() + b"\n")
        self.stdin.flush()

    def read(self) -> Iterator[dict[str, Any]]:
        """What it has said since the last time. Raises an `EOFError` when it has ended."""
        chunk = os.read(self.stdout.fileno(), 65536)
        if not chunk:
            raise EOFError
        *lines, self.received = (self.received + chunk).split(b"\n")
        for line in lines:
            with contextlib.suppress(ValueError):  # the beginning of a line whose writer was killed
                yield json.loads(line)

    def interrupt(self) -> None:
        """Ends what it does; it can have a new task within milliseconds."""
        assert self.child is not None
        with contextlib.suppress(ProcessLookupError):  # it has just died
            os.kill(self.child, signal.SIGKILL)
        self.start()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):  # unsent bytes have no reader
            self.stdin.close()
        self.stdout.close()


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
        self.again: deque[int] = deque()  # behind all others
        self.tries = Counter[int]()

    def pending(self) -> int:
        """How many verdicts are still to come; 0 when the budget is spent."""
        return len(self.pairs) - len(self.verdicts) if time.monotonic() < self.end else 0

    def take(self, slot: int) -> int | None:
        """The next task for the worker in this slot: its own, else the longest queue's last, else one more try."""
        if slot < len(self.queues) and self.queues[slot]:
            return self.queues[slot].popleft()
        longest = max(self.queues, key=len)
        if longest:
            return longest.pop()
        return self.again.popleft() if self.again else None

    def seconds(self, index: int) -> float:
        """How long this try may take; the first task's starts the budget."""
        if self.end == math.inf:
            self.end = time.monotonic() + self.limits.budget
        return min(self._limit(index), max(self.end - time.monotonic(), 0.01))

    def settle(self, index: int, verdict: Verdict) -> None:
        """Keeps the verdict, or tries again for longer what ran out of a short try, or lost its worker."""
        if verdict.status in ("timeout", "died") and self._limit(index) < self.limits.seconds:
            self.tries[index] += 1
            self.again.append(index)
        else:
            self.verdicts[index] = verdict

    def _limit(self, index: int) -> float:
        return min([*TRIES, self.limits.seconds][self.tries[index]], self.limits.seconds)


class VerifierPool:
    """Persistent workers, started at the first batch. One that dies or must be killed is forked anew in milliseconds.

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
            finally:  # the budget or the user ended it: no worker goes on
                for worker in self.workers:
                    if worker.task not in (None, STARTING):
                        self._interrupt(worker)
        verdict_of = {pair: batch.verdicts.get(index, Verdict("timeout", 0.0)) for index, pair in enumerate(unique)}
        return [verdict_of[pair] for pair in pairs]

    def close(self) -> None:
        """Ends the workers."""
        while self.workers:
            self.workers.pop().kill()

    def _hire(self, pending: int) -> None:
        while len(self.workers) < min(self.limits.count(), pending):
            self.workers.append(Worker(int(self.limits.memory_gib * 2**30)))

    def _assign(self, batch: Batch) -> None:
        for slot, worker in enumerate(self.workers):
            index = batch.take(slot) if worker.task is None else None
            if index is None:
                continue
            try:
                worker.send(index, *batch.pairs[index], batch.seconds(index))
            except BrokenPipeError:  # it died while it waited, which its closed stdout will say
                worker.task = None
                batch.again.append(index)

    def _collect(self, batch: Batch) -> None:
        """Waits for the next verdict, death or deadline."""
        deadlines = [worker.deadline for worker in self.workers if worker.task is not None]
        pause = min([*deadlines, batch.end, time.monotonic() + START_UP]) - time.monotonic()
        readable = wait([worker.stdout.fileno() for worker in self.workers], max(pause, 0))
        for worker in list(self.workers):
            if worker.stdout.fileno() in readable:
                self._read(worker, batch)
            elif worker.task is not None and time.monotonic() > worker.deadline:
                self._lose(worker, batch)

    def _read(self, worker: Worker, batch: Batch) -> None:
        try:
            replies = list(worker.read())
        except EOFError:
            self._lose(worker, batch, ended=True)
            return
        for reply in replies:
            if reply["status"] == "ready":
                # The one before it died of that task, or before it
                if worker.task is not None and worker.task != STARTING:
                    self.replaced += 1
                    batch.settle(worker.task, Verdict("died", 0.0))
                worker.child, worker.task, self.failed_starts = reply["pid"], None, 0
            elif worker.task is not None and reply.pop("id") == worker.task:  # else it came as it was interrupted
                batch.settle(worker.task, Verdict(**reply))
                worker.task = None
                if reply["status"] == "out_of_memory":
                    worker.start()

    def _lose(self, worker: Worker, batch: Batch, ended: bool = False) -> None:
        """Settles the task of a worker that is over its deadline, or has ended."""
        index = worker.task
        if index == STARTING:
            self.failed_starts += 1
            if self.failed_starts > 2:
                raise RuntimeError(
                    f"The accuracy reward's worker failed to start {self.failed_starts} times; "
                    f"memory_gib={self.limits.memory_gib} may be too small. "
                    f"To see why, run: {' '.join(worker.command)} </dev/null"
                )
        if ended or index == STARTING:
            self.replaced += 1
            self.workers.remove(worker)
            worker.kill()
        else:
            self._interrupt(worker)
        if index is not None and index != STARTING:
            batch.settle(index, Verdict("died" if ended else "timeout", 0.0))

    def _interrupt(self, worker: Worker) -> None:
        self.replaced += 1
        worker.interrupt()


@cache
def _pool_of(limits: Limits, process_id: int) -> VerifierPool:
    return VerifierPool(limits)


def get_pool(limits: Limits) -> VerifierPool:
    """This process's pool with these limits; a forked child gets its own."""
    return _pool_of(limits, os.getpid())
