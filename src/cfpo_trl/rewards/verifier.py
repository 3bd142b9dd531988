"""The accuracy reward's worker process: reads one task a line from stdin, answers one verdict a line on stdout.

Run by its path, so that it imports math-verify and nothing else: python verifier.py MEMORY_BYTES.
A task is {"gold", "text", "seconds"}, a verdict {"status", "reward", "gold", "answer"}; see pool.py.
"""

import gc
import json
import logging
import os
import resource
import signal
import sys
from functools import lru_cache
from typing import Any


class OutOfTime(BaseException):
    """Raised by the alarm; no `except Exception` on the way swallows it."""


def raise_out_of_time(signum: int, frame: Any) -> None:
    raise OutOfTime


def load_judge() -> Any:
    """Imports math-verify and returns judge(gold, text) -> verdict."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, parser, verify

    # math-verify keeps its last 20 parses; a batch has many more answers, and the same ones come back.
    parser.parse_latex_cached = lru_cache(maxsize=8192)(parser.parse_latex_cached.__wrapped__)
    gc.freeze()
    gc.set_threshold(100_000)  # the LaTeX parser makes many small objects, and few cycles
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    # The extraction of trl.rewards.accuracy_reward: the answer must be LaTeX, boxed first.
    extraction = [
        LatexExtractionConfig(
            normalization_config=NormalizationConfig(units=True),
            boxed_match_priority=0,
            try_extract_without_anchor=False,
        )
    ]

    @lru_cache(maxsize=4096)
    def parse_gold(gold: str) -> list:
        return parse(gold, parsing_timeout=None)

    @lru_cache(maxsize=8192)
    def is_right(gold: str, answer: tuple) -> bool:
        return verify(parse_gold(gold), list(answer), timeout_seconds=None)

    def judge(gold: str, text: str) -> dict[str, Any]:
        gold_parsed = parse_gold(gold)
        if not gold_parsed:
            return {"status": "unparseable_gold", "reward": None, "gold": "", "answer": ""}
        answer = parse(text, extraction_config=extraction, extraction_mode="first_match", parsing_timeout=None)
        # The extracted text, not str() of the parsed answer: printing a tower of powers can take forever.
        shown = {"gold": show(gold_parsed), "answer": show(answer)}
        if not answer:
            return {"status": "no_answer", "reward": 0.0, **shown}
        try:
            right = is_right(gold, tuple(answer))
        except TypeError:  # a mutable matrix cannot be a key
            right = verify(gold_parsed, answer, timeout_seconds=None)
        return {"status": "verified", "reward": float(right), **shown}

    return judge


def show(parsed: list) -> str:
    """The text that a parsed answer was read from, at most 200 characters of it."""
    return next((item for item in reversed(parsed) if isinstance(item, str)), "")[:200]


def main() -> None:
    memory = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's; we end when it closes stdin
    signal.signal(signal.SIGALRM, raise_out_of_time)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing that a library prints may look like a verdict

    judge = load_judge()
    print(json.dumps({"status": "ready"}), file=replies, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        # If the trainer dies while C code spins here, where no signal handler runs, the kernel ends us.
        cpu = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(cpu + task["seconds"]) + 2, resource.RLIM_INFINITY))
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
        print(json.dumps(verdict), file=replies, flush=True)
        if verdict["status"] == "out_of_memory":
            return  # a fresh process has its memory back


if __name__ == "__main__":
    main()
