"""The pretrained model's table and picture, from docs/which-objective/smollm2.csv.

python scripts/studies/smollm2_report.py     (first adds what runs/compare/smollm2 has to those rows; writes the page)
"""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from cfpo_trl.studies.plan import expand, load_study
from cfpo_trl.studies.report import SCORE, interval, markdown, written
from cfpo_trl.studies.results import table
from field_report import put

matplotlib.use("Agg")
plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 130})

ROWS = Path(__file__).parents[2] / "docs" / "which-objective" / "smollm2.csv"
FORMS = {  # by objective and level of the ratio, in the order of the table: the name and the color
    ("grpo", "token"): ("GRPO", "#D55E00"),
    ("cfpo", "token"): ("CFPO", "#56B4E9"),
    ("bounded-1", "token"): ("bounded CFPO", "#0072B2"),
    ("bounded-1", "sequence"): ("bounded CFPO, sequence", "#E69F00"),
    ("truncated-0", "token"): ("truncated, one-sided", "#009E73"),
}
KEY = ["part", "form", "learning_rate", "seed", "rollout_batches"]
OF_RUN = {
    "grad_norm": ("grad_norm", "mean"),
    "tv": ("cfpo/tv", "mean"),
    "ess_min": ("cfpo/ess", "min"),
    "ratio_max": ("cfpo/ratio_max", "max"),
}
LAST = 3  # evaluations whose mean is the final reward


def evaluations() -> pd.DataFrame:
    """A row per finished run's evaluation."""
    found = table(expand(load_study("scripts/studies/smollm2.yaml")))
    if found.empty:
        return pd.DataFrame(columns=KEY)
    by_run = found.groupby("run")
    for name, (metric, how) in OF_RUN.items():
        found[name] = by_run[metric].transform(how)
    found = found.dropna(subset=[SCORE]).rename(columns={"parts": "part", SCORE: "held_out"})
    names = zip(found["objective"], found["importance_sampling_level"], strict=True)
    found["form"] = [FORMS[name][0] for name in names]
    return found[[*KEY, "epsilon", "held_out", *OF_RUN, "seconds", "commit"]]


def kept() -> pd.DataFrame:
    """The rows in the repository and the new ones, in the file and returned."""
    known = pd.read_csv(ROWS, dtype={"commit": str}) if ROWS.exists() else None
    rows = pd.concat([known, evaluations()]).drop_duplicates(KEY, keep="last").sort_values(KEY)
    rows.to_csv(ROWS, index=False, float_format="%.4g")
    return rows


def finals(rows: pd.DataFrame) -> pd.DataFrame:
    """The mean of each run's last evaluations: a row per part, form and rate, a column per seed."""
    runs = rows.sort_values("rollout_batches").groupby(KEY[:-1])["held_out"].apply(lambda held: held.tail(LAST).mean())
    return runs.unstack("seed")


def main_table(rows: pd.DataFrame, part: str) -> str:
    """Each form's final reward at each rate; at its best rate less GRPO's at GRPO's, with an interval of the seeds."""
    found = finals(rows).loc[part]
    best = found.loc[found.mean(axis=1).groupby("form").idxmax()].droplevel("learning_rate")
    lines = []
    for name in [name for name, _ in FORMS.values() if name in best.index]:
        cells = [
            f"{seeds.mean():.3f} ({seeds.min():.2f}–{seeds.max():.2f})" for _, seeds in found.loc[name].iterrows()
        ]
        less = (best.loc[name] - best.loc["GRPO"]).to_numpy()
        epsilon = rows.loc[(rows["part"] == part) & (rows["form"] == name), "epsilon"].iloc[0]
        lines.append([name, f"{epsilon:g}", *cells, "–" if name == "GRPO" else written(interval([less]))])
    rates = [f"rate {rate:g}" for rate in found.index.unique("learning_rate")]
    return markdown(lines, [part, "ε", *rates, "at the best rate − GRPO's"])


def draw(rows: pd.DataFrame) -> None:
    """Held-out accuracy by batches: mean and range of the seeds, a row of panels per part, a column per rate."""
    parts, rates = rows["part"].unique(), np.sort(rows["learning_rate"].unique())
    size = (4.2 * len(rates), 0.5 + 2.8 * len(parts))
    figure, axes = plt.subplots(len(parts), len(rates), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for (y, x), axis in np.ndenumerate(axes):
        panel = rows[(rows["part"] == parts[y]) & (rows["learning_rate"] == rates[x])]
        for name, color in FORMS.values():
            seeds = panel[panel["form"] == name].pivot(index="rollout_batches", columns="seed", values="held_out")
            axis.plot(seeds.index, seeds.mean(axis=1), color=color, label=name)
            axis.fill_between(seeds.index, seeds.min(axis=1), seeds.max(axis=1), color=color, alpha=0.15, linewidth=0)
        axis.set(title=f"{parts[y]}, learning rate {rates[x]:g}", xlabel="batches of rollouts")
        axis.set_ylim(0, 1)
    for axis in axes[:, 0]:
        axis.set_ylabel("held-out accuracy, sampled")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(FORMS))
    figure.savefig(ROWS.with_suffix(".png"))


def main() -> None:
    rows = kept()
    for part in rows["part"].unique():
        put(part, main_table(rows, part))
    draw(rows)
    runs = rows.drop_duplicates(KEY[:-1])
    print(f"{len(runs)} runs, {runs['seconds'].sum() / 3600:.1f} hours of them, commits {set(runs['commit'])}")


if __name__ == "__main__":
    main()
