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
OWN = ("rollout_batches", "evaluations")  # what a part may have in place of the study's
OF_STUDIES = {"staleness", "rollout_dtype"}  # options of a cell that the training script does not know
ROLLOUT_DTYPES = ("bfloat16", "float16", "float32")
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
        check_part(part, f"part {name} of {path}")
    return study


def check_part(part: dict[str, Any], where: str) -> None:
    """Raises a `ValueError` that names what a part lacks, or has that would change nothing."""
    if not {"question", "grid"} <= part.keys() <= {"question", "grid", *OWN}:
        raise ValueError(f"{where} needs a question and a grid, and may have {' and '.join(OWN)} of its own.")
    for grid in as_list(part["grid"]):
        if not {"objective", "seed"} <= grid.keys():
            raise ValueError(f"{where} needs a grid with at least objective and seed.")
        others = sorted(set(as_list(grid["objective"])) - {"cfpo"})
        if "penalty_slope" in grid and others:
            raise ValueError(
                f"{where} varies penalty_slope, which changes nothing in {', '.join(others)}; compare the objectives "
                "cfpo, bounded-1, bounded-1.25, ... or give penalty_slope a grid of objective cfpo."
            )


def expand(study: dict[str, Any]) -> list[Run]:
    """All runs of the study, each once although parts share some; within a part seed by seed.

    Every run of a part gets `rollout_batches` batches of rollouts, whatever it makes of them, and as many evaluations.
    """
    base = study["recipe"]
    base = with_numbers(yaml.safe_load(Path(base).read_text())) if isinstance(base, str) else base
    runs: dict[str, Run] = {}
    for name, part in study["parts"].items():
        batches, evaluations = (part.get(option, study[option]) for option in OWN)
        for cell in sorted(cells_of(part["grid"]), key=lambda cell: cell["seed"]):
            recipe = SHARED | base | cell
            recipe.setdefault("steps_per_generation", recipe.get("gradient_accumulation_steps", 1))  # as in TRL
            check_stale(recipe, name, batches)
            check_dtype(recipe, name)
            cycle = steps_per_rollout(recipe, name)
            recipe |= {
                "max_steps": batches * cycle,
                "eval_steps": batches * cycle // evaluations,
                "logging_steps": cycle,
            }
            digest = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
            folder = Path(study["output"]) / "runs" / digest
            runs.setdefault(digest, Run(cell, recipe, folder, [])).parts.append(name)
    return list(runs.values())


def cells_of(grid: dict[str, Any] | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All combinations of a grid's choices; of several grids, one after another."""
    return [
        dict(zip(one, values, strict=True))
        for one in as_list(grid)
        for values in itertools.product(*map(as_list, one.values()))
    ]


def check_stale(recipe: dict[str, Any], part: str, batches: int) -> None:
    """Raises a `ValueError` where a batch of rollouts of an exact age would be trained again, or none be so old."""
    staleness = recipe.get("staleness", 0)
    if not (isinstance(staleness, int) and staleness >= 0):
        raise ValueError(f"part {part}: staleness={staleness!r} is no number of updates.")
    accumulated = recipe.get("gradient_accumulation_steps", 1)
    if staleness and (recipe["num_iterations"] != 1 or recipe["steps_per_generation"] != accumulated):
        raise ValueError(
            f"part {part}: with staleness={staleness} a batch of rollouts is for one update: num_iterations must be "
            f"1, and steps_per_generation the {accumulated} of gradient_accumulation_steps."
        )
    if staleness >= batches:
        raise ValueError(
            f"part {part}: of rollout_batches={batches} none is staleness={staleness} updates old in time."
        )


def check_dtype(recipe: dict[str, Any], part: str) -> None:
    """Raises a `ValueError` where rollouts cannot be written in the dtype that the recipe names."""
    dtype = recipe.get("rollout_dtype")
    if dtype not in (None, *ROLLOUT_DTYPES):
        raise ValueError(f"part {part}: rollout_dtype={dtype!r} is unknown; use one of {', '.join(ROLLOUT_DTYPES)}.")
    if dtype and recipe.get("use_vllm"):
        raise ValueError(
            f"part {part}: with use_vllm the engine's dtype is its own; leave rollout_dtype={dtype!r} out."
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
