"""What an evaluation leaves: a table, results.json, and one line per question in <task>.jsonl."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

HEADER = ("task", "metric", "n", "k", "questions", "score", "± s.e.", "tokens", "truncated", "no answer", "left out")


def standard_error(scores: Sequence[float]) -> float:
    """Of the mean over questions: the deviation of the questions' scores over √questions; NaN for one question."""
    return statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else math.nan


def summarise(task: str, questions: list[dict], left_out: int = 0) -> dict:
    """One task's row.

    Args:
        task: Its name.
        questions: Per question `scores`, `answers`, `tokens` and `truncated`, each `(n,)`.
        left_out: Questions that were not asked, because their answer is not surely understood.
    """
    means = [statistics.fmean(question["scores"]) for question in questions]
    flat = {
        key: [value for question in questions for value in question[key]] for key in ("answers", "tokens", "truncated")
    }
    return {
        "task": task,
        "metric": "pass@1",
        "n": len(questions[0]["scores"]),
        "k": 1,
        "questions": len(questions),
        "score": statistics.fmean(means),
        "standard_error": standard_error(means),
        "tokens": statistics.fmean(flat["tokens"]),
        "truncated": statistics.fmean(flat["truncated"]),
        "left_out": left_out,
        "no_answer": statistics.fmean(answer is None for answer in flat["answers"]),
    }


def write(folder: Path, summary: dict, questions: dict[str, list[dict]]) -> str:
    """Writes the files and returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, rows in questions.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{task.replace(':', '_')}.jsonl").write_text(lines, encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return table(summary["tasks"])


def table(rows: list[dict]) -> str:
    cells = [HEADER]
    for row in rows:
        numbers = (f"{row['score']:.4f}", f"{row['standard_error']:.4f}", f"{row['tokens']:.1f}")
        shares = (f"{row['truncated']:.1%}", f"{row['no_answer']:.1%}")
        counts = (str(row["n"]), str(row["k"]), str(row["questions"]))
        cells.append((row["task"], row["metric"], *counts, *numbers, *shares, str(row["left_out"])))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(align, line, widths, range(len(line)))).rstrip() for line in cells)


def align(cell: str, width: int, column: int) -> str:
    """Names to the left, numbers to the right."""
    return cell.ljust(width) if column < 2 else cell.rjust(width)
