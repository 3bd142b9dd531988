"""The accuracy reward: math-verify's verdict, in processes that no completion can hang (see pool.py)."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from .golds import UnreadableGold, read_gold
from .pool import Limits, Verdict, get_pool
from .texts import text_of

STATUSES = ("timeout", "out_of_memory", "died", "error", "no_answer", "unparseable_gold", "missing_gold")


NO_ANSWER = Verdict("no_answer", 0.0)


class AccuracyReward:
    """1 where math-verify finds the completion's answer equal to the solution, else 0.

    The verdicts are those of `trl.rewards.accuracy_reward` (the answer must be LaTeX, a boxed one counts first), and
    its signature is TRL's, for plain and conversational completions. None, which TRL skips, where the solution is
    missing or math-verify cannot read it. What exceeds the limits scores 0.

    Logs, per batch: `accuracy/<status>` for timeout, out_of_memory, died (worker), error, no_answer,
    unparseable_gold and missing_gold as shares of the completions, and `accuracy/seconds`.

    Args:
        limits: Time and memory that a completion and a batch may take.
        delimiter: Only the text behind its last occurrence counts, and a completion without it scores 0.
    """

    def __init__(self, limits: Limits | None = None, delimiter: str | None = None):
        self.limits = limits or Limits()
        self.delimiter = delimiter
        self.__name__ = "reasoning_accuracy_reward" if delimiter else "accuracy_reward"

    def __call__(
        self,
        completions: Sequence[Any],
        solution: Sequence[Any],
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        start = time.perf_counter()
        verdicts = self.judge(completions, solution)
        if log_metric is not None and verdicts:
            counts = Counter(verdict.status for verdict in verdicts)
            for status in STATUSES:
                log_metric(f"accuracy/{status}", counts[status] / len(verdicts))
            log_metric("accuracy/seconds", time.perf_counter() - start)
        if log_extra is not None:
            log_extra("solution", list(solution))
            log_extra("gold_parsed", [verdict.gold or f"[{verdict.status}]" for verdict in verdicts])
            log_extra("answer_parsed", [verdict.answer or f"[{verdict.status}]" for verdict in verdicts])
        return [verdict.reward for verdict in verdicts]

    def judge(self, completions: Sequence[Any], solution: Sequence[Any]) -> list[Verdict]:
        """What became of each completion, in order; see [`Verdict`]. Its status is also missing_gold."""
        golds = [_readable(gold) for gold in solution]
        texts = [self._answer_part(text_of(completion)) for completion in completions]
        rows = list(zip(golds, texts, strict=True))
        pairs = [(gold, text) for gold, text in rows if isinstance(gold, str) and text is not None]
        verdicts = iter(get_pool(self.limits).judge(pairs))
        return [
            gold if isinstance(gold, Verdict) else NO_ANSWER if text is None else next(verdicts) for gold, text in rows
        ]

    def _answer_part(self, text: str) -> str | None:
        if self.delimiter is None:
            return text
        return text.rsplit(self.delimiter, 1)[1] if self.delimiter in text else None


def _readable(gold: Any) -> str | Verdict:
    """The reference as math-verify reads it, or why there is no reward for it."""
    try:
        read = read_gold(gold)
    except UnreadableGold:
        return Verdict("unparseable_gold", None)
    return Verdict("missing_gold", None) if read is None else read


def get_accuracy_reward(**limits: Any) -> AccuracyReward:
    """The accuracy reward with other [`Limits`]: `seconds`, `budget`, `memory_gib`, `workers`."""
    return AccuracyReward(Limits(**limits))


def get_reasoning_accuracy_reward(delimiter: str = "</think>", **limits: Any) -> AccuracyReward:
    """The accuracy of what follows the reasoning; a completion that does not end it scores 0."""
    return AccuracyReward(Limits(**limits), delimiter)


accuracy_reward = get_accuracy_reward()
reasoning_accuracy_reward = get_reasoning_accuracy_reward()
