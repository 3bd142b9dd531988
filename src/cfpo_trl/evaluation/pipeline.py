"""lighteval's pipeline over the tasks: what each question was answered, and how that scored."""

import argparse
import contextlib
from pathlib import Path

from lighteval.logging.evaluation_tracker import EvaluationTracker
from lighteval.logging.info_loggers import DetailsLogger
from lighteval.models.model_input import GenerationParameters
from lighteval.models.transformers.transformers_model import TransformersModelConfig
from lighteval.pipeline import ParallelismManager, Pipeline, PipelineParameters
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, set_seed

from .errors import EvaluationError
from .server import ServerConfig, ServerModel
from .tasks import Tasks


def run(
    options: argparse.Namespace, model: str, url: str | None, tasks: Tasks, scratch: Path
) -> tuple[dict[str, list[dict]], dict[str, str]] | None:
    """Answers and scores all questions of all tasks.

    Args:
        options: The command line's.
        model: Path or name of the whole model.
        url: Address of the server that answers; None answers in this process.
        tasks: From [`~cfpo_trl.evaluation.tasks.build_tasks`].
        scratch: Folder that ends with the run. lighteval's cache of responses lies in it, because its key is the
            model's name, not its weights.

    Returns:
        Per task its questions, and the first prompt as the model saw it; None on all processes but the main one.
    """
    set_seed(options.seed)
    if Path(model).is_dir():  # by a name without a root: lighteval would put its cache into the folder of the model
        (scratch / "checkpoint").symlink_to(Path(model).absolute())
        model = "checkpoint"
    with contextlib.chdir(scratch):
        return answer(options, model, url, tasks)


def answer(
    options: argparse.Namespace, model: str, url: str | None, tasks: Tasks
) -> tuple[dict[str, list[dict]], dict[str, str]] | None:
    """As [`run`], below the working directory."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tracker = EvaluationTracker(output_dir="lighteval", save_details=False)
    pipeline = build_pipeline(options, model, url, tasks, tokenizer, tracker)
    check_prompts(pipeline, {task: name for name, task in tasks.registered.items()}, tokenizer)
    if not url:  # lighteval leaves these to the checkpoint: its penalties, its truncations, and whether it samples
        pipeline.model.generation_config_dict |= {"do_sample": options.temperature > 0, "top_k": 0}
        own = pipeline.model.model.generation_config
        pipeline.model.model.generation_config = GenerationConfig(
            bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
        )
    pipeline.evaluate()
    if not pipeline.is_main_process():  # it has all the answers
        return None
    render = pipeline.model.prompt_manager.prepare_prompt
    details = tracker.details_logger.details
    questions = {
        name: [question(detail, tokenizer) for detail in details[f"{task}|0"]]
        for name, task in tasks.registered.items()
    }
    for name, rows in questions.items():
        if any(len(row["completions"]) != options.samples for row in rows):
            raise EvaluationError(
                f"{name}: a question got another number of completions than SAMPLES={options.samples}."
            )
    return questions, {name: render(details[f"{task}|0"][0].doc) for name, task in tasks.registered.items()}


def build_pipeline(
    options: argparse.Namespace,
    model: str,
    url: str | None,
    tasks: Tasks,
    tokenizer: PreTrainedTokenizerBase,
    tracker: EvaluationTracker,
) -> Pipeline:
    """lighteval's, with the model loaded.

    Raises:
        EvaluationError: a dataset is not on this machine, or none of its answers is surely understood.
    """
    common = {
        "generation_parameters": GenerationParameters(
            temperature=options.temperature, top_p=options.top_p, seed=options.seed
        ),
        "system_prompt": options.system_prompt,
        "cache_dir": "cache",
    }
    if url:
        asked = {"model": ServerModel(ServerConfig(model_name="model", url=url, tokenizer=model, **common))}
    else:
        asked = {
            "model_config": TransformersModelConfig(
                model_name=model,
                batch_size=options.batch_size,
                model_parallel=options.num_gpus > 1 and options.parallel == "tensor",
                add_special_tokens=tokenizer.chat_template is None,  # a template writes its own
                **common,
            )
        }
    parameters = PipelineParameters(
        launcher_type=ParallelismManager.NONE if url else ParallelismManager.ACCELERATE,
        custom_tasks_directory=tasks.module,
        max_samples=options.limit,
    )
    try:
        return Pipeline(
            tasks=",".join(f"{name}|0" for name in tasks.registered.values()),
            pipeline_parameters=parameters,
            evaluation_tracker=tracker,
            **asked,
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise EvaluationError(
            f"A dataset of TASK={options.task!r} is not on this machine, and no hub gave it: {error}"
        ) from error
    except ValueError as error:
        if "has no documents" not in str(error):
            raise
        refused = "; ".join(f"{name}: {next(iter(why.values()))}" for name, why in tasks.refused.items() if why)
        raise EvaluationError(f"No question is left; the answer of none is surely understood, as {refused}") from error


def check_prompts(pipeline: Pipeline, names: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises an `EvaluationError` where no question is left, or a prompt has no token that the model knows."""
    unknown = {tokenizer.pad_token_id, tokenizer.unk_token_id}
    for task, docs in pipeline.documents_dict.items():
        name = names[task.rpartition("|")[0]]
        for doc in docs:
            prompt = pipeline.model.prompt_manager.prepare_prompt(doc)
            if not set(tokenizer(prompt, add_special_tokens=False).input_ids) - unknown:
                raise EvaluationError(f"{name}: row {doc.id} asks {prompt!r:.100}, of which the model knows no token.")


def question(detail: DetailsLogger.Detail, tokenizer: PreTrainedTokenizerBase) -> dict:
    """One question as the report keeps it; a completion counts as truncated if nothing but its length ended it."""
    doc, response = detail.doc, detail.model_response
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    tokens, truncated = [], []
    for ids in response.output_tokens:
        ids = [int(token) for token in ids]
        end = next((position for position, token in enumerate(ids) if token in ends), None)
        tokens.append(len(ids) if end is None else end + 1)
        stopped = any(stop in tokenizer.decode(ids) for stop in doc.stop_sequences or ())
        truncated.append(end is None and not stopped)
    return {
        "question": doc.query,
        "gold": doc.get_golds()[0],
        "completions": response.text,
        "scores": doc.specific["scores"],
        "answers": doc.specific["answers"],
        "tokens": tokens,
        "truncated": truncated,
    }
