"""Which form of the objective for asynchronous training: the demo's task, a real vLLM server, the real trainer.

python scripts/studies/asynchronous.py     (goes on where it stopped; the rows are in docs/asynchronous/runs.csv)

Each run trains `recipes/demo/config_cfpo_async.yaml` with other options. `final` is the accuracy on held-out words,
sampled at temperature 1; `area` the mean reward over all updates. At the end it writes the table of
docs/asynchronous.md, and draws a picture.
"""

import argparse
import csv
import itertools
import json
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "demo"))

from cfpo_trl.studies.report import interval, markdown, written  # noqa: E402
from demo import RUN, accuracy, prepare_if_missing  # noqa: E402
from demo_async import RECIPE, server  # noqa: E402
from field_report import put  # noqa: E402

ROWS = ROOT / "docs" / "asynchronous" / "runs.csv"
OUTPUT = Path("runs/asynchronous")
FORMS: dict[str, dict] = {
    "clip": {"objective": "grpo"},
    "paper": {"penalty_slope": None},
    "bounded": {"penalty_slope": 1.0},
    "bounded 0.1": {"penalty_slope": 1.0, "epsilon": 0.1},
    "clip, sequence": {"objective": "grpo", "importance_sampling_level": "sequence"},
    "bounded, sequence": {"penalty_slope": 1.0, "importance_sampling_level": "sequence"},
}
RATES = (4e-4, 1.3e-4, 1.6e-3)  # the first with all seeds, the others with seed 0
STALENESS = (4, 16)
SEEDS = (0, 1, 2, 3, 4)
TWO_SEEDS = ("paper", "bounded 0.1")  # the first is far behind, the second where the form of its kind is
COLORS = {"clip": "#D55E00", "paper": "#56B4E9", "bounded": "#0072B2", "bounded 0.1": "#009E73"}
COLORS |= {"clip, sequence": "#CC79A7", "bounded, sequence": "#E69F00"}


def train(form: str, rate: float, staleness: int, seed: int) -> dict:
    """One run; the row of its results."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    options = {"learning_rate": rate, "max_staleness": staleness, "seed": seed, "output_dir": str(OUTPUT)}
    recipe = OUTPUT.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(yaml.safe_load(RECIPE.read_text()) | FORMS[form] | options))
    command = [sys.executable, "-m", "cfpo_trl.cli", "train", "--config", str(recipe)]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    if result.returncode:
        raise RuntimeError(f"{form}, {options}: {result.stderr[-3000:]}")
    log = [
        entry for entry in json.loads((OUTPUT / "trainer_state.json").read_text())["log_history"] if "loss" in entry
    ]
    held_out = [json.loads(line) for line in (RUN / "words" / "test.jsonl").read_text().splitlines()]
    # Anew: each run is a process of its own, of the files as they are now.
    commit = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, text=True, capture_output=True)
    return {
        "form": form,
        "learning_rate": rate,
        "max_staleness": staleness,
        "seed": seed,
        "final": round(accuracy(OUTPUT, held_out, sample=True), 4),
        "area": round(statistics.mean(entry["reward"] for entry in log), 4),
        "age": round(statistics.mean(entry["staleness/mean"] for entry in log), 2),
        "dropped": round(statistics.mean(entry["staleness/dropped"] for entry in log), 4),
        "tv": round(statistics.mean(entry["cfpo/tv"] for entry in log), 4),
        "ess_min": round(min(entry["cfpo/ess"] for entry in log), 3),
        "ratio_max": round(max(entry["cfpo/ratio_max"] for entry in log), 1),
        "commit": commit.stdout.strip(),
    }


def read_rows() -> list[dict]:
    if not ROWS.exists():
        return []
    with ROWS.open() as file:
        return list(csv.DictReader(file))


def less_the_clip(setting: pd.DataFrame, form: str, metric: str) -> str:
    """The form's mean less the clip's with the same seeds, with an interval where there are several."""
    if form == "clip":
        return ""
    wide = setting.pivot(index="seed", columns="form", values=metric)
    found = (wide[form] - wide["clip"]).dropna().to_numpy()
    return written(interval([found])) if len(found) > 1 else f"{found.mean():+.3f}"


def report(rows: pd.DataFrame) -> str:
    """A row per setting and form, in Markdown: means of the seeds, and differences from the clip's."""
    lines = []
    for (rate, staleness), setting in rows.groupby(["learning_rate", "max_staleness"]):
        for form in FORMS:
            runs = setting[setting["form"] == form]
            if runs.empty:
                continue
            line = [f"{rate:g}", str(staleness), f"{runs['age'].mean():.1f}", form, str(len(runs))]
            for metric in ("final", "area"):
                line += [f"{runs[metric].mean():.3f}", less_the_clip(setting, form, metric)]
            line += [f"{runs['tv'].mean():.3f}", f"{runs['ess_min'].min():.2f}", f"{runs['ratio_max'].max():.0f}"]
            lines.append(line)
    header = ["learning rate", "versions", "mean age", "form", "seeds", "final", "less the clip's"]
    header += ["area", "less the clip's", "TV", "smallest ESS", "largest ratio"]
    return markdown(lines, header)


def plot(rows: pd.DataFrame, path: Path) -> None:
    """The final accuracy of each run, by setting and form."""
    settings = rows.groupby(["learning_rate", "max_staleness"])
    figure, axis = plt.subplots(figsize=(9, 3.5), layout="constrained")
    for offset, form in enumerate(FORMS):
        places, finals = [], []
        for place, (_, setting) in enumerate(settings):
            found = setting.loc[setting["form"] == form, "final"]
            places += [place + (offset - 2.5) * 0.12] * len(found)
            finals += [*found]
        axis.scatter(places, finals, color=COLORS[form], label=form, s=28)
    axis.set_xticks(range(len(settings)), [f"rate {rate:g}\n≤ {age} versions old" for rate, age in settings.groups])
    axis.set_ylabel("held-out accuracy at the end")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.24), frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--report", action="store_true", help="write the table of the rows that there are, draw the picture, and stop"
    )
    rows = read_rows()
    done = {(row["form"], float(row["learning_rate"]), int(row["max_staleness"]), int(row["seed"])) for row in rows}
    planned = [
        (form, rate, staleness, seed)
        for rate, seed, staleness, form in itertools.product(RATES, SEEDS, STALENESS, FORMS)
        if (rate == RATES[0] or seed == 0) and (form not in TWO_SEEDS or seed < 2)
    ]
    missing = [run for run in planned if run not in done]
    if missing and not parser.parse_args().report:
        # Both end the server, too; a shell's background job would ignore the first.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        prepare_if_missing()
        ROWS.parent.mkdir(exist_ok=True)
        with server():
            for run in missing:
                row = train(*run)
                rows.append(row)
                with ROWS.open("a", newline="") as file:
                    writer = csv.DictWriter(file, row)
                    if file.tell() == 0:
                        writer.writeheader()
                    writer.writerow(row)
                print(*row.values(), f"{len(rows)}/{len(planned)}", flush=True)
    found = pd.read_csv(ROWS)
    put("forms", report(found), ROWS.parent.with_suffix(".md"))
    plot(found, ROWS.with_name("forms.png"))


if __name__ == "__main__":
    main()
