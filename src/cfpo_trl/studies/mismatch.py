"""Rollouts of another arithmetic in a study: with weights in bfloat16, as inference engines have them."""

from typing import Any

import torch

from cfpo_trl import CFPOTrainer


class Mismatched(CFPOTrainer):
    """Has its batches written with weights in `rollout_dtype`; the log-probs of these are the ratio's old ones.

    So the ratio is off 1 before any update. Evaluation is with the weights as they are.
    """

    rollout_dtype: torch.dtype

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        weights = [(parameter, parameter.data) for parameter in self.model.parameters()]
        for parameter, data in weights:
            parameter.data = data.to(self.rollout_dtype)
        try:
            batch = super()._generate_and_score_completions(inputs)
            batch["old_per_token_logps"] = self._policy_logps(batch, "train")  # TRL leaves them out, where it may
        finally:
            for parameter, data in weights:
                parameter.data = data
        return batch


def mismatched(trainer_class: type[CFPOTrainer], dtype: str | None) -> type[CFPOTrainer]:
    """The trainer with rollouts in that dtype, such as `bfloat16`; itself where that is None."""
    if dtype is None:
        return trainer_class
    return type("MismatchedTrainer", (Mismatched, trainer_class), {"rollout_dtype": getattr(torch, dtype)})
