"""Advantages of a group of completions, and the KL to the reference as part of their reward, in pure torch."""

import torch
from torch import Tensor

KL_ESTIMATORS = ("k1", "k2", "k3")
KL_BOUND = 10.0  # OpenRLHF's: a token's estimate stays within ±10


def leave_one_out(rewards: Tensor, num_generations: int) -> Tensor:
    """RLOO: a_i = R_i − mean of the other rewards of its prompt; not divided by a standard deviation.

    Equals k / (k − 1) times the group's mean-centred reward. Source: https://arxiv.org/abs/2402.14740

    Args:
        rewards: `(N,)`, the `num_generations` completions of a prompt one after the other; NaN where none applied.
        num_generations: Completions per prompt, k.

    Returns:
        Advantages `(N,)`. NaN rewards count in no baseline; their advantages are NaN, and so is that of a reward
        without another one in its group.
    """
    groups = rewards.view(-1, num_generations)
    others = (~groups.isnan()).sum(dim=1, keepdim=True) - 1
    baseline = (groups.nansum(dim=1, keepdim=True) - groups) / others
    return (groups - baseline).flatten()


def mean_centred(rewards: Tensor, num_generations: int, scale: str) -> Tensor:
    """GRPO: a_i = R_i − mean of its prompt's rewards, over their standard deviation + 1e-4 as `scale` says.

    Source: https://arxiv.org/abs/2402.03300; `scale="none"` is Dr. GRPO, https://arxiv.org/abs/2503.20783.

    Args:
        rewards: `(N,)`, the `num_generations` completions of a prompt one after the other; NaN where none applied.
        num_generations: Completions per prompt.
        scale: `group` or `batch`, whose standard deviation divides; or `none`.

    Returns:
        Advantages `(N,)`; NaN where the reward is.
    """
    groups = rewards.view(-1, num_generations)
    centred = groups - groups.nanmean(dim=1, keepdim=True)
    if scale == "group":
        centred = centred / (nan_std(groups) + 1e-4)
    elif scale == "batch":
        centred = centred / (nan_std(rewards.view(1, -1)) + 1e-4)
    return centred.flatten()


def nan_std(rows: Tensor) -> Tensor:
    """Unbiased standard deviation `(rows, 1)` of each row's numbers that are not NaN."""
    deviations = rows - rows.nanmean(dim=1, keepdim=True)
    return (deviations.square().nansum(dim=1, keepdim=True) / ((~rows.isnan()).sum(dim=1, keepdim=True) - 1)).sqrt()


def approximate_kl(logps: Tensor, ref_logps: Tensor, estimator: str) -> Tensor:
    """Estimates KL(π, π_ref) at tokens sampled from π: k1 = x, k2 = x²/2, k3 = e^−x − 1 + x, x = log π − log π_ref.

    Source: http://joschu.net/blog/kl-approx.html

    Args:
        logps: Log-probs of the policy that sampled the tokens, `(B, T)`.
        ref_logps: Log-probs of the reference, `(B, T)`.
        estimator: `k1` (unbiased, of either sign), `k2` (biased, at least 0) or `k3` (unbiased, at least 0).

    Returns:
        A number per token, `(B, T)`, in nats.
    """
    x = logps.float() - ref_logps.float()
    return {"k1": lambda: x, "k2": lambda: x.square() / 2, "k3": lambda: torch.expm1(-x) + x}[estimator]()


def reward_to_go(per_token: Tensor) -> Tensor:
    """Σ_{s ≥ t} of `(B, T)` along the completion."""
    return per_token.flip(1).cumsum(1).flip(1)
