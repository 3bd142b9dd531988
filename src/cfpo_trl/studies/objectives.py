"""What the comparisons train with: the clip, the soft clip, and candidates for a better penalty.

Each is an operator c(ratio, advantages, epsilon_low, epsilon_high) in the clip's place, with c·A ≤ r·A. A candidate is
a penalty P(r, ε) ≥ 0 per unit of |A|: c = r − sign(A)·P, as CFPO's own P = (r − 1)² / (2ε).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cfpo_trl import CFPOTrainer, soft_clip, tv_distance
from cfpo_trl.imports import imported
from cfpo_trl.objective import clip

from . import field

Operator = Callable[[Tensor, Tensor, float, float], Tensor]
Penalty = Callable[[Tensor, Tensor], Tensor]


def quadratic(ratio: Tensor, epsilon: Tensor) -> Tensor:
    """CFPO's own."""
    return (ratio - 1).square() / (2 * epsilon)


def smooth(slope: float) -> Penalty:
    """Pseudo-Huber: slope²·ε·(√(1 + ((r − 1) / (slope·ε))²) − 1); its slope nears `slope`."""

    def penalty(ratio: Tensor, epsilon: Tensor) -> Tensor:
        return slope**2 * epsilon * ((1 + ((ratio - 1) / (slope * epsilon)).square()).sqrt() - 1)

    return penalty


def bounded(slope: float) -> Penalty:
    """The quadratic up to slope·ε from 1, and from there a line of that slope: `penalty_slope`'s."""

    def penalty(ratio: Tensor, epsilon: Tensor) -> Tensor:
        shift = (ratio - 1).abs()
        return torch.where(shift < slope * epsilon, quadratic(ratio, epsilon), slope * (shift - slope * epsilon / 2))

    return penalty


def logarithmic(ratio: Tensor, epsilon: Tensor) -> Tensor:
    """The quadratic in log r: no weight r in its gradient."""
    return ratio.log().square() / (2 * epsilon)


def operator(penalty: Penalty, one_sided: bool = False) -> Operator:
    """The soft clip with another penalty; `one_sided`: only where the ratio went the way that the advantage points."""

    def candidate(ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
        ratio = ratio.to(torch.promote_types(ratio.dtype, torch.float32))
        sign = advantages.sign().to(ratio.dtype).expand_as(ratio)
        counted = (sign * (ratio - 1) > 0) if one_sided else (sign != 0)
        inner = torch.where(counted, ratio, 1.0)  # an overflow outside must not come back as inf·0
        epsilon = torch.where(ratio < 1, ratio.new_tensor(epsilon_low), ratio.new_tensor(epsilon_high))
        return ratio - sign * torch.where(counted, penalty(inner, epsilon), 0.0)

    return candidate


class Adaptive:
    """CFPO whose ε is scaled to hold the measured TV at a target: the constraint that the penalty relaxes.

    An update that finds the TV above it shrinks ε by 5 %, one below grows it, within a factor of 10 of the given ε.
    """

    def __init__(self, target: float):
        self.target, self.scale = target, 1.0

    def __call__(self, ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
        scale = self.scale
        tv = tv_distance(ratio.detach(), advantages.expand_as(ratio))
        if tv > 0:  # else it is the first update of a batch, which says nothing
            self.scale = min(max(scale * (1.05 if tv < self.target else 1 / 1.05), 0.1), 10.0)
        return soft_clip(ratio, advantages, epsilon_low * scale, epsilon_high * scale)


PLAIN = {
    "cfpo": soft_clip,
    "grpo": clip,
    "log": operator(logarithmic),
    "one_sided": operator(quadratic, one_sided=True),
}
WITH_NUMBER: dict[str, Callable[[float], Operator]] = {
    "bounded": lambda slope: partial(soft_clip, penalty_slope=slope),
    "smooth": lambda slope: operator(smooth(slope)),
    "one_sided": lambda slope: operator(bounded(slope), one_sided=True),
    "adaptive": Adaptive,
}


def build(name: str) -> Operator:
    """The operator that a study names: grpo, log, bounded-1.25, smooth-1.25, …, or the dotted path of a user's own.

    Raises:
        ValueError: there is none of that name; the choices that it lists are the field's, too.
    """
    if (found := named(name, PLAIN, WITH_NUMBER)) is not None:
        return found
    kind = name.partition("-")[0]
    if "." in kind:
        return imported("objective", name)
    choices = [*PLAIN, *field.PLAIN, *(f"{kind}-<number>" for kind in (*WITH_NUMBER, *field.WITH_NUMBER))]
    raise ValueError(
        f"objective={name!r} is unknown; use one of {', '.join(choices)}, or the dotted path of your own."
    )


def named(name: str, plain: dict[str, Any], with_number: dict[str, Callable[[float], Any]]) -> Any:
    """What has that name among `plain`, or that kind and number, such as `bounded-1.25`; else None."""
    kind, _, number = name.partition("-")
    if kind in with_number and number:
        return with_number[kind](float(number))
    return plain.get(name)


def trainer_of(objective: str) -> type[CFPOTrainer]:
    """A trainer with that objective, which logs `cfpo/*` for each; all else is CFPOTrainer's.

    `cfpo/penalty` says nothing of the field's objectives, see [`~cfpo_trl.studies.field`].
    """
    if objective == "cfpo":
        return CFPOTrainer  # with its own penalty_slope
    surrogate = named(objective, field.PLAIN, field.WITH_NUMBER)
    if surrogate is not None:
        return type("FieldTrainer", (SurrogateTrainer,), {"surrogate": staticmethod(surrogate)})
    return type("ComparedTrainer", (CFPOTrainer,), {"soft_clip": staticmethod(build(objective))})


class SurrogateTrainer(CFPOTrainer):
    """A trainer whose loss has the gradient of a surrogate of [`~cfpo_trl.studies.field`]."""

    surrogate: field.Surrogate

    def counted_advantages(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """CFPOTrainer's; notes what a surrogate needs beside the ratio."""
        advantages, self._mask = super().counted_advantages(inputs)
        self._old_logps = inputs.get("old_per_token_logps")
        return advantages, self._mask

    def soft_clip(self, ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
        """The surrogate in the clip's place."""
        ratio = ratio.to(torch.promote_types(ratio.dtype, torch.float32))
        advantages = (advantages * self._mask).to(ratio.dtype)
        old_logps = torch.zeros_like(ratio) if self._old_logps is None else self._old_logps
        tokens = field.Tokens(ratio, old_logps.detach(), advantages, self._mask, epsilon_low, epsilon_high)
        return field.below(ratio, advantages, self.surrogate(tokens))
