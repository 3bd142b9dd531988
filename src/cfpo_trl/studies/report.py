"""A study's table as a report: report.md with tables, intervals and plots, beside the table.

python -m cfpo_trl.studies.report runs/compare/quick     (`cfpo study` runs the study first)
"""

import argparse
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import yaml
from matplotlib.ticker import NullFormatter

matplotlib.use("Agg")
plt.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 130})

DEFINITIONS = """\
Fixed before any run was looked at:

- *final*: mean held-out reward of the last three evaluations, 0 if it failed; *best*: highest mean of three in a row.
- *failed*: its numbers were no longer finite. *collapsed*: failed, or final below half of best, the start counted.
  Where a run starts below 0, both count from its start in place of 0.
- updates and tokens to a level: where the held-out reward first is at it, interpolated from the evaluation before.
- differences are matched by setting and seed, GRPO subtracted; 95 % intervals by 10,000 bootstrap draws of the seeds.
  Of three seeds such an interval is no wider than their range, so read a single setting's as that range.
- at equal length: the difference, less what the difference in mean length explains, by the least-squares slope of the
  reward on the length of an evaluation's completions (mean of both runs' last three); a dash where no length differed.

Of what a study follows, a failed run has no value. *At equal reward* is the difference where each run first had the
lower of the two final rewards, interpolated like the levels.
"""

SCORE = "eval_reward"
LENGTH = "completions/mean_length"
LEVELS = (0.5, 0.8, 0.9)
HEAT_MAP = ("num_iterations", "learning_rate")
FACTS = ("run", "parts", "objective", "seed", "commit", "seconds", "failure")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")  # Okabe and Ito's
STYLES = ("--", "-", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (8, 2)))
DIAGNOSTICS = {
    "entropy": "entropy (nats)",
    "cfpo/tv": "TV ½·E|r − 1|",
    "cfpo/ess": "effective sample size",
    "cfpo/ratio_max": "largest ratio",
    "cfpo/ratio_min": "smallest ratio",
    "cfpo/penalty": "r·A − objective",
    "clip_ratio/region_mean": "share a clip freezes",
    "kl": "KL to the start",
    "grad_norm": "gradient norm",
    LENGTH: "completion length",
    "reward_length/correlation": "correlation of reward and length",
}
LOGARITHMIC = ("cfpo/tv", "cfpo/ratio_max", "grad_norm", "kl", "cfpo/penalty")


def summarise(table: pd.DataFrame, follow: Sequence[str] = ()) -> pd.DataFrame:
    """A row per run: options, start, final and best reward, whether it collapsed, what it took to reach the levels.

    And the final value of what it logged at evaluation, of these: the metrics to `follow`, the mean length, and the
    slopes of the rewards among them on the length.
    """
    options = list(table.columns[: table.columns.get_loc("commit")])
    rows = []
    for _, run in table.groupby("run", sort=False):
        row = run.iloc[0][[*options, "commit", "seconds", "failure"]].to_dict()
        scored = run.dropna(subset=[SCORE]) if SCORE in run else run.iloc[:0]
        score, step = scored[SCORE].to_numpy(), scored["step"].to_numpy()
        smooth = np.convolve(score, np.ones(3) / 3, mode="valid") if len(score) >= 3 else score
        row["start"] = score[0] if len(score) else math.nan
        row["best"] = max([*score[:1], *smooth], default=math.nan)
        failed, floor = pd.notna(row["failure"]), min(0.0, row["start"])
        row["final"] = smooth[-1] if len(smooth) and not failed else floor
        row["collapsed"] = failed or not row["final"] - floor >= (row["best"] - floor) / 2
        tokens = run["num_tokens"].ffill().fillna(0.0) if "num_tokens" in run else run["step"] * math.nan
        for level in LEVELS:
            at = reached(step, score, level)
            row[f"updates to {level:.0%}"] = at
            row[f"tokens to {level:.0%}"] = np.interp(at, run["step"], tokens) if at < math.inf else math.inf
        for metric in dict.fromkeys([*follow, LENGTH, *map(slope_of, ["final", *follow])]):
            if f"eval_{metric}" in table:
                row[metric] = math.nan if failed else run[f"eval_{metric}"].dropna().tail(3).mean()
        rows.append(row)
    return pd.DataFrame(rows)


def reached(step: np.ndarray, score: np.ndarray, level: float) -> float:
    """The step at which the score first reaches `level`; infinite where it never does."""
    above = np.flatnonzero(score >= level)
    if not len(above):
        return math.inf
    last = above[0]
    first = max(last - 1, 0)
    return float(np.interp(level, score[[first, last]], step[[first, last]]))


