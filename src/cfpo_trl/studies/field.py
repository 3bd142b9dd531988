"""The field's other objectives, each by a surrogate whose gradient is the paper's; a study compares them with CFPO.

Per token, to be maximised; r = π_θ / π_old, A the advantage, μ the probability under π_old, w the ratio of the whole
completion, and sg(x) a number without a gradient. How a batch of them becomes one loss is the study's `loss_type`,
alike for all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cfpo_trl.objective import clip

LOG_BOUND = 20.0  # of the logarithm of a completion's ratio, as in TRL's VESPO


@dataclass
class Tokens:
    """A batch of tokens.

    Args:
        ratio: r, `(B, T)`, with its gradient.
        old_logps: log μ, `(B, T)`; 0 where the policy has not moved, and nothing depends on it.
        advantages: A, `(B, T)`, 0 at padding.
        mask: `(B, T)`, nonzero at the policy's own tokens.
        epsilon_low, epsilon_high: The study's widths, for the objectives that have any.
    """

    ratio: Tensor
    old_logps: Tensor
    advantages: Tensor
    mask: Tensor
    epsilon_low: float
    epsilon_high: float

    @property
    def log_ratio(self) -> Tensor:
        """log r, `(B, T)`: its gradient is that of log π_θ."""
        return self.ratio.clamp(min=1e-12).log() * (self.mask != 0)

    @property
    def log_weight(self) -> Tensor:
        """log w, `(B, 1)`."""
        return self.log_ratio.sum(dim=1, keepdim=True).clamp(-LOG_BOUND, LOG_BOUND)


Surrogate = Callable[[Tokens], Tensor]


def unclipped(tokens: Tokens) -> Tensor:
    """r·A: no trust region at all."""
    return tokens.ratio * tokens.advantages


def negative_clip(tokens: Tokens) -> Tensor:
    """r·A where A ≥ 0, max(r, 1 − ε)·A where A < 0: what is good may grow without bound."""
    clipped = tokens.ratio.clamp(min=1 - tokens.epsilon_low)
    return torch.where(tokens.advantages < 0, clipped, tokens.ratio) * tokens.advantages


def gspo(tokens: Tokens) -> Tensor:
    """min(s·A, clip(s, 1 ± ε)·A) with s = exp(mean log r) of the completion, https://arxiv.org/abs/2507.18071."""
    lengths = (tokens.mask != 0).sum(dim=1, keepdim=True).clamp(min=1)
    ratio = (tokens.log_ratio.sum(dim=1, keepdim=True) / lengths).exp()
    clipped = clip(ratio, tokens.advantages, tokens.epsilon_low, tokens.epsilon_high)
    return torch.minimum(ratio * tokens.advantages, clipped * tokens.advantages)


def cispo(cap: float) -> Surrogate:
    """sg(min(r, cap))·A·log π_θ, https://arxiv.org/abs/2506.13585; `cap` is the paper's 1 + ε_high."""

    def surrogate(tokens: Tokens) -> Tensor:
        return tokens.ratio.detach().clamp(max=cap) * tokens.advantages * tokens.log_ratio

    return surrogate


def sapo(negative: float) -> Surrogate:
    """(4/τ)·σ(τ·(r − 1))·A with τ = 1 where A > 0, else `negative`, https://arxiv.org/abs/2511.20347."""

    def surrogate(tokens: Tokens) -> Tensor:
        temperature = torch.ones_like(tokens.advantages).masked_fill(tokens.advantages <= 0, negative)
        return 4 / temperature * torch.sigmoid(temperature * (tokens.ratio - 1)) * tokens.advantages

    return surrogate


def vespo(tokens: Tokens) -> Tensor:
    """sg(w^k·e^{λ·(1 − w)})·A·log π_θ; (k, λ) = (2, 3) where A ≥ 0, else (3, 2), https://arxiv.org/abs/2602.10693."""
    good = tokens.advantages >= 0
    power, rate = torch.where(good, 2, 3), torch.where(good, 3, 2)
    log_weight = tokens.log_weight.detach()
    shape = (power * log_weight + rate * (1 - log_weight.exp())).exp()
    return shape * tokens.advantages * tokens.log_ratio


