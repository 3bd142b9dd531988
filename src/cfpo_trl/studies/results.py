"""The results of a study's runs as one table."""

import json
from typing import Any

import pandas as pd

from .plan import Run


def table(runs: list[Run]) -> pd.DataFrame:
    """A row per run and logged step: the run, its options, seed, commit, seconds, failure, step, and all metrics.

    Training's metrics stand beside those of the evaluation (`eval_…`) at the same step; what a run did not log is NaN.
    """
    rows = []
    options = {option: [run.recipe.get(option) for run in runs] for run in runs for option in run.cell}
    # What the report cannot sort as it is becomes text: lists, mappings, and what some runs leave to its default.
    texts = {name for name, values in options.items() if any(v is None or isinstance(v, list | dict) for v in values)}
    for run in runs:
        if not run.result.exists():
            continue
        result = json.loads(run.result.read_text())
        cycle = run.recipe["logging_steps"]
        steps: dict[int, dict[str, Any]] = {0: {}}
        for entry in result["history"]:
            if "train_runtime" not in entry:
                steps[entry["step"]] = entry | steps.get(entry["step"], {})  # a resumed run evaluates once more
        facts: dict[str, Any] = {"run": run.folder.name, "parts": " ".join(run.parts)}
        chosen = {option: run.recipe.get(option) for option in options}
        facts |= {option: str(value) if option in texts else value for option, value in chosen.items()}
        facts |= {key: result[key] for key in ("commit", "seconds", "failure")}
        for step, metrics in sorted(steps.items()):
            rows.append(facts | metrics | facts | {"step": step, "rollout_batches": step / cycle})  # facts prevail
    return pd.DataFrame(rows)
