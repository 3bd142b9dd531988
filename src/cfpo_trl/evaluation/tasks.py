"""Tasks: lighteval's by name, a JSONL file by path; scored per completion, so that n samples average to pass@1."""

import difflib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from lighteval.metrics.dynamic_metrics import (
    MultilingualExtractiveMatchMetric,
    extract_target_from_pred,
    get_extraction_regexes,
)
from lighteval.metrics.metrics import Metrics
from lighteval.metrics.metrics_sample import SampleLevelComputation, SamplingMetric
from lighteval.metrics.utils.metric_utils import SampleLevelMetric
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.registry import Registry
from lighteval.tasks.requests import Doc, SamplingMethod

from ..rewards.golds import UnreadableGold, read_gold
from .errors import EvaluationError

HUB = {  # beyond lighteval's: the dataset, and its column of answers; one test split each, with the column `question`
    "amc23": ("math-ai/amc23", "answer"),
    "minerva_math": ("math-ai/minervamath", "answer"),
    "olympiadbench": ("math-ai/olympiadbench", "final_answer"),
}
BOXED = "\nReason step by step, and put the final answer in \\boxed{}."  # what follows their questions
GROUPS = {"reasoning": ("math_500", "aime24", "aime25", "gpqa:diamond", "gsm8k", *HUB)}
QUESTIONS = ("problem", "question", "prompt")
ANSWERS = ("solution", "answer")


class TaskError(EvaluationError):
    """A task that cannot be run; the message says why, and what can."""


@dataclass
class TaskOptions:
    """What the command line says of every task.

    Args:
        samples: Completions per question, n.
        max_new_tokens: Longest completion; None takes the task's own.
        metric: For files: `math` reads mathematics in the completion, `exact_match` compares the text.
    """

    samples: int = 1
    max_new_tokens: int | None = None
    metric: str = "math"


@dataclass
class Tasks:
    """What lighteval is given.

    Args:
        module: For its registry.
        registered: Each task's name there.
        refused: By task and row, why a question is left out: its answer is not surely understood.
    """

    module: ModuleType
    registered: dict[str, str]
    refused: dict[str, dict[int, str]]


class PerCompletion(SamplingMetric, SampleLevelComputation):
    """Scores each completion of a question by itself; the question's score is their mean.

    Leaves in the question's `specific`: `scores` and `answers` (what was read, None where nothing was), `(n,)` each.
    """

    def __init__(self, matcher: SampleLevelComputation, samples: int):
        super().__init__()  # lighteval asks a SamplingMetric how many completions it needs
        self.matcher, self.samples = matcher, samples

    def compute(self, doc: Doc, model_response: ModelResponse, **kwargs) -> float:
        scores, answers = [], []
        for index in range(len(model_response.final_text)):
            alone = replace(doc, specific=None)
            text = model_response.final_text[index].strip()
            scores.append(float(self.matcher.compute(doc=alone, model_response=ModelResponse(text=[text]))))
            answers.append(((alone.specific or {}).get("extracted_predictions") or [None])[0])
        doc.specific = {**(doc.specific or {}), "scores": scores, "answers": answers}
        return sum(scores) / len(scores)

    def num_samples(self) -> int:
        return self.samples


class ExactMatch(SampleLevelComputation):
    """1 where the completion is the answer, but for space around it."""

    def compute(self, doc: Doc, model_response: ModelResponse, **kwargs) -> float:
        text = model_response.final_text[0].strip()
        doc.specific = {"extracted_predictions": [text] if text else []}
        return float(text == doc.get_golds()[0].strip())


def build_tasks(names: list[str], options: TaskOptions, folder: Path) -> Tasks:
    """The tasks of these names; files are linked below `folder`.

    Raises:
        TaskError: there is no such task or file, its columns are unknown, or its scores cannot be read per completion.
    """
    known = Registry.load_all_task_configs()
    module: Any = ModuleType("cfpo_trl_tasks")
    module.TASKS_TABLE = []
    tasks = Tasks(module, {}, {})
    for name in (member for given in names for member in GROUPS.get(given, (given,))):
        if Path(name).suffix == ".jsonl":
            config = file_task(Path(name), options, folder, tasks)
        elif name in HUB:
            repository, answer = HUB[name]
            config = question_task(name, repository, ("question", answer), options, tasks, after=BOXED)
        elif name in known:
            config = replace(known[name], metrics=(per_completion(matcher_of(known[name]), options),))
        else:
            near = difflib.get_close_matches(name, [*known, *HUB, *GROUPS], n=5)
            raise TaskError(f"TASK={name!r} is no task of lighteval and no .jsonl file; near to it: {', '.join(near)}")
        if options.max_new_tokens is not None:
            config = replace(config, generation_size=options.max_new_tokens)
        tasks.registered[config.name] = f"evaluated_{config.name.replace(':', '_')}"  # lighteval's own name is taken
        module.TASKS_TABLE.append(replace(config, name=tasks.registered[config.name]))
    return tasks


