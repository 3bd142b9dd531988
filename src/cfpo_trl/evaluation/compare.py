"""Two evaluations of the same questions: the difference, how sure it is, and where they differ.

cfpo compare A B      folders that `cfpo evaluate` wrote (`make compare A=… B=…`)
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np

from .errors import EvaluationError
from .report import standard_error


def load(folder: Path) -> dict[str, list[dict]]:
    """Per task of an evaluation its questions.

    Raises:
        EvaluationError: the folder is none that an evaluation wrote.
    """
    results = folder / "results.json"
    if not results.is_file():
        raise EvaluationError(f"{folder} has no results.json: give folders that `make evaluate OUT=…` wrote.")
    tasks = [row["task"] for row in json.loads(results.read_text(encoding="utf-8"))["tasks"]]
    return {task: read_questions(folder, task) for task in tasks}


def read_questions(folder: Path, task: str) -> list[dict]:
    with (folder / f"{task.replace(':', '_')}.jsonl").open(encoding="utf-8") as lines:  # splitlines() knows more ends
        return [json.loads(line) for line in lines]


def paired_interval(differences: np.ndarray, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """The central 95 % of the mean difference over `draws` resamples of the questions, `(N,)`, with replacement."""
    generator = np.random.default_rng(seed)
    means = [generator.choice(differences, len(differences)).mean() for _ in range(draws)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def compare(task: str, first: list[dict], second: list[dict]) -> tuple[dict, list[tuple[dict, dict]]]:
    """The row of a task, B − A, and the pairs of questions whose scores differ.

    Raises:
        EvaluationError: the two were not asked the same questions.
    """
    if [row["question"] for row in first] != [row["question"] for row in second]:
        raise EvaluationError(
            f"{task}: A answers {len(first)} questions and B {len(second)}, and they are not the same ones in the "
            "same order; evaluate both with the same TASK, LIMIT and SEED."
        )
    scores = [np.array([statistics.fmean(row["scores"]) for row in rows]) for rows in (first, second)]
    differences = scores[1] - scores[0]
    low, high = paired_interval(differences)
    row = {
        "task": task,
        "questions": len(first),
        "A": float(scores[0].mean()),
        "B": float(scores[1].mean()),
        "difference": float(differences.mean()),
        "standard_error": standard_error(differences.tolist()),
        "low": low,
        "high": high,
    }
    return row, [
        pair for pair, difference in zip(zip(first, second, strict=True), differences, strict=True) if difference
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="cfpo compare", description=__doc__)
    parser.add_argument("folders", nargs=2, type=Path, metavar="FOLDER")
    parser.add_argument("--show", type=int, default=10, help="questions that differ, per task")
    options = parser.parse_args(arguments)
    first, second = map(load, options.folders)
    tasks = [task for task in first if task in second]
    if not tasks:
        raise EvaluationError(f"No task in common: A has {', '.join(first)}; B has {', '.join(second)}.")
    for task in tasks:
        row, differing = compare(task, first[task], second[task])
        print(
            f"{task}: A {row['A']:.4f}, B {row['B']:.4f}, B − A {row['difference']:+.4f} "
            f"[{row['low']:+.4f}, {row['high']:+.4f}] (95 %, paired bootstrap over {row['questions']} questions)"
        )
        print(f"{len(differing)} questions differ" + (":" if differing else ""))
        for a, b in differing[: options.show]:
            question = " ".join(a["question"].split())[:80]
            print(f"  {question}  gold {a['gold']}  A {shown(a)}  B {shown(b)}")


def shown(row: dict) -> str:
    return f"{statistics.fmean(row['scores']):.2f} {row['answers'][0]!r}"


if __name__ == "__main__":
    try:
        main()
    except EvaluationError as error:
        sys.exit(str(error))
