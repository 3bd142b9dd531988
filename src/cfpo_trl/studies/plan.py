"""What a study runs: a grid of options over a recipe, matched in everything that the grid does not name."""

import itertools
import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from ..running.recipe import with_numbers

REQUIRED = {"output", "recipe", "rollout_batches", "evaluations", "parts"}
STUDY_KEYS = REQUIRED | {"prepare", "keep_models", "follow"}
OF_STUDIES = {"staleness"}  # options of a cell that the training script does not know
SHARED = {  # of every run; a study's recipe overrides it
    "eval_strategy": "steps",
    "eval_on_start": True,
    "save_strategy": "no",
    "report_to": "none",
    "push_to_hub": False,
    "disable_tqdm": True,
    "num_iterations": 1,
}


@dataclass(frozen=True)
class Run:
    """One cell of a grid: the options that the study names, the whole recipe, the folder of its results, its parts."""

    cell: dict[str, Any]
    recipe: dict[str, Any]
    folder: Path
    parts: list[str]

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    @property
    def script_recipe(self) -> dict[str, Any]:
        """The recipe as the training script takes it."""
        objective = "grpo" if self.cell["objective"] == "grpo" else "cfpo"
        options = {name: value for name, value in self.recipe.items() if name not in OF_STUDIES}
        return options | {"objective": objective, "output_dir": str(self.folder)}


def load_study(path: str | Path) -> dict[str, Any]:
    """The study in a YAML file. Raises a `ValueError` that names an unknown or missing key and the choices."""
    study = with_numbers(yaml.safe_load(Path(path).read_text()))
    if unknown := study.keys() - STUDY_KEYS:
        raise ValueError(
            f"{path} has {', '.join(sorted(unknown))}; a study's keys are {', '.join(sorted(STUDY_KEYS))}."
        )
    if missing := REQUIRED - study.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}.")
    for name, part in study["parts"].items():
        if part.keys() != {"question", "grid"} or not {"objective", "seed"} <= part["grid"].keys():
            raise ValueError(f"part {name} of {path} needs a question, and a grid with at least objective and seed.")
        others = sorted(set(as_list(part["grid"]["objective"])) - {"cfpo"})
        if "penalty_slope" in part["grid"] and others:
            raise ValueError(
                f"part {name} of {path} varies penalty_slope, which changes nothing in {', '.join(others)}; compare "
                "the objectives cfpo, bounded-1, bounded-1.25, ... or give penalty_slope a part of objective cfpo."
            )
    return study


def expand(study: dict[str, Any]) -> list[Run]:
    """All runs of the study, each once although parts share some; within a part seed by seed.

    Every run gets `rollout_batches` batches of rollouts, whatever it makes of them, and as many evaluations.
    """
    base = study["recipe"]
    base = with_numbers(yaml.safe_load(Path(base).read_text())) if isinstance(base, str) else base
    runs: dict[str, Run] = {}
    for name, part in study["parts"].items():
        choices = [as_list(value) for value in part["grid"].values()]
        cells = [dict(zip(part["grid"], values, strict=True)) for values in itertools.product(*choices)]
        for cell in sorted(cells, key=lambda cell: cell["seed"]):
            recipe = SHARED | base | cell
            recipe.setdefault("steps_per_generation", recipe.get("gradient_accumulation_steps", 1))  # as in TRL
            check_stale(recipe, name)
            cycle = steps_per_rollout(recipe, name)
            recipe |= {
                "max_steps": study["rollout_batches"] * cycle,
                "eval_steps": study["rollout_batches"] * cycle // study["evaluations"],
                "logging_steps": cycle,
            }
            digest = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
            folder = Path(study["output"]) / "runs" / digest
            runs.setdefault(digest, Run(cell, recipe, folder, [])).parts.append(name)
    return list(runs.values())


def check_stale(recipe: dict[str, Any], part: str) -> None:
    """Raises a `ValueError` where a batch of rollouts that is to have an exact age would be trained again."""
    staleness = recipe.get("staleness", 0)
    if not (isinstance(staleness, int) and staleness >= 0):
        raise ValueError(f"part {part}: staleness={staleness!r} is no number of updates.")
    accumulated = recipe.get("gradient_accumulation_steps", 1)
    if staleness and (recipe["num_iterations"] != 1 or recipe["steps_per_generation"] != accumulated):
        raise ValueError(
            f"part {part}: with staleness={staleness} a batch of rollouts is for one update: num_iterations must be "
            f"1, and steps_per_generation the {accumulated} of gradient_accumulation_steps."
        )


def as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def steps_per_rollout(recipe: dict[str, Any], part: str) -> int:
    """Optimizer steps that share a batch of rollouts. Raises a `ValueError` where they are no whole number."""
    batches = recipe["num_iterations"] * recipe["steps_per_generation"]
    accumulated = recipe.get("gradient_accumulation_steps", 1)
    if batches % accumulated:
        raise ValueError(
            f"part {part}: gradient_accumulation_steps={accumulated} does not divide the {batches} batches that share "
            "their rollouts (num_iterations × steps_per_generation); make steps_per_generation a multiple of it."
        )
    return batches // accumulated
