"""The accuracy reward's worker: reads one task a line from stdin, answers one verdict a line on stdout.

Run by its path, so that it imports math-verify and no torch: python verifier.py MEMORY_BYTES.
A task is {"id", "gold", "text", "seconds"}, a verdict {"id", "status", "reward", "gold", "answer"}; see pool.py.

The process that is started imports math-verify, which takes seconds, and forks the one that works. When that one is
killed or dies, the next is there at once; its first line is {"status": "ready", "pid"}.
"""

import contextlib
import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parents[2])  # in place of this folder, whose files have the names of others' modules

CPU_GRACE = 2  # seconds


class OutOfTime(BaseException):
    """Raised by the alarm; no `except Exception` on the way swallows it."""


def raise_out_of_time(signum: int, frame: Any) -> None:
    raise OutOfTime


def serve(judge: Callable[[str, str], dict[str, Any]], replies: int) -> None:
    """Answers tasks until stdin closes, or the memory is used up."""
    signal.signal(signal.SIGALRM, raise_out_of_time)
    reply(replies, {"status": "ready", "pid": os.getpid()})
    for line in sys.stdin.buffer:  # one task at a time is sent: nothing is read ahead that is another worker's
        try:
            task = json.loads(line)
        except ValueError:  # the rest of a task that a killed worker had begun to read
            continue
        # If the trainer dies while C code spins here, where no signal handler runs, the kernel ends us.
        cpu = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu + task["seconds"]) + CPU_GRACE, resource.RLIM_INFINITY))
        try:
            signal.setitimer(signal.ITIMER_REAL, task["seconds"])
            verdict = judge(task["gold"], task["text"])
            signal.setitimer(signal.ITIMER_REAL, 0)
        except OutOfTime:
            verdict = {"status": "timeout", "reward": 0.0, "gold": "", "answer": ""}
        except MemoryError:
            verdict = {"status": "out_of_memory", "reward": 0.0, "gold": "", "answer": ""}
        except Exception as error:  # math-verify's own bugs: a completion that raises is not a right answer
            signal.setitimer(signal.ITIMER_REAL, 0)
            verdict = {"status": "error", "reward": 0.0, "gold": "", "answer": repr(error)[:200]}
        reply(replies, {"id": task["id"], **verdict})
        if verdict["status"] == "out_of_memory":
            os._exit(1)  # a fresh process has its memory back


def reply(replies: int, message: dict[str, Any]) -> None:
    os.write(replies, json.dumps(message).encode() + b"\n")


def main() -> None:
    memory = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's; we end when it closes stdin
    replies = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing that a library prints may look like a verdict

    from cfpo_trl.rewards.judge import Judge

    judge = Judge()
    gc.freeze()
    gc.set_threshold(100_000)  # the LaTeX parser makes many small objects, and few cycles
    while True:
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BrokenPipeError):  # the trainer has ended
                serve(judge, replies)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            return


if __name__ == "__main__":
    main()
