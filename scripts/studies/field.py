"""The field's objectives in several regimes: rate and width chosen for each by seed 0, confirmed on seeds 1 to 5.

python scripts/studies/field.py tune       (goes on where it stopped; also in parts: --regimes, --minutes, --workers)
python scripts/studies/field.py confirm    (the choice of each objective, in each regime that is tuned as a whole)
python scripts/studies/field.py repeat     (ten minutes: some choices on another seed, beside the rows that are there)

Rows of the first two: docs/which-objective/runs.csv.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from cfpo_trl.studies.plan import Run, expand
from cfpo_trl.studies.report import SCORE, markdown, summarise
from cfpo_trl.studies.results import table
from cfpo_trl.studies.run import lock_output, sweep

OUTPUT = Path("runs/field")
ROWS = Path(__file__).parents[2] / "docs" / "which-objective" / "runs.csv"
EPSILONS = (0.07, 0.2, 0.6)
DELTAS = (0.03, 0.1, 0.3)
OF_SEQUENCE = (0.003, 0.02, 0.2)  # widths for the ratio of a completion, a geometric mean

Cells = list[dict[str, Any]]


def wide(objective: str) -> Cells:
    """The objective at each width ε."""
    return [{"objective": objective, "epsilon": epsilon} for epsilon in EPSILONS]


def of_sequence(objective: str) -> Cells:
    """The objective on the ratio of whole completions."""
    return [
        {"objective": objective, "epsilon": epsilon, "importance_sampling_level": "sequence"}
        for epsilon in OF_SEQUENCE
    ]


def numbered(kind: str, numbers: tuple[float, ...]) -> Cells:
    """The objective at each number of its own."""
    return [{"objective": f"{kind}-{number}"} for number in numbers]


FAMILIES: dict[str, Cells] = {
    "GRPO": wide("grpo"),
    "DAPO": [{"objective": "grpo", "epsilon": 0.2, "epsilon_high": 0.28}],
    "no region": [{"objective": "unclipped"}],
    "negative clip": wide("negative_clip"),
    "GSPO": [{"objective": "gspo", "epsilon": epsilon} for epsilon in OF_SEQUENCE],
    "CISPO": numbered("cispo", (1.2, 2.0, 5.0)),
    "SAPO": numbered("sapo", (1.05, 2.0, 4.0)),
    "VESPO": [{"objective": "vespo"}],
    "TOPR": [{"objective": "topr"}],
    "M2PO": numbered("m2po", (0.01, 0.04, 0.16)),
    "DPPO": numbered("dppo", DELTAS),
    "DRPO": numbered("drpo", DELTAS),
    "CFPO": wide("cfpo"),
    "bounded CFPO": wide("bounded-1"),
    "one-sided CFPO": wide("one_sided-1"),
    "truncated, one-sided": wide("truncated-0"),
    "truncated": wide("truncated-1"),
    "CFPO, sequence": of_sequence("cfpo"),
    "bounded CFPO, sequence": of_sequence("bounded-1"),
}
SUMS = {"model_name_or_path": "runs/study/sums-small", "dataset_name": "runs/study/sums"}
CIPHER = {"model_name_or_path": "runs/study/cipher-small", "dataset_name": "runs/study/cipher"}
TAIL = {
    "model_name_or_path": "runs/study/tail-small",
    "dataset_name": "runs/study/tail",
    "reward_funcs": ["scripts.studies.field_rewards.digits_match"],
}
LARGE = SUMS | {"model_name_or_path": "runs/study/sums-large"}
CORE = [  # what led in one of the first regimes, and what it is compared with
    "GRPO", "DAPO", "no region", "GSPO", "CISPO", "VESPO", "TOPR", "DPPO", "DRPO", "CFPO", "bounded CFPO",
    "one-sided CFPO", "truncated, one-sided", "bounded CFPO, sequence",
]  # fmt: skip
FEW = ["GRPO", "GSPO", "CFPO", "bounded CFPO", "truncated, one-sided", "no region"]
COMPLETION = [*FEW, "bounded CFPO, sequence"]
RARE = [*COMPLETION, "DAPO", "DPPO", "DRPO"]  # with those that let a rare token grow further


@dataclass(frozen=True)
class Regime:
    """How a batch of rollouts is used.

    Args:
        options: Of the recipe, beside the field's own.
        batches: Of rollouts, of 128 completions each.
        rates: The learning rates to tune over; none where the choices are those of another regime.
        like: That other regime, whose choices this one confirms.
        families: The objectives; default: all.
    """

    options: dict[str, Any]
    batches: int
    rates: tuple[float, ...] = ()
    like: str = ""
    families: Sequence[str] = tuple(FAMILIES)


ONCE = (7e-5, 2e-4, 6e-4)  # rates where a batch is trained once
REGIMES: dict[str, Regime] = {
    "reuse 1": Regime(SUMS, 100, like="stale 4", families=CORE),
    "reuse 4": Regime(SUMS | {"num_iterations": 4}, 40, (3e-5, 1e-4, 3e-4)),
    "reuse 16": Regime(SUMS | {"num_iterations": 16}, 30, (1e-5, 3e-5, 1e-4)),
    "reuse 64": Regime(SUMS | {"num_iterations": 64}, 16, (4e-6, 1.2e-5, 4e-5), families=COMPLETION),
    "stale 1": Regime(SUMS | {"staleness": 1}, 101, like="stale 4", families=CORE),
    "stale 4": Regime(SUMS | {"staleness": 4}, 104, ONCE, families=CORE),
    "stale 16": Regime(SUMS | {"staleness": 16}, 116, ONCE),
    "stale 64": Regime(SUMS | {"staleness": 64}, 192, (3e-5, 1e-4, 3e-4), families=CORE),
    "larger, reuse 4": Regime(LARGE | {"num_iterations": 4}, 40, like="reuse 4", families=CORE),
    "larger, stale 16": Regime(LARGE | {"staleness": 16}, 116, like="stale 16", families=COMPLETION),
    "explore, reuse 4": Regime(CIPHER | {"num_iterations": 4}, 40, (1e-4, 3e-4, 1e-3), families=CORE),
    "explore, stale 4": Regime(CIPHER | {"staleness": 4}, 104, (1e-4, 3e-4, 1e-3), families=CORE),
    "tail, reuse 4": Regime(TAIL | {"num_iterations": 4}, 40, (3e-5, 1e-4, 3e-4), families=RARE),
    "tail, stale 16": Regime(TAIL | {"staleness": 16}, 116, ONCE, families=RARE),
    "mismatch, reuse 4": Regime(
        SUMS | {"num_iterations": 4, "rollout_dtype": "bfloat16"}, 40, like="reuse 4", families=CORE
    ),
    "long, reuse 4": Regime(SUMS | {"num_iterations": 4}, 400, like="reuse 4", families=FEW),
    "long, stale 16": Regime(SUMS | {"staleness": 16}, 1016, like="stale 16", families=FEW),
}

EVALUATIONS = 8
TUNING_SEED = 0
FRESH_SEEDS = [1, 2, 3, 4, 5]
REPEATED = {"stale 16": 6, "reuse 4": 6}  # regimes, and the seed that nothing else has
SHOWN = ("GRPO", "GSPO", "TOPR", "CISPO", "DPPO", "DRPO", "CFPO", "bounded CFPO", "truncated, one-sided", "no region")
CHOSEN = ["objective", "epsilon", "epsilon_high", "importance_sampling_level", "learning_rate"]


def study(cells: dict[str, Cells]) -> dict[str, Any]:
    """A study with a part for each of these regimes, of these cells."""
    parts = {}
    for regime, chosen in cells.items():
        grid = [REGIMES[regime].options | cell for cell in chosen]
        parts[regime] = {"question": regime, "grid": grid, "rollout_batches": REGIMES[regime].batches}
    return {
        "output": str(OUTPUT),
        "recipe": "scripts/studies/field_recipe.yaml",
        "rollout_batches": 0,
        "evaluations": EVALUATIONS,
        "parts": parts,
    }


def to_tune(regime: str) -> Cells:
    """Every objective of the regime at every width and rate; none where another regime chooses for it."""
    every = [cell for family in REGIMES[regime].families for cell in FAMILIES[family]]
    return [cell | {"learning_rate": rate, "seed": TUNING_SEED} for rate in REGIMES[regime].rates for cell in every]


def tuned_for(rows: pd.DataFrame, regime: str) -> pd.DataFrame:
    """The rows that choose for this regime: its own of the tuning seed, or those of the one that it is `like`."""
    return rows[(rows["regime"] == (REGIMES[regime].like or regime)) & (rows["seed"] == TUNING_SEED)]


def choices(rows: pd.DataFrame, regime: str) -> dict[str, dict[str, Any]]:
    """Of each family the cell with the best final reward on the tuning seed."""
    tuned = tuned_for(rows, regime)
    best = tuned.loc[tuned.groupby("family")["final"].idxmax()].set_index("family")
    chosen = {family: row[row.notna()].to_dict() for family, row in best[CHOSEN].iterrows()}
    return {family: chosen[family] for family in REGIMES[regime].families}


def to_confirm(rows: pd.DataFrame, regime: str) -> Cells:
    """The choice of each family on fresh seeds, where the regime that chooses is tuned as a whole."""
    tuned_in = REGIMES[regime].like or regime
    if missing := len(not_done(expand(study({tuned_in: to_tune(tuned_in)})), rows)):
        print(f"{tuned_in} is not tuned yet: {missing} runs are missing")
        return []
    return [cell | {"seed": seed} for seed in FRESH_SEEDS for cell in choices(rows, regime).values()]


def repeat(rows: pd.DataFrame, workers: int | None) -> None:
    """Trains the choices of `SHOWN` once more, and prints each final reward beside those of the fresh seeds."""
    cells = {
        regime: [choices(rows, regime)[family] | {"seed": seed} for family in SHOWN]
        for regime, seed in REPEATED.items()
    }
    runs = expand(study(cells))
    with lock_output(OUTPUT):
        sweep({}, [run for run in runs if not run.result.exists()], workers, None)
    found = summary(runs).set_index(["regime", "family"])["final"]
    known = rows[rows["seed"].isin(FRESH_SEEDS)].groupby(["regime", "family"])["final"].agg(["mean", "min", "max"])
    table = known.join(found.rename("here"), how="inner").sort_values(["regime", "mean"], ascending=[True, False])
    lines = [
        [*index, *(f"{value:.3f}" for value in row)] for index, row in zip(table.index, table.to_numpy(), strict=True)
    ]
    print(markdown(lines, ["regime", "objective", "fresh seeds: mean", "smallest", "largest", "here"]))


def family_of(row: pd.Series) -> str:
    """Which of the families a run's objective and widths belong to."""
    kind = (row["objective"], pd.notna(row["epsilon_high"]), pd.notna(row["importance_sampling_level"]))
    return next(name for name, cells in FAMILIES.items() if kind in map(kind_of, cells))


