"""The CFPO objective: r·A − |A| / (2ε) · (r − 1)², in pure torch.

Source: Clipping-Free Policy Optimization for Large Language Models, https://arxiv.org/abs/2601.22801
"""

import math

import torch
from torch import Tensor


def soft_clip(
    ratio: Tensor,
    advantages: Tensor,
    epsilon_low: float,
    epsilon_high: float | None = None,
    penalty_slope: float | None = None,
) -> Tensor:
    """The operator that takes the clip's place: c(r; A) = r − sign(A)·(r − 1)² / (2ε).

    c·A is the CFPO objective and never exceeds r·A, so `min(r·A, clip(r)·A)`, the surrogate of PPO and GRPO, becomes
    CFPO when its clip becomes this function. Half-precision ratios are promoted to fp32, and the result stays fp32:
    in bf16, c·A and r·A would tie for |r − 1| < 0.04 and the minimum would halve the penalty's gradient.

    Args:
        ratio: Importance ratios π_θ / π_old, `(B, T)` per token or `(B, 1)` per sequence.
        advantages: Advantages, broadcastable to `ratio`: `(B, 1)` or `(B, T)`. Only their sign counts here.
        epsilon_low: Trust-region width ε where the ratio is below 1; finite and above 0.
        epsilon_high: ε where the ratio is above 1; default `epsilon_low`.
        penalty_slope: Largest slope s of the penalty, in units of |A|, at least 1: the penalty is quadratic up to
            |r − 1| = s·ε, and linear beyond. Default: none, the paper's CFPO.

    Returns:
        The soft-clipped ratios, in the broadcast shape, fp32 or wider. Where the advantage is 0 they equal the ratio.

    Raises:
        ValueError: an epsilon is not finite or not above 0, or `penalty_slope` is not finite or below 1.
    """
    epsilon_high = epsilon_low if epsilon_high is None else epsilon_high
    check_epsilon("epsilon_low", epsilon_low)
    check_epsilon("epsilon_high", epsilon_high)
    ratio = ratio.to(torch.promote_types(ratio.dtype, torch.float32))
    sign = advantages.sign().to(ratio.dtype)
    excess = torch.where(sign == 0, 0.0, ratio - 1)  # an overflowing (r − 1)² times sign(0) would be NaN
    curvature = torch.where(excess < 0, sign / (2 * epsilon_low), sign / (2 * epsilon_high))
    if penalty_slope is None:
        return ratio - curvature * excess.square()
    check_penalty_slope(penalty_slope)
    inside = excess.clamp(-penalty_slope * epsilon_low, penalty_slope * epsilon_high)
    return ratio - curvature * inside.square() - sign * penalty_slope * (excess - inside).abs()


def cfpo_objective(
    ratio: Tensor,
    advantages: Tensor,
    epsilon_low: float,
    epsilon_high: float | None = None,
    penalty_slope: float | None = None,
) -> Tensor:
    """The CFPO objective per element, to be maximised: J(r, A) = r·A − |A| / (2ε)·(r − 1)²; the loss is −J.

    Its slope A − |A|·(r − 1)/ε is zero only at the optimum, r = 1 + ε·sign(A).

    Args:
        ratio: Importance ratios π_θ / π_old, `(B, T)` per token or `(B, 1)` per sequence. Values and gradients are
            finite in fp32 for |log r| ≤ 20.
        advantages: Advantages, broadcastable to `ratio`: `(B, 1)` or `(B, T)`.
        epsilon_low: Trust-region width ε where the ratio is below 1; finite and above 0.
        epsilon_high: ε where the ratio is above 1; default `epsilon_low`.
        penalty_slope: Largest slope of the penalty, in units of |A|; default none: see [`soft_clip`].

    Returns:
        J in the broadcast shape, fp32 or wider; exactly 0 where the advantage is 0, however large the ratio.

    Raises:
        ValueError: an epsilon is not finite or not above 0, or `penalty_slope` is not finite or below 1.
    """
    ratio = torch.where(advantages == 0, 1.0, ratio)
    return advantages * soft_clip(ratio, advantages, epsilon_low, epsilon_high, penalty_slope)


def clip(ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
    """What [`soft_clip`] replaces, for comparisons: PPO's clip on the side where it binds, so that c·A ≤ r·A.

    The other side never survives the minimum `min(r·A, clip(r)·A)`. Arguments as of [`soft_clip`].
    """
    return torch.where(advantages > 0, ratio.clamp(max=1 + epsilon_high), ratio.clamp(min=1 - epsilon_low))


def tv_distance(ratio: Tensor, mask: Tensor | None = None) -> Tensor:
    """Estimates TV(π_old, π_θ) = ½·E|r − 1| under π_old: the quantity that the penalty controls.

    Args:
        ratio: Importance ratios π_θ / π_old of tokens sampled from π_old, any shape.
        mask: Nonzero where a token counts, same shape as `ratio`; default all of them.

    Returns:
        The mean over the counted tokens, a scalar tensor in [0, ∞); 0 where none counts.
    """
    if mask is not None:
        ratio = ratio[mask.bool()]
    ratio = ratio.to(torch.promote_types(ratio.dtype, torch.float32))
    return (ratio - 1).abs().sum() / (2 * max(ratio.numel(), 1))


def check_epsilon(name: str, value: float) -> None:
    """Raises a `ValueError` that names the value, the rule and the fix unless 0 < value < ∞."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(
            f"{name}={value} is no trust-region width: it must be finite and above 0; the default is 0.2."
        )


def check_penalty_slope(value: float) -> None:
    """Raises a `ValueError` that names the value, the rule and the fix unless 1 ≤ value < ∞."""
    if not (value >= 1 and math.isfinite(value)):
        raise ValueError(
            f"penalty_slope={value} bounds the penalty's slope in units of |A|: it must be finite and at least 1, or "
            "nothing holds the ratio; leave it out for the paper's CFPO."
        )
