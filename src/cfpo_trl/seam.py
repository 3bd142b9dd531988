"""The soft clip in the clip's place, for any TRL trainer that clips; and the metrics of the trust region."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import trl
from torch import Tensor, nn

from .objective import soft_clip

METRICS = ("cfpo/tv", "cfpo/penalty", "cfpo/outside", "cfpo/ess", "cfpo/ratio_min", "cfpo/ratio_max")


class SoftClip:
    """The soft clip for one batch: called with the ratio in place of `torch.clamp`, and keeps what the metrics need.

    Args:
        operator: The trainer's `soft_clip`.
        advantages: `(B,)`, or of the mask's shape with one per token.
        mask: `(B, T)`, or `(M,)` where rows are packed; nonzero at the tokens that the loss counts.
        epsilon_low: Trust-region width where the ratio is below 1.
        epsilon_high: Trust-region width where the ratio is above 1.
    """

    def __init__(
        self,
        operator: Callable[[Tensor, Tensor, float, float], Tensor],
        advantages: Tensor,
        mask: Tensor,
        epsilon_low: float,
        epsilon_high: float,
    ):
        self.operator = operator
        self.advantages = advantages.unsqueeze(1) if advantages.dim() < mask.dim() else advantages
        self.mask = mask
        self.epsilon_low, self.epsilon_high = epsilon_low, epsilon_high
        self.calls = 0

    def __call__(self, ratio: Tensor) -> Tensor:
        self.calls += 1
        advantages = self.advantages
        if self.mask.shape in (ratio.shape, advantages.shape):
            # Padding was never sampled, so nothing bounds its ratio: keep an overflowing penalty out of inf·0.
            advantages = advantages * self.mask
        clipped = self.operator(ratio, advantages, self.epsilon_low, self.epsilon_high)
        self.ratio, self.clipped = ratio.detach(), clipped.detach()
        return clipped

    def counted(self, values: Tensor) -> Tensor:
        """The values of real tokens, or of sequences that have some where they are one each, in one dimension."""
        return values[self.mask.bool() if values.shape == self.mask.shape else self.mask.any(dim=1)].flatten()


class SoftClipEpsilon(float):
    """An ε whose bounds `1 - ε` and `1 + ε` make `torch.clamp` run the soft clip; elsewhere it is a plain number.

    `torch.clamp` hands the call over by PyTorch's protocol for arguments that are not tensors,
    https://docs.pytorch.org/docs/stable/notes/extending.html#extending-torch-python-api.
    """

    clip: SoftClip

    def __new__(cls, value: float, clip: SoftClip) -> "SoftClipEpsilon":
        self = super().__new__(cls, value)
        self.clip = clip
        return self

    def __rsub__(self, one: float) -> "SoftClipEpsilon":
        return SoftClipEpsilon(one - float(self), self.clip)

    def __radd__(self, one: float) -> "SoftClipEpsilon":
        return SoftClipEpsilon(one + float(self), self.clip)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.clamp and len(args) == 3:
            ratio, low, _ = args
            return low.clip(ratio)
        plain = [float(arg) if isinstance(arg, cls) else arg for arg in args]
        named = {name: float(arg) if isinstance(arg, cls) else arg for name, arg in (kwargs or {}).items()}
        return func(*plain, **named)


class SoftClipSeam:
    """Mixed into a TRL trainer, before it: the trainer's own code computes the loss, with the soft clip as its clip.

    The trainer reads `self.epsilon_low` and `self.epsilon_high` in its `compute_loss`, and hands `1 - epsilon_low` and
    `1 + epsilon_high` to one call of `torch.clamp` on its ratio.

    Logs, over the counted tokens of all processes since the last log, in training and in evaluation: `cfpo/tv`,
    `cfpo/penalty`, `cfpo/outside`, `cfpo/ratio_min` and `cfpo/ratio_max`; and `cfpo/ess`, the effective sample size
    (Σr)²/(n·Σr²).
    """

    # The trainer's own
    args: Any
    model: Any
    accelerator: Any
    epsilon_low: float
    epsilon_high: float
    _metrics: dict[str, Any]

    def __init__(self, *args: Any, **kwargs: Any):
        self._trust_region: dict[str, list[Tensor]] = defaultdict(list)
        super().__init__(*args, **kwargs)

    def soft_clip(self, ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
        """What takes the clip's place: [`~cfpo_trl.soft_clip`]. A subclass may exchange it, with c·A ≤ r·A."""
        penalty_slope = getattr(self.args, "penalty_slope", None)  # a plain GRPOConfig has none
        return soft_clip(ratio, advantages, epsilon_low, epsilon_high, penalty_slope)

    def counted_advantages(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The batch's advantages, and the mask of the tokens that its loss counts: see [`SoftClip`]."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The trainer's loss with the soft clip in place of the clip, for one batch; a scalar.

        Raises:
            RuntimeError: the soft clip did not run exactly once, so the installed TRL is not supported.
        """
        epsilons = self.epsilon_low, self.epsilon_high
        clip = SoftClip(self.soft_clip, *self.counted_advantages(inputs), *epsilons)
        self.epsilon_low, self.epsilon_high = (SoftClipEpsilon(epsilon, clip) for epsilon in epsilons)
        try:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        finally:
            self.epsilon_low, self.epsilon_high = epsilons
        if clip.calls != 1:
            raise RuntimeError(
                f"TRL {trl.__version__} ran CFPO's soft clip {clip.calls} times in one loss instead of once, so its "
                "loss is not CFPO's. Install a TRL version that cfpo_trl supports: trl>=1.0,<1.17."
            )
        self._note_trust_region(clip)
        return loss

    @torch.no_grad()
    def _note_trust_region(self, clip: SoftClip) -> None:
        penalty = (clip.ratio - clip.clipped) * clip.advantages
        ratio, penalty = clip.counted(clip.ratio).float(), clip.counted(penalty)
        outside = (ratio < 1 - clip.epsilon_low) | (ratio > 1 + clip.epsilon_high)
        low, high = ratio.aminmax() if len(ratio) else (ratio.new_tensor(math.inf), ratio.new_tensor(-math.inf))
        counts = [ratio.new_tensor(ratio.numel()), ratio.new_tensor(penalty.numel())]
        moments = [ratio.sum(), ratio.square().sum()]
        sums = [(ratio - 1).abs().sum() / 2, outside.sum(), penalty.sum(), *moments, *counts]
        self._trust_region["train" if self.model.training else "eval"].append(torch.stack([*sums, low, -high]))

    def log(self, *args: Any, **kwargs: Any) -> None:
        """The trainer's log, with the trust region over all tokens since the last one, however they were split."""
        mode = "train" if self.model.training else "eval"
        if notes := self._trust_region.pop(mode, []):
            sums, extremes = torch.stack(notes).split([7, 2], dim=1)
            sums = self.accelerator.reduce(sums.sum(dim=0), reduction="sum").tolist()
            tv, outside, penalty, ratio, square, ratios, penalties = sums
            low, minus_high = self.accelerator.gather(extremes.amin(dim=0)).view(-1, 2).amin(dim=0).tolist()
            if ratios and penalties:  # else every completion was cut off and masked
                ess = ratio**2 / (ratios * square)
                values = (tv / ratios, penalty / penalties, outside / ratios, ess, low, -minus_high)
                self._metrics[mode].update({name: [value] for name, value in zip(METRICS, values, strict=True)})
        super().log(*args, **kwargs)  # type: ignore[misc]
