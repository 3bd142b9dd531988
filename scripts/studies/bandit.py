"""A softmax bandit with exact gradients: what each objective does when rollouts are reused, in seconds.

python scripts/studies/bandit.py     (or `make bandit`; writes runs/bandit/bandit.png and prints a table)

A policy over K tokens in C contexts has logits X·W: features X (C, D), weights W (D, K). A batch of rollouts is the
whole distribution π_old with its advantages, so nothing is random; an update is a gradient step on Σ π_old·c(r; A)·A.
With D = C every context has parameters of its own; with D < C contexts share them, as prompts share a network.
"""

import argparse
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from cfpo_trl.studies.objectives import Operator, build

matplotlib.use("Agg")

EPSILON = 0.2
CONTEXTS, TOKENS = 24, 6
OBJECTIVES = ("grpo", "cfpo", "bounded-1.25", "bounded-1")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
STYLES = ("--", "-", "-.", ":")


def group_advantages(policy: Tensor, rewards: Tensor) -> Tensor:
    """GRPO's, of infinitely many completions: (R − E[R]) / (standard deviation + 1e-4); both `(C, K)`."""
    mean = (policy * rewards).sum(1, keepdim=True)
    deviation = (policy * (rewards - mean).square()).sum(1, keepdim=True).sqrt()
    return (rewards - mean) / (deviation + 1e-4)


def loss(logits: Tensor, old_policy: Tensor, advantages: Tensor, operator: Operator) -> Tensor:
    """The surrogate's negative, exact over the tokens of each context and averaged over contexts; all `(C, K)`."""
    ratio = logits.softmax(1) / old_policy
    clipped = operator(ratio, advantages, EPSILON, EPSILON)
    return -(old_policy * torch.minimum(ratio * advantages, clipped * advantages)).sum(1).mean()


def inner_optimum(old_policy: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """The policy that CFPO's updates on one batch converge to, `(C, K)`, where it has no negative entry.

    Setting the slope A − |A|·(r − 1)/ε to one λ per context, which keeps the sum of probabilities:
    r = 1 + ε·(sign(A) − λ/|A|), with λ = E[sign(A)] / E[1/|A|] under π_old.
    """
    multiplier = (old_policy * advantages.sign()).sum(1, keepdim=True)
    multiplier = multiplier / (old_policy / advantages.abs()).sum(1, keepdim=True)
    return old_policy * (1 + epsilon * (advantages.sign() - multiplier / advantages.abs()))


def train(
    features: Tensor,
    weights: Tensor,
    rewards: Tensor,
    operator: Operator,
    batches: int,
    iterations: int,
    learning_rate: float,
) -> list[dict[str, float]]:
    """Trains `weights` (D, K) with Adam; per batch the expected reward, and TV to π_old after its last update."""
    weights = weights.clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=learning_rate)
    history = []
    for _ in range(batches):
        old_policy = (features @ weights).softmax(1).detach()
        advantages = group_advantages(old_policy, rewards)
        for _ in range(iterations):
            optimizer.zero_grad()
            loss(features @ weights, old_policy, advantages, operator).backward()
            optimizer.step()
        policy = (features @ weights).softmax(1).detach()
        history.append(
            {
                "reward": (policy * rewards).sum(1).mean().item(),
                "tv": (policy - old_policy).abs().sum(1).mean().item() / 2,
            }
        )
    return history