def kind_of(cell: dict[str, Any]) -> tuple[str, bool, bool]:
    return cell["objective"], "epsilon_high" in cell, "importance_sampling_level" in cell


def summary(runs: list[Run]) -> pd.DataFrame:
    """A row per finished run: what was chosen, its rewards, and the worst of its diagnostics."""
    logged = table(runs)
    if logged.empty:
        return logged
    rows = summarise(logged).rename(columns={"parts": "regime"})
    by_run = logged.groupby("run")
    of_run = {
        "area": by_run[SCORE].mean(),
        "tv": by_run["cfpo/tv"].mean(),
        "ess_min": by_run["cfpo/ess"].min(),
        "ratio_max": by_run["cfpo/ratio_max"].max(),
    }
    for name, values in of_run.items():
        rows[name] = rows["run"].map(values)
    for option in CHOSEN:
        rows[option] = rows[option].replace("None", float("nan")) if option in rows else float("nan")
    rows[["epsilon", "epsilon_high"]] = rows[["epsilon", "epsilon_high"]].astype(float)
    rows["family"] = rows.apply(family_of, axis=1)
    rows.loc[~rows["objective"].isin(WITH_EPSILON), "epsilon"] = float("nan")
    columns = ["regime", "family", *CHOSEN, "seed", "start", "best", "final", "area", "collapsed"]
    return rows[[*columns, "tv", "ess_min", "ratio_max", "seconds", "commit"]]