def per_completion(matcher: SampleLevelComputation, options: TaskOptions) -> SampleLevelMetric:
    return SampleLevelMetric(
        metric_name="pass@1",
        sample_level_fn=PerCompletion(matcher, options.samples),
        category=SamplingMethod.GENERATIVE,
        corpus_level_fn=np.mean,
        higher_is_better=True,
    )


def matcher_of(config: LightevalTaskConfig) -> MultilingualExtractiveMatchMetric:
    """How a task of lighteval compares one completion with the gold."""
    for metric in config.metrics:
        function = metric.sample_level_fn
        matcher = getattr(getattr(function, "compute_score", None), "__self__", function)
        if isinstance(matcher, MultilingualExtractiveMatchMetric):
            return matcher
    raise TaskError(f"TASK={config.name!r} does not extract an answer from a completion; such tasks are not run here.")


def file_task(path: Path, options: TaskOptions, folder: Path, tasks: Tasks) -> LightevalTaskConfig:
    """A JSONL file of problems and solutions (or questions and answers) as a task."""
    if not path.is_file():
        raise TaskError(f"TASK={str(path)!r}: there is no such file.")
    with path.open(encoding="utf-8") as file:
        columns = list(json.loads(file.readline()))
    question = next((name for name in QUESTIONS if name in columns), None)
    answer = next((name for name in ANSWERS if name in columns), None)
    if question is None or answer is None:
        raise TaskError(
            f"TASK={str(path)!r} has the columns {', '.join(columns)}; it needs one of {', '.join(QUESTIONS)} and "
            f"one of {', '.join(ANSWERS)}."
        )
    name = f"{path.absolute().parent.name}_{path.stem}"
    if same := sum(known == name or known.startswith(f"{name}_") for known in tasks.registered):
        name = f"{name}_{same + 1}"  # of another folder with the same name
    repository = folder / name  # a dataset of one file
    repository.mkdir(parents=True)
    os.symlink(path.absolute(), repository / "test.jsonl")
    return question_task(name, str(repository), (question, answer), options, tasks)


def question_task(
    name: str, repository: str, columns: tuple[str, str], options: TaskOptions, tasks: Tasks, after: str = ""
) -> LightevalTaskConfig:
    """The test split of a dataset as a task: its columns of questions and answers; `after` follows each question."""
    mathematics = options.metric == "math"
    matcher = Metrics.avg_at_n_math.value.sample_level_fn.compute_score.__self__ if mathematics else ExactMatch()
    question, answer = columns
    refused = tasks.refused[name] = {}

    def to_doc(line: dict, task_name: str) -> Doc | None:
        try:
            gold = readable(line[answer], matcher) if mathematics else str(line[answer])
        except UnreadableGold as reason:
            refused[line["__index"]] = f"{line[answer]!r:.200} ({reason})"
            return None  # lighteval leaves it out
        return Doc(task_name=task_name, query=line[question] + after, choices=[gold], gold_index=0)

    return LightevalTaskConfig(
        name=name,
        prompt_function=to_doc,
        hf_repo=repository,
        hf_subset="default",
        hf_avail_splits=["test"],
        evaluation_splits=["test"],
        generation_size=32768,
        stop_sequence=[],
        metrics=[per_completion(matcher, options)],
    )


def readable(answer: object, matcher: MultilingualExtractiveMatchMetric) -> str:
    """The answer as LaTeX, read as in training. Raises an `UnreadableGold` where lighteval cannot parse that."""
    gold = read_gold(answer)
    if gold is None:
        raise UnreadableGold("no answer")
    doc = Doc(query="", choices=[gold], gold_index=0)
    patterns = get_extraction_regexes(doc, matcher.gold_extraction_target, matcher.language)
    extracted = extract_target_from_pred(
        gold, patterns, matcher.fallback_mode, matcher.extraction_mode, matcher.timeout_seconds
    )
    if all(isinstance(found, str) for found in extracted):
        raise UnreadableGold("lighteval cannot parse it")
    return gold