def problem(dimensions: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features `(C, D)`, start weights `(D, K)` and rewards `(C, K)`: one token of each context is right."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.eye(CONTEXTS, dtype=torch.float64)
    if dimensions < CONTEXTS:
        features = torch.randn(CONTEXTS, dimensions, generator=generator, dtype=torch.float64) / dimensions**0.5
    right = (features @ torch.randn(dimensions, TOKENS, generator=generator, dtype=torch.float64)).argmax(1)
    rewards = torch.nn.functional.one_hot(right, TOKENS).double()
    return features, torch.zeros(dimensions, TOKENS, dtype=torch.float64), rewards


def regime(batches: int, iterations: list[int], learning_rates: list[float], seeds: int) -> dict[str, Tensor]:
    """Expected reward after training, for each objective `(iterations, learning rates)`, contexts sharing weights."""
    return {
        name: torch.tensor(
            [
                [
                    sum(
                        train(*problem(8, seed), build(name), batches, count, rate)[-1]["reward"]
                        for seed in range(seeds)
                    )
                    / seeds
                    for rate in learning_rates
                ]
                for count in iterations
            ]
        )
        for name in OBJECTIVES
    }


def plot_objectives(values: plt.Axes, slopes: plt.Axes) -> None:
    """The objective and its slope in the ratio, for A = 1 and A = −1."""
    for name, color, style in zip(OBJECTIVES, COLORS, STYLES, strict=True):
        for sign, width in ((1.0, 2.0), (-1.0, 1.0)):
            ratio = torch.linspace(0, 3, 601).requires_grad_()
            advantages = torch.full_like(ratio, sign)
            value = torch.minimum(ratio * advantages, build(name)(ratio, advantages, EPSILON, EPSILON) * advantages)
            (slope,) = torch.autograd.grad(value.sum(), ratio)
            for axis, y in ((values, value), (slopes, slope)):
                x, label = ratio.detach(), name if sign > 0 else None
                axis.plot(x, y.detach(), color=color, linestyle=style, linewidth=width, label=label)
    values.set(ylim=(-6, 2), xlabel="ratio r", ylabel="objective", title="objective: A = 1 thick, A = −1 thin")
    slopes.set(ylim=(-4, 4), xlabel="ratio r", ylabel="slope", title="its slope")
    values.legend(fontsize=8)


def plot_one_batch(axis: plt.Axes, dimensions: int, learning_rate: float) -> None:
    features, weights, rewards = problem(dimensions, 0)
    updates = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    for name, color, style in zip(OBJECTIVES, COLORS, STYLES, strict=True):
        tv = [train(features, weights, rewards, build(name), 1, n, learning_rate)[-1]["tv"] for n in updates]
        axis.plot(updates, tv, color=color, linestyle=style, marker="o", markersize=3, label=name)
    if dimensions == CONTEXTS:
        old_policy = (features @ weights).softmax(1)
        optimum = inner_optimum(old_policy, group_advantages(old_policy, rewards), EPSILON)
        tv = (optimum - old_policy).abs().sum(1).mean().item() / 2
        axis.axhline(tv, color="black", linewidth=1, linestyle=":", label="CFPO's optimum, closed form")
    axis.set(xlabel="updates on one batch", ylabel="TV to the sampling policy", ylim=(0, None))
    axis.set_xscale("log", base=2)
    axis.set_title(f"{'own' if dimensions == CONTEXTS else 'shared'} weights, Adam, {learning_rate:g}")
    axis.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/bandit"))
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    iterations, learning_rates, batches, seeds = [1, 2, 4, 8, 16, 32], [0.01, 0.03, 0.1, 0.3, 1.0], 20, 3
    rewards = regime(batches, iterations, learning_rates, seeds)

    figure, axes = plt.subplots(2, 4, figsize=(15, 7), layout="constrained")
    plot_objectives(axes[0, 0], axes[0, 1])
    plot_one_batch(axes[0, 2], CONTEXTS, 0.05)
    plot_one_batch(axes[0, 3], 8, 0.2)
    for axis, name in zip(axes[1], OBJECTIVES, strict=True):
        axis.imshow(rewards[name], vmin=0, vmax=1, cmap="cividis", aspect="auto", origin="lower")
        axis.set(xticks=range(len(learning_rates)), xticklabels=learning_rates, xlabel="learning rate")
        axis.set(yticks=range(len(iterations)), yticklabels=iterations, ylabel="updates per batch")
        axis.set_title(f"{name}: reward after {batches} batches")
        for row, values in enumerate(rewards[name].tolist()):
            for column, value in enumerate(values):
                color = "white" if value < 0.5 else "black"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", color=color)
    figure.savefig(output / "bandit.png", dpi=150)

    print(f"expected reward after {batches} batches, {seeds} problems; 1/{TOKENS} is chance")
    print(f"{'updates':>8}{'rate':>8}" + "".join(f"{name:>14}" for name in OBJECTIVES))
    for row, count in enumerate(iterations):
        for column, rate in enumerate(learning_rates):
            values = "".join(f"{rewards[name][row, column].item():>14.3f}" for name in OBJECTIVES)
            print(f"{count:>8}{rate:>8}{values}")
    print(f"plot: {output / 'bandit.png'}")


if __name__ == "__main__":
    main()
