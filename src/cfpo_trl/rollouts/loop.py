"""The rollout process of an asynchronous training: TRL's loop, in which what fails is counted, said and left out."""

import asyncio
import functools
import inspect
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import fields, replace
from typing import Any

import aiohttp
import numpy as np
from trl.experimental.async_grpo.async_rollout_worker import (
    AsyncRolloutWorker,
    RolloutGroup,
    RolloutSample,
    _AsyncRolloutLoop,
)
from trl.trainer.utils import is_async_callable

logger = logging.getLogger("cfpo_trl")

FAILED: tuple = ([], [], None, 0, 0, None)  # what TRL's loop gets for a completion that failed: no sequences
BARREN = 10  # groups in a row of which nothing came: then it is no accident
SAID = 5  # failures of a kind that are told one by one
AGAIN = (408, 429)  # statuses that are no fault of the request


class RefusedError(RuntimeError):
    """The server refuses a request, as one that is too long; the next try would end alike."""


class RolloutLoop(_AsyncRolloutLoop):
    """TRL's loop; it goes on where a completion fails, a reward is slow or the server refuses a prompt.

    Each sample carries the version of the policy with which its own completion began (TRL's: that of its group's
    first), and `staleness/updates_while_written`, the updates that fell into its writing.

    Logs: `rollout/refused_total` and `rollout/failed_total`, completions that are left out of their groups;
    `rollout/slow_rewards_total`, groups that are left out; what rewards log by `log_metric`.

    Args:
        reward_weights: One for each reward function; default 1.
        done: Groups of prompts, counted from the first that this process would write, that need no more rollouts.

    Raises:
        RuntimeError: nothing came of 10 groups in a row.
    """

    # TRL's own
    reward_funcs: list[Callable[..., Any]]

    def __init__(self, *, reward_weights: list[float] | None = None, done: Iterable[int] = (), **kwargs: Any):
        super().__init__(**kwargs)
        self._done = frozenset(done)
        weights = reward_weights or [1.0] * len(self.reward_funcs)
        names = self.reward_func_names[: len(weights)]  # those of environments follow
        self._weights = {f"rewards/{name}": weight for name, weight in zip(names, weights, strict=True)}
        pairs = zip(self.reward_funcs, weights, strict=True)
        self.reward_funcs = [weighted(reward, weight, self._log_metric) for reward, weight in pairs]
        self._said: dict[str, int] = {}
        self._barren = 0

    def run(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):  # a terminal and launchers send them to the whole group
            signal.signal(number, signal.SIG_IGN)  # the trainer answers, and stops this process
        threading.Thread(target=end_with_parent, daemon=True).start()
        super().run()

    async def _run_loops(self, stop_event: asyncio.Event) -> None:
        beating = asyncio.create_task(self._beat())
        try:
            await super()._run_loops(stop_event)
        finally:
            beating.cancel()

    async def _beat(self) -> None:
        """TRL's loop does not, while it waits for a slow reward."""
        while True:
            self._heartbeat_value.value = time.time()
            await asyncio.sleep(1.0)

    def _repeat_iterator(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return ((group, row) for group, row in super()._repeat_iterator() if group not in self._done)

    async def _retry(self, request: Callable[[], Awaitable], **options: Any) -> Any:
        async def once() -> Any:
            try:
                return await request()
            except aiohttp.ClientResponseError as error:
                if 400 <= error.status < 500 and error.status not in AGAIN:
                    raise RefusedError(f"status {error.status}: {error.message}") from error
                raise

        return await super()._retry(once, **options)

    async def _generate_one(self, *arguments: Any, **options: Any) -> tuple:
        version = self.model_version
        try:
            result = await super()._generate_one(*arguments, **options)
        except RefusedError as error:
            self._count("rollout/refused_total", f"the vLLM server refuses a prompt, {error}")
            return FAILED
        except Exception as error:
            self._count("rollout/failed_total", f"a completion failed, {type(error).__name__}: {error}", error)
            return FAILED
        for sequence in result[2]:
            sequence.versions = version, self.model_version
        return result

    async def _score_group(self, group: RolloutGroup) -> list[RolloutSample]:
        group = without_failed(group)
        samples: list[RolloutSample] = []
        if group.completions:
            try:
                samples = await asyncio.wait_for(super()._score_group(group), self.request_timeout)
            except TimeoutError:
                self._count("rollout/slow_rewards_total", f"a reward took over {self.request_timeout} s for a group")
        self._barren = 0 if samples else self._barren + 1
        if self._barren == BARREN:
            raise RuntimeError(f"Nothing came of {BARREN} prompts in a row; the messages above say why.")
        sequences = [sequence for sequences in group.completions_sequences for sequence in sequences]
        for sample, sequence in zip(samples, sequences, strict=bool(samples)):
            sample.model_version, finished = sequence.versions
            sample.metrics["staleness/updates_while_written"] = float(finished - sample.model_version)
            for name, weight in self._weights.items():
                sample.metrics[name] /= weight  # logged as they are, not as they count
        return samples or [nothing(group)]

    def _log_metric(self, name: str, value: float) -> None:
        total = self._rates[name]
        total[0] += value
        total[1] += 1

    def _count(self, metric: str, message: str, error: Exception | None = None) -> None:
        self._counters[metric] += 1
        self._said[metric] = self._said.get(metric, 0) + 1
        if self._said[metric] <= SAID:
            end = "; more of these are counted alone" if self._said[metric] == SAID else ""
            logger.warning("Left out: %s (%s%s)", message, metric, end, exc_info=error)


class RolloutWorker(AsyncRolloutWorker):
    """The trainer's side of the rollout process: it notices at once that the process died, and never waits for it.

    Takes what [`RolloutLoop`] takes.
    """

    _loop_cls = RolloutLoop

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._stop_event_mp = StopSignal(self._mp_ctx)

    def start(self) -> None:
        super().start()
        self.rollout_buffer._writer.close()  # so that reading ends where the process, its last writer, has died

    def check_health(self, stale_after_s: float) -> None:
        super().check_health(stale_after_s)
        if self._process is not None and not self._process.is_alive():
            raise RuntimeError(f"the rollout process died, exit code {self._process.exitcode}")


class StopSignal:
    """In place of a `multiprocessing.Event`, whose `set` waits for a process that died while it waited for it."""

    def __init__(self, context: Any):
        self._semaphore = context.Semaphore(0)

    def set(self) -> None:
        self._semaphore.release()

    def wait(self) -> None:
        self._semaphore.acquire()


def weighted(reward: Callable, weight: float, log_metric: Callable[[str, float], None]) -> Callable:
    """The reward times its weight; it may log, as GRPOTrainer's rewards do."""
    if takes(reward, "log_metric"):
        reward = functools.partial(reward, log_metric=log_metric)

    def times_weight(rewards: list[float | None]) -> list[float | None]:
        return [None if one is None else weight * one for one in rewards]

    async def awaited(**columns: Any) -> list[float | None]:
        return times_weight(await reward(**columns))

    def called(**columns: Any) -> list[float | None]:
        return times_weight(reward(**columns))

    return awaited if is_async_callable(reward) else called


def takes(function: Callable, name: str) -> bool:
    """Whether a function can be given an argument of that name."""
    parameters = inspect.signature(function).parameters.values()
    return any(one.name == name or one.kind == one.VAR_KEYWORD for one in parameters)


def without_failed(group: RolloutGroup) -> RolloutGroup:
    """The group's completions that did not fail."""
    done = [place for place, sequences in enumerate(group.completions_sequences) if sequences is not None]
    count = len(group.completions_sequences)

    def kept(value: Any) -> Any:
        return [value[place] for place in done] if isinstance(value, list) and len(value) == count else value

    columns = {name: kept(values) for name, values in group.reward_kwargs.items()}
    of_each = {field.name: kept(getattr(group, field.name)) for field in fields(group)}
    return replace(group, **of_each | {"reward_kwargs": columns})


def nothing(group: RolloutGroup) -> RolloutSample:
    """Tells the trainer that a group came to nothing, so that its prompt counts as done."""
    empty = np.zeros(0, dtype=np.int64)
    return RolloutSample(
        prompt=[],
        completion=[],
        input_ids=empty,
        completion_mask=empty,
        old_log_probs=empty.astype(np.float32),
        advantage=0.0,
        model_version=group.model_version,
        group_id=group.group_id,
        metrics={"reward": float("nan")},
    )


def end_with_parent() -> None:
    """Ends this process when its parent has ended, however that was."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
