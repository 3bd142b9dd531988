"""The code reward: a completion's Python against tests, in a sandbox or by a server that runs programs."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from .code_server import CodeServer
from .code_tests import CallTest, UnreadableTests, checker, driver, read_tests
from .pool import cores_of_rank
from .sandbox import Limits, Run, Sandbox
from .scores import scored_together
from .texts import text_of

FENCE = "```"
LANGUAGES = ("python", "py", "python3", "")
STATUSES = (
    *("timeout", "out_of_memory", "output_limit", "error", "syntax_error", "no_code", "wrong", "missing_tests"),
    "unreadable_tests",
)


@dataclass(frozen=True)
class Verdict:
    """What became of one completion: `share` of its tests passed; `status` is passed, or what came first."""

    status: str
    share: float | None = 0.0


class CodeReward:
    """1 where the Python in a completion passes all of its tests, else 0; or the share of them that it passes.

    The program is the last block between three backticks, of Python by its label or of none. Each test with an input
    is a run of its own, on its standard input; what it prints is compared here, without trailing white space, and its
    exit status must be 0. Asserts run together, and are checked where the program has no access: see
    [`~cfpo_trl.rewards.code_tests`]. None, which TRL skips, where a row's tests are missing or not understood.

    Logs, per batch: `code/passed` and `code/<status>` for timeout, out_of_memory, output_limit, error, syntax_error,
    no_code, wrong, missing_tests and unreadable_tests as shares of the completions; `code/only_shown`, those that pass
    the shown tests alone; and `code/seconds`.

    Args:
        runner: Runs the programs.
        tests: Column of the tests, in one of the forms of [`~cfpo_trl.rewards.code_tests.read_tests`].
        hidden_tests: Column of tests that the prompt does not show: they alone count then.
        share: Whether some of the tests earn their share.
        budget: Wall-clock limit of a batch in seconds; what has not run by then counts as a time-out.
        workers: Programs at a time.
    """

    __name__ = "code_reward"

    def __init__(
        self,
        runner: Sandbox | CodeServer,
        tests: str = "tests",
        hidden_tests: str | None = None,
        share: bool = False,
        budget: float = 120.0,
        workers: int = 1,
    ):
        if not budget > 0:
            raise ValueError(f"budget={budget} must be above 0.")
        if workers < 1:
            raise ValueError(f"workers={workers} must be at least 1.")
        self.runner, self.share, self.budget = runner, share, budget
        self.tests, self.hidden_tests = tests, hidden_tests
        self.workers = workers

    def __call__(
        self, completions: Sequence[Any], log_metric: Callable[[str, float], None] | None = None, **columns: Any
    ) -> list[float | None]:
        for name in filter(None, (self.tests, self.hidden_tests)):
            if name not in columns:
                raise ValueError(f"The code reward's tests are in the column {name!r}, which the dataset lacks.")
        start = time.perf_counter()
        counted = scored_together(lambda: self.judge(completions, columns[self.hidden_tests or self.tests]))
        if log_metric is not None and counted:
            shares = Counter(verdict.status for verdict in counted)
            for status in ("passed", *STATUSES):
                log_metric(f"code/{status}", shares[status] / len(counted))
            if self.hidden_tests is not None:
                shown = scored_together(lambda: self.judge(completions, columns[self.tests]))
                pairs = zip(shown, counted, strict=True)
                only = sum(one.status == "passed" != other.status for one, other in pairs)
                log_metric("code/only_shown", only / len(counted))
            log_metric("code/seconds", time.perf_counter() - start)
        return [self._reward(verdict) for verdict in counted]

    def _reward(self, verdict: Verdict) -> float | None:
        return verdict.share if verdict.share is None or self.share else float(verdict.share == 1.0)

    def judge(self, completions: Sequence[Any], tests: Sequence[Any]) -> list[Verdict]:
        """What became of each completion, in order."""
        deadline = time.monotonic() + self.budget
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(partial(self._judge, deadline=deadline), map(text_of, completions), tests))

    def _judge(self, text: str, cell: Any, deadline: float) -> Verdict:
        if cell is None:
            return Verdict("missing_tests", None)
        try:
            tests = read_tests(cell)
        except UnreadableTests:
            return Verdict("unreadable_tests", None)
        program = program_in(text)
        if program is None:
            return Verdict("no_code")
        statuses: list[str] = []
        for of_calls, some in groupby(tests, lambda test: isinstance(test, CallTest)):
            run = self._calls if of_calls else self._outputs
            statuses += run(program, list(some), deadline)
        failed = [status for status in statuses if status != "passed"]
        return Verdict(failed[0] if failed else "passed", 1 - len(failed) / len(statuses))

    def _run(self, program: str, deadline: float, stdin: str = "") -> Run:
        return self.runner.run(program, stdin, deadline - time.monotonic())

    def _outputs(self, program: str, tests: Sequence[Any], deadline: float) -> list[str]:
        """The status of each test with an input; those behind the first failure do not run where all must pass."""
        statuses: list[str] = []
        for test in tests:
            if self.share or all(status == "passed" for status in statuses):
                run = self._run(program, deadline, test.stdin)
                right = lines_of(run.output.decode(errors="replace")) == lines_of(test.stdout)
                statuses.append(run.status if run.status != "ok" else "passed" if right else "wrong")
            else:
                statuses.append("wrong")
        return statuses

    def _calls(self, program: str, tests: Sequence[Any], deadline: float) -> list[str]:
        """The status of each assert, of one run."""
        run = self._run(driver(program, tests), deadline)
        output = run.output.decode(errors="replace")
        checked = self._run(checker(tests, output), deadline) if output else Run("ok")
        marks = checked.output.split() + [b"0"] * len(tests)
        otherwise = "wrong" if run.status == "ok" else run.status
        return ["passed" if mark == b"1" else otherwise for mark in marks[: len(tests)]]


def program_in(text: str) -> str | None:
    """The last closed block of Python in a completion, or None."""
    blocks = text.split(FENCE)[1:-1:2]
    programs = [
        rest for label, _, rest in (block.partition("\n") for block in blocks) if label.strip().lower() in LANGUAGES
    ]
    return programs[-1] if programs else None


def lines_of(text: str) -> list[str]:
    """The lines of an output, as graders compare them: without white space and empty lines at the ends."""
    return "\n".join(line.rstrip() for line in text.splitlines()).rstrip().split("\n")


def get_code_reward(
    tests: str = "tests",
    hidden_tests: str | None = None,
    share: bool = False,
    budget: float = 120.0,
    workers: int | None = None,
    server: str | None = None,
    **limits: Any,
) -> CodeReward:
    """The code reward; `limits` are those of [`~cfpo_trl.rewards.sandbox.Limits`], `seconds` and `memory_mib` first.

    Args:
        tests: Column of the tests.
        hidden_tests: Column of those that count, where the prompt shows `tests`.
        share: Whether some of the tests earn their share.
        budget: Wall-clock limit of a batch in seconds.
        workers: Programs at a time; default this machine's cores divided by the ranks on it.
        server: URL of a Piston server, in place of the sandbox.

    Raises:
        RuntimeError: the sandbox does not run on this machine.
    """
    runner = Sandbox(Limits(**limits)) if server is None else CodeServer(server, Limits(**limits))
    return CodeReward(runner, tests, hidden_tests, share, budget, workers or cores_of_rank())
