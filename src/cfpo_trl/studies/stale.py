"""Rollouts of an exact age in a study: a trainer that trains each batch some updates after it was written."""

from collections import deque
from typing import Any

import torch

from cfpo_trl import CFPOTrainer


class Stale(CFPOTrainer):
    """Holds the batches of rollouts back for `staleness` updates; each is trained once, and has that age exactly.

    Until the first is old enough, updates change nothing: their advantages are 0. One update per batch of rollouts.
    """

    staleness: int

    def __init__(self, *arguments: Any, **keywords: Any):
        super().__init__(*arguments, **keywords)
        self._held: deque[dict[str, Any]] = deque()

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return batch
        if batch.get("old_per_token_logps") is None:  # TRL leaves them out where a batch is trained at once
            batch["old_per_token_logps"] = self._policy_logps(batch, "train")
        self._held.append(batch)
        if len(self._held) > self.staleness:
            return self._held.popleft()
        return batch | {"advantages": torch.zeros_like(batch["advantages"])}


def stale(trainer_class: type[CFPOTrainer], staleness: int) -> type[CFPOTrainer]:
    """The trainer with rollouts of that age; itself where that is 0."""
    if not staleness:
        return trainer_class
    return type("StaleTrainer", (Stale, trainer_class), {"staleness": staleness})
