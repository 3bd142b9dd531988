"""The tables and pictures of docs/which-objective.md, from docs/which-objective/runs.csv.

python scripts/studies/field_report.py     (writes them into the page; regimes.md and the pictures beside the rows)
"""

import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from cfpo_trl.studies.report import interval, markdown, written
from field import FRESH_SEEDS, REGIMES, ROWS, read_rows, tuned_for

matplotlib.use("Agg")
plt.rcParams.update({"font.size": 9, "savefig.dpi": 130})

PAGE = ROWS.parents[1] / "which-objective.md"
HEAD = """\
Written by `python scripts/studies/field_report.py` from [runs.csv](runs.csv). What the regimes are, and what the
columns mean, is in [which objective](../which-objective.md#how-it-was-done)."""


def differences(rows: pd.DataFrame, regime: str, family: str, other: str = "GRPO") -> np.ndarray:
    """Final reward less the other's, one per fresh seed that both have."""
    confirmed = rows[(rows["regime"] == regime) & rows["seed"].isin(FRESH_SEEDS)]
    wide = confirmed.pivot(index="seed", columns="family", values="final")
    if not {family, other} <= set(wide):
        return np.array([])
    return (wide[family] - wide[other]).dropna().to_numpy()


def verdicts(rows: pd.DataFrame) -> str:
    """In how many regimes each family is ahead of GRPO, level or behind, and behind the best one there, by intervals.

    The best first: fewest regimes behind GRPO. Where a batch is trained once, fresh, nothing differs: not counted.
    """
    confirmed = rows[rows["seed"].isin(FRESH_SEEDS) & (rows["regime"] != "reuse 1")]
    means = confirmed.groupby(["family", "regime"])["final"].mean().unstack()
    ranked = []
    for family, of_regimes in means.drop(index="GRPO").iterrows():
        there = of_regimes.dropna().index
        found = {regime: interval([differences(rows, regime, family)]) for regime in there}
        to_best = [interval([differences(rows, regime, family, means[regime].idxmax())]) for regime in there]
        ahead = sum(low > 0 for _, low, _ in found.values())
        behind = sum(high < 0 for _, _, high in found.values())
        worst = min(found, key=lambda regime: found[regime][0])
        counts = [len(there), ahead, len(there) - ahead - behind, behind, sum(high < 0 for _, _, high in to_best)]
        line = [family, *map(str, counts), f"{found[worst][0]:+.3f} ({worst})"]
        ranked.append((behind / len(there), -ahead, line))
    lines = [line for *_, line in sorted(ranked, key=lambda entry: entry[:2])]
    return markdown(lines, ["", "regimes", "ahead of GRPO", "level", "behind", "behind the best", "worst mean"])


