"""Draws docs/objective.png: what clip, CFPO and the bounded form pay for a ratio, and how hard each pushes it.

python scripts/figures/objective.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from cfpo_trl import cfpo_objective

EPSILON = 0.2
FORMS = {
    "GRPO: the clip": (lambda r, A: torch.minimum(r * A, r.clamp(1 - EPSILON, 1 + EPSILON) * A), "#D55E00", "--"),
    "CFPO": (lambda r, A: cfpo_objective(r, A, EPSILON), "#0072B2", "-"),
    "bounded (penalty_slope: 1)": (lambda r, A: cfpo_objective(r, A, EPSILON, penalty_slope=1.0), "#009E73", ":"),
}


def main() -> None:
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.4), sharex=True, sharey="row", layout="constrained")
    for column, advantage in enumerate((1.0, -1.0)):
        for name, (form, color, style) in FORMS.items():
            ratio = torch.linspace(0.4, 1.8, 1401, dtype=torch.float64, requires_grad=True)
            value = form(ratio, torch.full_like(ratio, advantage))
            (slope,) = torch.autograd.grad(value.sum(), ratio)
            for axis, y in zip(axes[:, column], (value.detach(), slope), strict=True):
                axis.plot(ratio.detach(), y, style, color=color, label=name, linewidth=2)
        axes[0, column].set_title(f"advantage A = {advantage:+.0f}")
        axes[0, column].plot(1, advantage, "o", color="black", markersize=4)  # where a batch's first update stands
        axes[1, column].axhline(0, color="black", linewidth=0.8)
        axes[1, column].set_xlabel("ratio r = π_θ / π_old")
        for axis in axes[:, column]:
            axis.axvspan(1 - EPSILON, 1 + EPSILON, color="#999999", alpha=0.15, linewidth=0)
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("objective per token")
    axes[1, 0].set_ylabel("its slope in r")
    axes[0, 0].set_ylim(-2.6, 1.6)
    axes[0, 0].legend(fontsize=9, loc="lower center")
    figure.suptitle(
        "Grey: the trust region 1 ± ε, ε = 0.2. Dot: the first update of a batch, where all three agree.", fontsize=10
    )
    figure.savefig(Path("docs") / "objective.png", dpi=130)


if __name__ == "__main__":
    main()