def slope_of(value: str) -> str:
    """The logged slope on the length of the final reward, or of `rewards/<name>/mean`."""
    return "reward_length/slope" if value == "final" else value.removesuffix("mean") + "length_slope"


def varied(runs: pd.DataFrame) -> list[str]:
    """The options that differ between runs, objective and seed aside."""
    options = [option for option in runs.columns[: runs.columns.get_loc("commit")] if option not in FACTS]
    return [option for option in options if runs[option].nunique(dropna=False) > 1]


def settings(runs: pd.DataFrame, options: list[str]) -> list[tuple[dict[str, object], pd.DataFrame]]:
    """The runs by setting of `options`, in order."""
    if not options:
        return [({}, runs)]
    groups = runs.groupby(options, dropna=False)
    return [(dict(zip(options, values, strict=True)), group) for values, group in groups]


def matched(runs: pd.DataFrame, objective: str, value: str) -> pd.DataFrame:
    """`value` of one setting, a row per seed that both the objective and GRPO have, a column for each of the two."""
    if value not in runs or not {objective, "grpo"} <= set(runs["objective"]):
        return pd.DataFrame(columns=[objective, "grpo"], dtype=float)
    return runs.pivot(index="seed", columns="objective", values=value)[[objective, "grpo"]].dropna()


def differences(runs: pd.DataFrame, objective: str, value: str = "final") -> np.ndarray:
    """Objective − GRPO of one setting, a number per seed that both have."""
    wide = matched(runs, objective, value)
    return (wide[objective] - wide["grpo"]).to_numpy()


def at_equal_length(runs: pd.DataFrame, objective: str, value: str) -> np.ndarray:
    """As [`differences`], less the slope of `value` on the length times the difference in length."""
    wide, lengths, slopes = (matched(runs, objective, column) for column in (value, LENGTH, slope_of(value)))
    explained = slopes.mean(axis=1) * (lengths[objective] - lengths["grpo"])
    return (wide[objective] - wide["grpo"] - explained).dropna().to_numpy()


def interval(settings_differences: list[np.ndarray], draws: int = 10_000) -> tuple[float, float, float] | None:
    """Mean over settings, and its 95 % bootstrap interval: in every setting the seeds are drawn anew."""
    pools = [values for values in settings_differences if len(values)]
    if not pools:
        return None
    generator = np.random.default_rng(0)
    means = np.mean([generator.choice(pool, (draws, len(pool))).mean(axis=1) for pool in pools], axis=0)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(np.mean([pool.mean() for pool in pools])), float(low), float(high)


def written(bounds: tuple[float, float, float] | None) -> str:
    return f"{bounds[0]:+.3f} [{bounds[1]:+.3f}, {bounds[2]:+.3f}]" if bounds else "–"


def short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def named(setting: dict[str, object]) -> str:
    return ", ".join(f"{option.replace('_', ' ')} {short(value)}" for option, value in setting.items())


