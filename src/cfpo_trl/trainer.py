"""CFPOTrainer: TRL's GRPOTrainer with the soft clip in place of the clip, and the metrics of the trust region."""

import logging
import math
import textwrap
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import trl
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from .alignment import AlignmentTrainer, loss_mask
from .config import CFPOConfig, check_config, uses_rollouts_once
from .objective import soft_clip
from .signatures import like

METRICS = ("cfpo/tv", "cfpo/penalty", "cfpo/outside", "cfpo/ratio_min", "cfpo/ratio_max")


logger = logging.getLogger("cfpo_trl")


class SoftClip:
    """The soft clip for one batch: called with the ratio in place of `torch.clamp`, and keeps what the metrics need.

    Args:
        operator: The trainer's `soft_clip`.
        advantages: `(B,)`, or `(B, T)` with one per token.
        mask: `(B, T)`, nonzero at the tokens that the loss counts.
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
        self.advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
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
        """The values of real tokens, or of all sequences where they are one per sequence, in one dimension."""
        return values[self.mask.bool()] if values.shape == self.mask.shape else values.flatten()


class SoftClipEpsilon(float):
    """An ε whose bounds `1 - ε` and `1 + ε` make `torch.clamp` run the soft clip; elsewhere it is a plain number.

    `torch.clamp` hands the call over by PyTorch's protocol for arguments that are not tensors,
    https://docs.pytorch.org/docs/stable/notes/extending.html#extending-torch-python-api.
    """

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


class CFPOTrainer(AlignmentTrainer):
    """Trains with Clipping-Free Policy Optimization (https://arxiv.org/abs/2601.22801); a drop-in `GRPOTrainer`.

    Takes the arguments of [`~trl.GRPOTrainer`] and keeps all of its features: the loss is TRL's own, with the clip of
    the ratio replaced by [`~cfpo_trl.soft_clip`]. `args` is a [`CFPOConfig`] or a plain `GRPOConfig`.

    Logs, over the real tokens of all processes since the last log, in training and in evaluation: `cfpo/tv`,
    `cfpo/penalty`, `cfpo/outside`, `cfpo/ratio_min` and `cfpo/ratio_max`, beside all that `GRPOTrainer` logs.

    Raises:
        ValueError: before any model is loaded, where the configuration has no clip to replace or an epsilon is
            invalid; see [`~cfpo_trl.config.check_config`].
        RuntimeError: at the first loss, where the installed TRL no longer clips in the way that this trainer replaces.

    Example:

        >>> trainer = CFPOTrainer("Qwen/Qwen2.5-1.5B-Instruct", reward_funcs=accuracy_reward, train_dataset=dataset)
        >>> trainer.train()
    """

    _tag_names: ClassVar[list[str]] = ["trl", "cfpo"]
    _name = "CFPO"
    _paper: ClassVar[dict[str, str]] = {
        "title": "Clipping-Free Policy Optimization for Large Language Models",
        "id": "2601.22801",
        "citation": textwrap.dedent("""\
            @article{cagatan2026clipping,
                title   = {Clipping-Free Policy Optimization for Large Language Models},
                author  = {{\\c{C}}a{\\u{g}}atan, {\\"O}mer Veysel and Akg{\\"u}n, Bar{\\i}{\\c{s}} and {\\c{S}}ahin, G{\\"o}zde G{\\"u}l and Zhao, Xuandong},
                journal = {arXiv preprint arXiv:2601.22801},
                year    = {2026},
            }"""),  # noqa: E501
    }

    @like(GRPOTrainer.__init__)
    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *positional: Any,
        **keywords: Any,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else model.config._name_or_path
            args = CFPOConfig(f"{model_name.split('/')[-1]}-CFPO")
        check_config(args)
        self._trust_region: dict[str, list[Tensor]] = defaultdict(list)
        super().__init__(model, reward_funcs, args, *positional, **keywords)
        if uses_rollouts_once(self.args) and self.accelerator.is_main_process:
            logger.warning(
                "Every batch of rollouts is used for one update: all ratios are 1, and CFPO is GRPO. They differ with "
                "num_iterations above 1, or with steps_per_generation above gradient_accumulation_steps."
            )

    def soft_clip(self, ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
        """What takes the clip's place: [`~cfpo_trl.soft_clip`]. A subclass may exchange it, with c·A ≤ r·A."""
        penalty_slope = getattr(self.args, "penalty_slope", None)  # a plain GRPOConfig has none
        return soft_clip(ratio, advantages, epsilon_low, epsilon_high, penalty_slope)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """GRPO's loss with the soft clip in place of the clip, for one batch; a scalar.

        Raises:
            RuntimeError: the soft clip did not run exactly once, so the installed TRL is not supported.
        """
        mask = loss_mask(inputs)
        epsilons = self.epsilon_low, self.epsilon_high
        clip = SoftClip(self.soft_clip, inputs["advantages"], mask, *epsilons)
        self.epsilon_low, self.epsilon_high = (SoftClipEpsilon(epsilon, clip) for epsilon in epsilons)
        try:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.epsilon_low, self.epsilon_high = epsilons
        if clip.calls != 1:
            raise RuntimeError(
                f"GRPOTrainer of TRL {trl.__version__} ran CFPO's soft clip {clip.calls} times in one loss instead of "
                "once, so its loss is not CFPO's. Install a TRL version that cfpo_trl supports: trl>=1.0,<1.17."
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
        sums = [(ratio - 1).abs().sum() / 2, outside.sum(), penalty.sum(), *counts]
        self._trust_region["train" if self.model.training else "eval"].append(torch.stack([*sums, low, -high]))

    def log(self, *args: Any, **kwargs: Any) -> None:
        """TRL's log, with the trust region over all tokens since the last one, however they were split."""
        mode = "train" if self.model.training else "eval"
        if notes := self._trust_region.pop(mode, []):
            sums, extremes = torch.stack(notes).split([5, 2], dim=1)
            sums = self.accelerator.reduce(sums.sum(dim=0), reduction="sum").tolist()
            tv, outside, penalty, ratios, penalties = sums
            low, minus_high = self.accelerator.gather(extremes.amin(dim=0)).view(-1, 2).amin(dim=0).tolist()
            if ratios and penalties:  # else every completion was cut off and masked
                values = (tv / ratios, penalty / penalties, outside / ratios, low, -minus_high)
                self._metrics[mode].update({name: [value] for name, value in zip(METRICS, values, strict=True)})
        super().log(*args, **kwargs)
