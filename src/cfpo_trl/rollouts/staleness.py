"""How old the samples of an asynchronous training are, and how many may be under way so that none grows too old."""

import queue
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from trl.trainer.utils import pad

VERSION = "sample/model_version"
QUEUE = 1024  # TRL's default


def ahead(args: Any) -> int:
    """Versions by which a sample can age between the queue, where TRL checks it, and its update.

    Accelerate holds a micro-batch in advance; with a token budget TRL's batcher holds one more sample.
    """
    return 1 if args.token_budget is not None and args.token_budget <= 0 else 2


def per_update(args: Any) -> int:
    """Completions that an update takes."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size


def waiting_groups(args: Any) -> int:
    """Groups of completions that may wait to be scored: TRL's loop pauses for 0.1 s where that many do."""
    return min(max(per_update(args) // args.num_generations // 4, 1), 16)


def pace(args: Any) -> None:
    """Sets how many completions may be in flight and in the queue, where `args` leaves TRL's defaults.

    A completion is trained when all those before it are. With no more than `max_staleness` − 1 updates' worth between
    its dispatch and the batches that Accelerate holds, none is dropped for its age, but for stragglers.
    """
    group = args.num_generations
    scoring = waiting_groups(args) + 2  # one that is scored, one that waits for the queue
    room = max((args.max_staleness - 1) * per_update(args) - scoring * group, 2 * group)
    if args.max_inflight_tasks < 0:
        args.max_inflight_tasks = max(room // 2 // group, 1) * group
    if args.queue_maxsize == QUEUE:
        args.queue_maxsize = max(room - args.max_inflight_tasks, 1)


class VersionedQueue:
    """A rollout worker's queue; each sample carries its policy's version where TRL's packing keeps it: in its metrics.

    `taken` is the group of the sample that was given last, until whoever trains it says that it was kept, by None.
    `dropped` are the groups of those that were not, and the groups that came to nothing.

    Args:
        samples: The queue.
    """

    def __init__(self, samples: Any):
        self.samples = samples
        self.taken: int | None = None
        self.dropped: set[int] = set()

    def get(self, timeout: float) -> Any:
        if self.taken is not None:
            self.dropped.add(self.taken)
        self.taken = None
        while not (sample := self._next(timeout)).completion_mask.any():
            self.dropped.add(sample.group_id)
        self.taken = sample.group_id
        sample.metrics[VERSION] = float(sample.model_version)
        return sample

    def _next(self, timeout: float) -> Any:
        try:
            return self.samples.get(timeout=timeout)
        except EOFError as error:  # the rollout process died: who finds no sample asks for its health
            raise queue.Empty from error

    def qsize(self) -> int:
        return self.samples.qsize()


class VersionedCollator:
    """TRL's collator; adds `model_version`, `(P, M)`: the version of the policy that wrote each trained token.

    `groups` are those of the micro-batches that were made and are not trained yet, the oldest first: Accelerate holds
    one in advance.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]):
        self.collate = collate
        self.groups: deque[set[int]] = deque()

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        (rows,) = examples  # one micro-batch: a row for each process
        self.groups.append({sample["group_id"] for row in rows for sample in row.samples})
        versions = [[sample["metrics"][VERSION] for sample in row.samples for _ in trained(sample)] for row in rows]
        padded = pad([torch.tensor(of_row) for of_row in versions], padding_value=-1)
        return self.collate(examples) | {"model_version": padded}


def trained(sample: dict[str, Any]) -> list[int]:
    """The places of a sample's trained tokens; nothing predicts the first."""
    return [place for place, counts in enumerate(sample["completion_mask"]) if counts and place]