def markdown(rows: list[list[str]], header: list[str]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def headline(runs: pd.DataFrame, parts: dict[str, dict], objectives: list[str]) -> str:
    """A row per part and objective: final and best reward, difference from GRPO, collapsed and failed runs."""
    rows = []
    for part in parts:
        members = of_part(runs, part)
        groups = settings(members, varied(members))
        for objective in objectives:
            mine = members[members["objective"] == objective]
            if mine.empty:
                continue
            difference = [differences(group, objective) for _, group in groups]
            row = [part, objective, f"{mine['final'].mean():.3f}", f"{mine['best'].mean():.3f}"]
            row.append("–" if objective == "grpo" else written(interval(difference)))
            rows.append([*row, f"{mine['collapsed'].sum()} of {len(mine)}", str(int(mine["failure"].notna().sum()))])
    return markdown(rows, ["part", "objective", "final", "best", "final − GRPO's [95 %]", "collapsed", "failed"])


def by_setting(members: pd.DataFrame, objectives: list[str]) -> str:
    """A row per setting: each objective's final reward, its range over seeds, and its difference from GRPO."""
    options = varied(members)
    rows = []
    for setting, group in settings(members, options):
        row = [short(value) for value in setting.values()]
        for objective in objectives:
            final = group.loc[group["objective"] == objective, "final"]
            row.append(f"{final.mean():.3f} ({final.min():.2f}–{final.max():.2f})" if len(final) else "–")
        for objective in objectives:
            if objective != "grpo":
                row.append(written(interval([differences(group, objective)])))
        rows.append(row)
    header = [*options, *objectives, *(f"{objective} − grpo" for objective in objectives if objective != "grpo")]
    return markdown(rows, [name.replace("_", " ") for name in header])


def at_equal_reward(table: pd.DataFrame, runs: pd.DataFrame, objective: str, metric: str) -> np.ndarray:
    """Objective − GRPO of an evaluation's metric, where each first had the lower of their two final rewards."""
    values = []
    for seed, pair in matched(runs[runs["failure"].isna()], objective, "final").iterrows():
        found = []
        for name in (objective, "grpo"):
            run = runs.loc[(runs["seed"] == seed) & (runs["objective"] == name), "run"].item()
            curve = table[table["run"] == run].dropna(subset=[SCORE, metric])
            if curve.empty:
                break
            step = curve["step"].to_numpy()
            found.append(np.interp(reached(step, curve[SCORE].to_numpy(), pair.min()), step, curve[metric]))
        if len(found) == 2:
            values.append(found[0] - found[1])
    return np.array(values)


def followed(table: pd.DataFrame, members: pd.DataFrame, objectives: list[str], follow: Sequence[str]) -> str:
    """A row per setting and objective: each metric's final value, mean of seeds, and its differences from GRPO's."""
    rows = []
    for setting, group in settings(members, varied(members)):
        for objective in objectives:
            row = [named(setting) or "all", objective]
            for metric in follow:
                row.append(f"{group.loc[group['objective'] == objective, metric].mean():.3f}")
                if objective == "grpo":
                    row += ["–", "–"]
                else:
                    row.append(written(interval([differences(group, objective, metric)])))
                    row.append(written(interval([at_equal_reward(table, group, objective, f"eval_{metric}")])))
            rows.append(row)
    columns = [column for metric in follow for column in (metric, "− GRPO's", "at equal reward")]
    return markdown(rows, ["setting", "objective", *columns])


def length_controlled(members: pd.DataFrame, objectives: list[str], values: Sequence[str]) -> str:
    """A row per setting and objective: mean length, and the differences from GRPO as they are and at equal length."""
    rows = []
    for setting, group in settings(members, varied(members)):
        for objective in objectives:
            lengths = group.loc[group["objective"] == objective, LENGTH]
            row = [named(setting) or "all", objective, f"{lengths.mean():.1f}"]
            for value in values:
                for difference in (differences, at_equal_length):
                    found = None if objective == "grpo" else interval([difference(group, objective, value)])
                    row.append(written(found))
            rows.append(row)
    columns = [column for value in values for column in (f"{value} − GRPO's", "at equal length")]
    return markdown(rows, ["setting", "objective", "final mean length (tokens)", *columns])


def speed(members: pd.DataFrame, objectives: list[str]) -> str:
    """A row per setting and objective: median updates and tokens to each level, and how many seeds never got there."""
    rows = []
    for setting, group in settings(members, varied(members)):
        for objective in objectives:
            mine = group[group["objective"] == objective]
            if mine.empty:
                continue
            cells = []
            for level in LEVELS:
                updates, tokens = mine[f"updates to {level:.0%}"], mine[f"tokens to {level:.0%}"]
                never = int(np.isinf(updates).sum())
                text = (
                    f"{updates.median():.0f} / {tokens.median() / 1000:.0f}k"
                    if updates.median() < math.inf
                    else "never"
                )
                cells.append(text + (f" ({never} of {len(mine)} never)" if never and text != "never" else ""))
            rows.append([named(setting) or "all", objective, *cells])
    return markdown(rows, ["setting", "objective", *(f"{level:.0%}: updates / tokens" for level in LEVELS)])


def is_share(runs: pd.DataFrame) -> bool:
    """Whether the reward is between 0 and 1, so that its levels and a scale to 1 mean something."""
    rewards = runs[["start", "best", "final"]]
    return rewards.min().min() >= 0 and rewards.max().max() <= 1


def of_part(table: pd.DataFrame, part: str) -> pd.DataFrame:
    return table[table["parts"].str.split().map(lambda parts: part in parts)]


def style(objectives: list[str], objective: str) -> dict[str, object]:
    index = objectives.index(objective)
    return {"color": COLORS[index % len(COLORS)], "linestyle": STYLES[index % len(STYLES)], "label": objective}


def draw(axis: plt.Axes, table: pd.DataFrame, metric: str, objectives: list[str]) -> None:
    """Mean over seeds against batches of rollouts, with a band from the lowest to the highest seed."""
    for objective in objectives:
        mine = table[table["objective"] == objective]
        wide = mine.pivot_table(index="rollout_batches", columns="seed", values=metric) if metric in mine else mine[:0]
        if wide.empty:
            continue
        x, look = wide.index.to_numpy(dtype=float), style(objectives, objective)
        axis.plot(x, wide.mean(axis=1), **look, linewidth=1.5)
        axis.fill_between(x, wide.min(axis=1), wide.max(axis=1), color=look["color"], alpha=0.12)


def panels(rows: int, columns: int) -> tuple[plt.Figure, np.ndarray]:
    size = (2.9 * columns + 0.6, 2.1 * rows + 0.9)
    return plt.subplots(rows, columns, figsize=size, squeeze=False, sharex=True, layout="constrained")


def legend(figure: plt.Figure, axes: np.ndarray) -> None:
    entries = {
        label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=min(len(entries), 8))


def split(options: list[str]) -> tuple[list[str], list[str]]:
    """The options for a figure's columns, and for its rows: the learning rate across where it varies."""
    across = "learning_rate" if "learning_rate" in options else options[-1] if options else None
    return [across] if across else [], [option for option in options if option != across]


def plot_curves(table: pd.DataFrame, runs: pd.DataFrame, objectives: list[str], path: Path) -> None:
    across, down = split(varied(runs))
    rows = settings(runs, down)
    columns = [setting for setting, _ in settings(runs, across)]
    figure, axes = panels(len(rows), len(columns))
    for y, (setting, group) in enumerate(rows):
        for x, column in enumerate(columns):
            members = group
            for option, value in column.items():
                members = members[members[option] == value]
            draw(axes[y, x], table[table["run"].isin(members["run"])], SCORE, objectives)
            if is_share(runs):
                axes[y, x].set_ylim(0, 1)
            axes[0, x].set_title(named(column))
        axes[y, 0].set_ylabel(
            textwrap.fill(f"{named(setting)}: held-out reward".lstrip(": "), 30, break_on_hyphens=False)
        )
    for axis in axes[-1]:
        axis.set_xlabel("batches of rollouts")
    legend(figure, axes)
    figure.savefig(path)
    plt.close(figure)


def plot_metrics(
    table: pd.DataFrame, runs: pd.DataFrame, objectives: list[str], labels: dict[str, str], path: Path
) -> None:
    """A column per setting, a row per metric of `labels` that was logged."""
    columns = settings(runs, varied(runs))
    metrics = [metric for metric in labels if metric in table and table[metric].notna().any()]
    figure, axes = panels(len(metrics), len(columns))
    for x, (setting, group) in enumerate(columns):
        rows = table[table["run"].isin(group["run"])]
        for y, metric in enumerate(metrics):
            draw(axes[y, x], rows, metric, objectives)
            if metric in LOGARITHMIC and (rows[metric] > 0).any():
                axes[y, x].set_yscale("log")
                axes[y, x].set_ylim(bottom=max(axes[y, x].get_ylim()[0], 1e-4))  # below it is zero
                axes[y, x].yaxis.set_major_formatter("{x:g}")
                axes[y, x].yaxis.set_minor_formatter(NullFormatter())
            axes[y, 0].set_ylabel(labels[metric])
        axes[0, x].set_title(named(setting).replace(", ", "\n"))
        axes[-1, x].set_xlabel("batches of rollouts")
    legend(figure, axes)
    figure.savefig(path)
    plt.close(figure)


def plot_heat_map(runs: pd.DataFrame, objectives: list[str], path: Path) -> None:
    """Final reward over iterations × learning rate, mean over seeds, a panel per objective; the stable regime."""
    shown = [objective for objective in objectives if objective in set(runs["objective"])]
    low, high = (0, 1) if is_share(runs) else (runs["final"].min(), runs["final"].max())
    figure, axes = plt.subplots(
        1, len(shown), figsize=(3.4 * len(shown) + 0.8, 3.6), squeeze=False, layout="constrained"
    )
    for axis, objective in zip(axes[0], shown, strict=True):
        mine = runs[runs["objective"] == objective]
        final = mine.pivot_table("final", *HEAT_MAP)
        collapsed = mine.pivot_table("collapsed", *HEAT_MAP, aggfunc="sum")
        image = axis.imshow(final, vmin=low, vmax=high, cmap="cividis", aspect="auto", origin="lower")
        axis.grid(visible=False)
        axis.set(xticks=range(final.shape[1]), xticklabels=[f"{rate:g}" for rate in final.columns])
        axis.set(yticks=range(final.shape[0]), yticklabels=final.index)
        axis.set(title=objective, xlabel="learning rate", ylabel="iterations")
        for (row, column), value in np.ndenumerate(final.to_numpy()):
            if not np.isnan(value):
                marks = "×" * int(collapsed.iloc[row, column])
                color = "white" if value < low + 0.55 * (high - low) else "black"
                axis.text(column, row, f"{value:.2f}\n{marks}".strip(), ha="center", va="center", color=color)
    figure.colorbar(image, ax=axes[0, -1], label="final held-out reward")
    figure.savefig(path)
    plt.close(figure)


def section(
    table: pd.DataFrame,
    runs: pd.DataFrame,
    part: str,
    question: str,
    objectives: list[str],
    follow: Sequence[str],
    out: Path,
) -> str:
    """A part's tables and plots."""
    members = of_part(runs, part)
    present = [objective for objective in objectives if objective in set(members["objective"])]
    options = varied(members)
    text = [f"## {part}: {question}", by_setting(members, present)]
    if set(HEAT_MAP) <= set(options):
        others = [option for option in options if option not in HEAT_MAP]
        for number, (setting, group) in enumerate(settings(members, others)):
            name = f"{part}-final-{number}.png" if others else f"{part}-final.png"
            plot_heat_map(group, objectives, out / name)
            title = ", ".join(filter(None, ["Final held-out reward, mean of seeds", named(setting)]))
            text.append(f"{title}; × marks a collapsed seed:\n\n![]({name})")
    plot_curves(table, members, objectives, out / f"{part}-curves.png")
    text.append(f"Held-out reward, mean and range of seeds:\n\n![]({part}-curves.png)")
    if follow:
        text.append("What the study follows beside the reward:\n\n" + followed(table, members, present, follow))
        labels = {SCORE: "reward"} | {f"eval_{metric}": metric for metric in follow}
        plot_metrics(of_part(table, part), members, objectives, labels, out / f"{part}-followed.png")
        text.append(f"At the evaluations, mean and range of seeds:\n\n![]({part}-followed.png)")
    if slope_of("final") in members:
        values = ["final", *(metric for metric in follow if slope_of(metric) in members)]
        text.append("Length:\n\n" + length_controlled(members, present, values))
    if "updates to 50%" in members:
        text.append("What it took (median of seeds):\n\n" + speed(members, present))
    _, down = split(options)
    for number, (setting, group) in enumerate(settings(members, down)):
        name = f"{part}-diagnostics-{number}.png"
        plot_metrics(table, group, objectives, DIAGNOSTICS, out / name)
        text.append(f"<details><summary>Diagnostics, {named(setting) or part}</summary>\n\n![]({name})\n\n</details>")
    return "\n\n".join(text)


def report(folder: Path) -> Path:
    """Writes `report.md`, its plots and `runs.csv` (a row per run) into the study's folder; returns the report."""
    table = pd.read_parquet(folder / "table.parquet")
    study = yaml.safe_load((folder / "study.yaml").read_text())
    parts, asked = study["parts"], study.get("follow", [])
    follow = [metric for metric in asked if f"eval_{metric}" in table]
    runs = summarise(table, follow)
    if not is_share(runs):
        runs = runs.drop(columns=[column for column in runs if column.startswith(("updates to", "tokens to"))])
    runs.to_csv(folder / "runs.csv", index=False, float_format="%.4g")
    objectives = list(dict.fromkeys(["grpo", "cfpo", *runs["objective"]]))
    text = [
        f"# {folder.name}: {len(runs)} runs",
        f"Commits {', '.join(sorted(set(runs['commit'])))}; {runs['seconds'].sum() / 3600:.1f} hours of runs in all. "
        "Every run's options and summary: `runs.csv`; every logged metric: `table.parquet`.",
        DEFINITIONS,
        "## Headline",
        headline(runs, parts, objectives),
        "Settings of a part are averaged with equal weight; the sections below have each.",
    ]
    if missing := set(asked) - set(follow):
        text.append(f"No evaluation logged {', '.join(sorted(missing))}, which the study follows.")
    failed = runs.loc[runs["failure"].notna(), ["run", "objective", "failure"]]
    if len(failed):
        text.append(f"{len(failed)} runs failed:\n\n" + markdown(failed.astype(str).to_numpy().tolist(), list(failed)))
    for part, described in parts.items():
        if len(of_part(runs, part)):
            text.append(section(table, runs, part, described["question"], objectives, follow, folder))
    path = folder / "report.md"
    path.write_text("\n\n".join(text) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="the study's output, with table.parquet and study.yaml")
    print(report(parser.parse_args().folder))


if __name__ == "__main__":
    main()