def main_table(rows: pd.DataFrame, use: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean difference from GRPO, and its interval as text: a row per family, the best first.

    A column per regime that is confirmed, and is a kind of `use` (`reuse` or `stale`).
    """
    confirmed = rows[rows["seed"].isin(FRESH_SEEDS)]
    regimes = [regime for regime in REGIMES if use in regime and regime in set(confirmed["regime"])]
    means, texts = {}, {}
    for regime in regimes:
        of_regime = confirmed[confirmed["regime"] == regime]
        grpo = of_regime.loc[of_regime["family"] == "GRPO", "final"].mean()
        for family in of_regime["family"].unique():
            bounds = interval([differences(rows, regime, family)])
            means[family, regime] = 0.0 if family == "GRPO" else bounds[0] if bounds else np.nan
            texts[family, regime] = f"{grpo:.3f}" if family == "GRPO" else written(bounds)
    table = pd.Series(means).unstack()[regimes]
    everywhere = table.notna().all(axis=1)
    order = pd.DataFrame({"everywhere": everywhere, "mean": table.mean(axis=1)})
    order = order.sort_values(["everywhere", "mean"], ascending=False).index
    return table.loc[order], pd.Series(texts).unstack()[regimes].loc[order].fillna("")


def draw_table(means: pd.DataFrame, texts: pd.DataFrame, use: str) -> None:
    """The main table as a picture, coloured by the difference."""
    figure, axis = plt.subplots(
        figsize=(2.6 + 1.25 * len(means.columns), 0.8 + 0.36 * len(means)), layout="constrained"
    )
    axis.imshow(means, cmap="RdBu", vmin=-0.1, vmax=0.1, aspect="auto")
    axis.grid(visible=False)
    axis.set_xticks(range(len(means.columns)), [regime.replace(", ", "\n") for regime in means])
    axis.set_yticks(range(len(means)), means.index)
    axis.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    for (y, x), mean in np.ndenumerate(means.to_numpy()):
        color = "white" if abs(mean) > 0.07 else "black"
        axis.text(x, y, texts.iloc[y, x].replace(" [", "\n["), ha="center", va="center", color=color, fontsize=6.5)
    figure.savefig(ROWS.with_name(f"table-{use}.png"))
    plt.close(figure)


def draw_regime(rows: pd.DataFrame, regime: str) -> None:
    """Left: the best width's final reward at each rate, seed 0. Right: the choice's on fresh seeds."""
    mine = rows[rows["regime"] == regime]
    tuned, confirmed = tuned_for(rows, regime), mine[mine["seed"].isin(FRESH_SEEDS)]
    order = confirmed.groupby("family")["final"].mean().sort_values()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 0.9 + 0.27 * len(order)), sharey=True, layout="constrained", width_ratios=[1, 2]
    )
    best = tuned.pivot_table("final", "family", "learning_rate", aggfunc="max").reindex(order.index)
    left.imshow(best, cmap="cividis", vmin=0, vmax=max(order.max(), 0.01), aspect="auto", origin="lower")
    left.grid(visible=False)
    left.set_xticks(range(best.shape[1]), [f"{rate:g}" for rate in best.columns])
    left.set_yticks(range(len(order)), order.index)
    left.set(title=f"{REGIMES[regime].like} seed 0, the best width at each rate".strip(), xlabel="learning rate")
    for (y, x), value in np.ndenumerate(best.to_numpy()):
        color = "white" if value < 0.55 * order.max() else "black"
        left.text(x, y, f"{value:.2f}", ha="center", va="center", color=color, fontsize=7)
    for y, family in enumerate(order.index):
        final = confirmed.loc[confirmed["family"] == family, "final"]
        right.scatter(final, [y] * len(final), s=14, alpha=0.5, color="#0072B2", linewidths=0)
        right.scatter([final.mean()], [y], marker="|", s=160, color="#D55E00")
    right.axvline(order["GRPO"], color="grey", linewidth=0.8, linestyle="--")
    right.set(title="fresh seeds and their mean; dashed: GRPO's", xlabel="final held-out accuracy")
    right.grid(alpha=0.3)
    figure.suptitle(regime)
    figure.savefig(ROWS.with_name(picture_of(regime)))
    plt.close(figure)


def regime_table(rows: pd.DataFrame, regime: str) -> str:
    """A row per family: its choice, what it reached on fresh seeds, and the state of its trust region."""
    mine = rows[rows["regime"] == regime]
    tuned, confirmed = tuned_for(rows, regime), mine[mine["seed"].isin(FRESH_SEEDS)]
    lines = []
    for family in confirmed.groupby("family")["final"].mean().sort_values(ascending=False).index:
        runs = confirmed[confirmed["family"] == family]
        first = runs.iloc[0]
        width = "" if pd.isna(first["epsilon"]) else f", ε {first['epsilon']:g}"
        cells, own = tuned[tuned["family"] == family], mine[mine["family"] == family]
        lines.append(
            [
                family,
                f"`{first['objective']}`{width}, {first['learning_rate']:g}",
                f"{runs['final'].mean():.3f} ({runs['final'].min():.2f}–{runs['final'].max():.2f})",
                "–" if family == "GRPO" else written(interval([differences(rows, regime, family)])),
                f"{runs['area'].mean():.3f}",
                f"{cells.groupby('learning_rate')['final'].max().min():.2f}",
                f"{int(own['collapsed'].sum())} of {len(own)}",
                f"{runs['tv'].mean():.3f}",
                f"{runs['ess_min'].min():.2f}",
                f"{runs['ratio_max'].max():.1f}",
            ]
        )
    header = ["objective", "choice", "final", "− GRPO's [95 %]", "area", "at the worst rate", "collapsed"]
    return markdown(lines, [*header, "TV", "smallest ESS", "largest ratio"])


def picture_of(regime: str) -> str:
    return regime.replace(",", "").replace(" ", "-") + ".png"


def about(regime: str) -> str:
    """A line on the regime."""
    like = f" Rates and widths are the choices of *{REGIMES[regime].like}*." if REGIMES[regime].like else ""
    return f"{REGIMES[regime].batches} batches of 128 completions.{like}"


def hours(rows: pd.DataFrame) -> str:
    """What the runs cost: one core each, two at a time."""
    commits = ", ".join(rows["commit"].unique())
    return f"{len(rows)} runs, {rows['seconds'].sum() / 3600:.1f} core hours, commits {commits}."


def put(name: str, text: str, page: Path = PAGE) -> None:
    """Puts the text into the page, between its two comments of that name."""
    whole = page.read_text(encoding="utf-8")
    between = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
    assert len(between.findall(whole)) == 1, f"{page.name} has no place for {name}"
    page.write_text(between.sub(lambda found: found[1] + text.strip() + found[2], whole), encoding="utf-8")


def main() -> None:
    rows = read_rows()
    put("verdicts", verdicts(rows))
    pages = ["# The regimes, one by one", HEAD, hours(rows)]
    for use in ("reuse", "stale"):
        means, texts = main_table(rows, use)
        draw_table(means, texts, use)
        lines = [[name, *row] for name, row in zip(texts.index, texts.to_numpy(), strict=True)]
        put(use, markdown(lines, ["", *texts]))
        for regime in means:
            draw_regime(rows, regime)
            picture = f"![Final reward by objective]({picture_of(regime)})"
            pages += [f"## {regime}", about(regime), picture, regime_table(rows, regime)]
    ROWS.with_name("regimes.md").write_text("\n\n".join(pages) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