def drpo(delta: float) -> Surrogate:
    """r·A − |A|·μ·(r − 1)²/(2δ): the quadratic on the probability's shift, https://arxiv.org/abs/2606.09821."""

    def surrogate(tokens: Tokens) -> Tensor:
        penalty = tokens.old_logps.exp() * (tokens.ratio - 1).square() / (2 * delta)
        return tokens.ratio * tokens.advantages - tokens.advantages.abs() * penalty

    return surrogate


def dppo(delta: float) -> Surrogate:
    """r·A, but for tokens whose probability has moved the way of A by more than δ, https://arxiv.org/abs/2602.04879.

    The moved probability is the binary total variation between the policies: the token, or any other.
    """

    def surrogate(tokens: Tokens) -> Tensor:
        shift = tokens.old_logps.exp() * (tokens.ratio.detach() - 1)
        return torch.where(tokens.advantages.sign() * shift > delta, 0.0, tokens.ratio * tokens.advantages)

    return surrogate


def m2po(bound: float) -> Surrogate:
    """r·A, but of the tokens with (r − 1)·A > 0 those of the largest (log r)² are left out.

    So many of the micro-batch that the mean (log r)² of the others is at most `bound`; the paper has 0.04,
    https://arxiv.org/abs/2510.01161.
    """

    def surrogate(tokens: Tokens) -> Tensor:
        square = tokens.log_ratio.detach().square()
        outward = ((tokens.ratio.detach() - 1) * tokens.advantages > 0) & (tokens.mask != 0)
        ordered, places = square[outward].sort()
        kept = ordered.cumsum(0) <= bound * torch.arange(1, len(ordered) + 1, device=ordered.device)
        masked = outward.clone()
        masked[outward] = ~torch.zeros_like(kept).scatter(0, places, kept)
        return torch.where(masked, 0.0, tokens.ratio * tokens.advantages)

    return surrogate


def topr(tokens: Tokens) -> Tensor:
    """A·log π_θ where A ≥ 0, else sg(min(w, 1))·A·log π_θ, https://arxiv.org/abs/2503.14286."""
    tapered = tokens.log_weight.detach().exp().clamp(max=1.0)
    return torch.where(tokens.advantages < 0, tapered, 1.0) * tokens.advantages * tokens.log_ratio


def truncated(pull: float) -> Surrogate:
    """sg(min(r, 1)·(1 − clip(x, −pull, 1)))·A·log π_θ with x = sign(A)·(r − 1)/ε: a candidate, of no paper.

    The bounded penalty's gradient with a weight of at most 1, so that no token counts for more than it was sampled,
    and with a bound of its own on the pull back where the ratio went against A: with 1 it is `penalty_slope: 1`'s.
    """

    def surrogate(tokens: Tokens) -> Tensor:
        ratio = tokens.ratio.detach()
        epsilon = torch.where(ratio < 1, ratio.new_tensor(tokens.epsilon_low), ratio.new_tensor(tokens.epsilon_high))
        outward = tokens.advantages.sign() * (ratio - 1) / epsilon
        return ratio.clamp(max=1) * (1 - outward.clamp(-pull, 1)) * tokens.advantages * tokens.log_ratio

    return surrogate


PLAIN: dict[str, Surrogate] = {
    "unclipped": unclipped,
    "negative_clip": negative_clip,
    "gspo": gspo,
    "vespo": vespo,
    "topr": topr,
}
WITH_NUMBER: dict[str, Callable[[float], Surrogate]] = {
    "cispo": cispo,
    "sapo": sapo,
    "drpo": drpo,
    "dppo": dppo,
    "m2po": m2po,
    "truncated": truncated,
}


def below(ratio: Tensor, advantages: Tensor, value: Tensor) -> Tensor:
    """c in the clip's place, with c·A < r·A, so that the minimum takes it, and with the gradient of `value`.

    The number c·A itself, which the log has as loss, is a little less than r·A.
    """
    apart = advantages != 0
    divisor = torch.where(apart, advantages, 1.0)
    shifted = ratio.detach() - advantages.sign() * (1 + ratio.detach().abs()) / 1000
    return torch.where(apart, shifted + (value - value.detach()) / divisor, ratio.detach())
