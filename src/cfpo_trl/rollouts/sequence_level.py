"""Ratios of whole completions in asynchronous training, whose packed rows TRL gives ratios of tokens."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LEVELS = ("token", "sequence")


def of_sequences(model: Callable[..., Any], inputs: dict[str, Tensor]) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """Model and inputs by which TRL's loss per token has the ratio of a token's completion in the token's place.

    That ratio is the geometric mean of its trained tokens' ratios, s = exp(mean log r), as with
    `importance_sampling_level: sequence` in synchronous training (https://arxiv.org/abs/2507.18071).

    Args:
        model: Returns `log_probs` and `entropy` of the packed tokens.
        inputs: A batch of TRL's packing: `token_index` says where each trained token was computed, which several
            completions with the same beginning may share; `segment_id` to which completion it belongs.
    """
    trained = inputs["token_index"] >= 0
    place, old_logps, completion = (inputs[name][trained] for name in ("token_index", "old_log_probs", "segment_id"))
    lengths = completion.bincount()

    def forward(**arguments: Any) -> Any:
        outputs = model(**arguments)
        log_ratio = outputs.log_probs.flatten()[place] - old_logps
        sums = log_ratio.new_zeros(len(lengths)).index_add(0, completion, log_ratio)
        outputs.log_probs = old_logps + (sums / lengths)[completion]
        outputs.entropy = outputs.entropy.flatten()[place]
        return outputs

    own_place = inputs["token_index"].masked_scatter(trained, torch.arange(len(place), device=place.device))
    return forward, inputs | {"token_index": own_place}