WITH_EPSILON = {cell["objective"] for cells in FAMILIES.values() for cell in cells if "epsilon" in cell}


def read_rows() -> pd.DataFrame:
    return (
        pd.read_csv(ROWS, dtype={"importance_sampling_level": object, "commit": str})
        if ROWS.exists()
        else pd.DataFrame(columns=["regime", "family", *CHOSEN, "seed", "final"])
    )


def keep_rows(rows: pd.DataFrame) -> None:
    """Adds the rows to those that are there; one of the same cell and seed takes its place."""
    ROWS.parent.mkdir(exist_ok=True)
    everything = pd.concat([frame for frame in (read_rows(), rows) if len(frame)])
    everything = everything.drop_duplicates(["regime", *CHOSEN, "seed"], keep="last")
    everything.sort_values(["regime", "family", *CHOSEN, "seed"]).to_csv(ROWS, index=False, float_format="%.4g")


def not_done(runs: list[Run], rows: pd.DataFrame) -> list[Run]:
    """The runs that have no row yet: rows are kept in the repository, the folders of runs are not."""
    done = {tuple(map(str, row)) for row in rows[["regime", *CHOSEN, "seed"]].itertuples(index=False, name=None)}
    return [run for run in runs if key_of(run) not in done]


def key_of(run: Run) -> tuple[str, ...]:
    values = [run.cell.get(option, float("nan")) for option in (*CHOSEN, "seed")]
    return (run.parts[0], *map(str, values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["tune", "confirm", "repeat"])
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES), metavar="REGIME")
    parser.add_argument("--workers", type=int, help="runs at a time; default: one per core")
    parser.add_argument("--minutes", type=float, help="start no run after this time")
    options = parser.parse_args()
    regimes = list(REPEATED) if options.stage == "repeat" else options.regimes
    models = {Path(REGIMES[regime].options["model_name_or_path"]).name for regime in regimes}
    subprocess.run([sys.executable, "scripts/studies/study_models.py", *sorted(models)], check=True)
    if options.stage == "repeat":
        repeat(read_rows(), options.workers)
        return
    for regime in regimes:
        rows = read_rows()
        cells = to_tune(regime) if options.stage == "tune" else to_confirm(rows, regime)
        runs = not_done(expand(study({regime: cells})), rows) if cells else []
        with lock_output(OUTPUT):
            try:
                sweep({}, runs, options.workers, options.minutes)
            finally:
                keep_rows(summary(runs))


if __name__ == "__main__":
    main()
