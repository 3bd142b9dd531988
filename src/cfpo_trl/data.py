"""Datasets and prompts: from a hub, a file, a folder or a generator, to the columns that the trainer reads."""

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trl import ScriptArguments

from .rewards.golds import NUMBER, normalise_gold
from .rewards.pool import Limits, get_pool

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase
    from trl import DatasetMixtureConfig

# The functions import datasets themselves: the arguments are parsed and checked before it has loaded.

logger = logging.getLogger(__name__)

GENERATED = "reasoning_gym:"
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SHOWN = 3  # bad rows that a message shows


@dataclass
class DataArguments(ScriptArguments):
    """Which data, and how a row becomes a prompt; beside TRL's `dataset_name`, `dataset_config` and splits.

    Args:
        dataset_options (`dict`, *optional*): Options of a `reasoning_gym:<task>` dataset; `size` (default 1,000) and
            `seed` (default 0) hold for the training split, `test_size` (default 100) for the other.
        dataset_prompt_column (`str`, defaults to `"prompt"`): Column of the prompts, texts or conversations.
        dataset_solution_column (`str`, defaults to `"solution"`): Column of the reference answers.
        system_prompt (`str`, *optional*): First message of every conversation, or text before every plain prompt.
        chat_template (`str`, *optional*): A Jinja template, or the path of one, in place of the tokenizer's.
        prompt_format (`str`, defaults to `"auto"`): `conversational`, `plain`, or `auto`: by whether the tokenizer
            has a chat template.
        max_prompt_length (`int`, *optional*): Prompts of more tokens are handled as `long_prompts` says.
        long_prompts (`str`, defaults to `"drop"`): `drop` them and say how many, or `refuse` to train.
    """

    dataset_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of a `reasoning_gym:<task>` dataset."}
    )
    dataset_prompt_column: str = field(default="prompt", metadata={"help": "Column of the prompts."})
    dataset_solution_column: str = field(default="solution", metadata={"help": "Column of the reference answers."})
    system_prompt: str | None = field(default=None, metadata={"help": "First message of every conversation."})
    chat_template: str | None = field(default=None, metadata={"help": "A Jinja template, or the path of one."})
    prompt_format: Literal["auto", "conversational", "plain"] = field(
        default="auto", metadata={"help": "`auto`: conversational where the tokenizer has a chat template."}
    )
    max_prompt_length: int | None = field(default=None, metadata={"help": "Longest prompt in tokens."})
    long_prompts: Literal["drop", "refuse"] = field(
        default="drop", metadata={"help": "What becomes of prompts over `max_prompt_length`."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.dataset_options, str):  # from the command line
            self.dataset_options = json.loads(self.dataset_options)
        if self.dataset_streaming:
            raise ValueError("dataset_streaming=True: every row is checked before training; leave it out.")
        for name, choices in (
            ("prompt_format", ("auto", "conversational", "plain")),
            ("long_prompts", ("drop", "refuse")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(choices)}.")


def load_splits(args: DataArguments, mixture: "DatasetMixtureConfig") -> "DatasetDict":
    """The dataset's splits, as stored.

    Raises:
        ValueError: there is no such file, folder, hub dataset or reasoning-gym task, or neither a name nor a mixture.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError
    from trl import get_dataset

    name = args.dataset_name
    if mixture.datasets and name:
        raise ValueError(f"dataset_name={name!r} and a mixture in `datasets` are both given; remove one.")
    if mixture.datasets:
        return get_dataset(mixture)
    if not name:
        raise ValueError("No data: give dataset_name, or a mixture in `datasets`.")
    if name.startswith(GENERATED):
        return generate(name.removeprefix(GENERATED), dict(args.dataset_options or {}))
    path = Path(name)
    if path.is_file() and path.suffix not in BUILDERS:
        raise ValueError(f"dataset_name={name!r} ends in {path.suffix!r}; readable: {', '.join(BUILDERS)}.")
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        saved = load_from_disk(name)
        return saved if isinstance(saved, DatasetDict) else DatasetDict({args.dataset_train_split: saved})
    try:
        if path.is_file():
            return load_dataset(BUILDERS[path.suffix], data_files=str(path))
        return load_dataset(name, name=args.dataset_config)
    except DatasetGenerationError as error:
        raise ValueError(f"dataset_name={name!r} cannot be read: {error.__cause__ or error}") from error
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"dataset_name={name!r} is no file or folder here, and no dataset that a hub gave: {error}"
        ) from error


def generate(task: str, options: dict[str, Any]) -> "DatasetDict":
    """Problems of a reasoning-gym task, made offline; no question of the test split is in the training split.

    The columns are prompt and solution.
    """
    import reasoning_gym
    from datasets import Dataset, DatasetDict
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise ValueError(
            f"dataset_name='{GENERATED}{task}': no such task; reasoning-gym has {', '.join(sorted(DATASETS))}."
        )
    sizes = {"train": options.pop("size", 1000), "test": options.pop("test_size", 100)}
    seed = options.pop("seed", 0)
    splits, seen = {}, set()
    for split, size in sizes.items():
        entries = reasoning_gym.create_dataset(task, size=size, seed=seed, **options)
        seed += size  # a problem's seed is the dataset's plus its index: go on behind the last one
        fresh = [entry for entry in entries if entry["question"] not in seen]
        if not fresh:
            raise ValueError(
                f"dataset_options: none of the {size} problems for {split} is new; {task} has no more with these "
                "options: make size smaller, or the problems more varied."
            )
        seen.update(entry["question"] for entry in fresh)
        columns = {"prompt": "question", "solution": "answer"}
        splits[split] = Dataset.from_dict({name: [entry[key] for entry in fresh] for name, key in columns.items()})
        logger.info("%s%s: %d problems for %s", GENERATED, task, len(fresh), split)
    return DatasetDict(splits)


def select_split(splits: "DatasetDict", split: str, option: str) -> "Dataset":
    """The split of that name; a `ValueError` names the option and the splits that there are."""
    if split not in splits:
        raise ValueError(f"{option}={split!r} is not in the dataset, which has: {', '.join(splits)}.")
    return splits[split]


def check_columns(dataset: "Dataset", args: DataArguments, needs_solution: list[str]) -> None:
    """Raises a `ValueError` that names the columns there are, where the prompts' or a needed solutions' is missing."""
    columns = ", ".join(dataset.column_names)
    if args.dataset_prompt_column not in dataset.column_names:
        raise ValueError(
            f"dataset_prompt_column={args.dataset_prompt_column!r} is not in the dataset; its columns are: {columns}."
        )
    if needs_solution and args.dataset_solution_column not in dataset.column_names:
        raise ValueError(
            f"dataset_solution_column={args.dataset_solution_column!r} is not in the dataset, and the rewards "
            f"{', '.join(needs_solution)} need it; its columns are: {columns}."
        )


def prepare(
    dataset: "Dataset",
    args: DataArguments,
    tokenizer: "PreTrainedTokenizerBase",
    needs_mathematics: bool,
) -> "Dataset":
    """The dataset with the columns `prompt` and `solution` as the trainer and the rewards read them.

    Args:
        dataset: Rows as stored, with the columns that [`check_columns`] asks for.
        args: Column names, prompt format and limits.
        tokenizer: Renders the prompts, to measure them.
        needs_mathematics: Normalise the solutions for math-verify, and drop those that it cannot read.

    Raises:
        ValueError: a prompt is too long and `long_prompts` is refuse, or no row is left.
    """
    rename = {args.dataset_prompt_column: "prompt", args.dataset_solution_column: "solution"}
    for column, name in rename.items():
        if column != name and column in dataset.column_names:
            if name in dataset.column_names:
                dataset = dataset.remove_columns(name)
            dataset = dataset.rename_column(column, name)

    conversational = args.prompt_format == "conversational" or (
        args.prompt_format == "auto" and tokenizer.chat_template is not None
    )
    dataset = dataset.map(lambda row: {"prompt": build_prompt(row["prompt"], args.system_prompt, conversational)})
    if needs_mathematics:
        dataset = drop_unreadable_golds(dataset)
    if args.max_prompt_length is not None:
        dataset = drop_long_prompts(dataset, args, tokenizer)
    if len(dataset) == 0:
        raise ValueError("No row of a split is left to train on, or to evaluate on: see the messages above.")
    return dataset


def build_prompt(prompt: Any, system_prompt: str | None, conversational: bool) -> Any:
    """The prompt in the form asked for; a prompt that is a conversation already stays one."""
    if isinstance(prompt, str) and not conversational:
        return f"{system_prompt}\n{prompt}" if system_prompt else prompt
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return [*system, *messages]


def render(prompt: Any, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text that the model sees."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def opens_think(rendered: str) -> bool:
    """Whether a rendered prompt ends inside `<think>`, so that completions start without the tag."""
    return rendered.rstrip().endswith("<think>")


def drop_unreadable_golds(dataset: "Dataset") -> "Dataset":
    """Normalises the solutions for math-verify; drops, counts and shows those that it cannot read."""
    golds = [normalise_gold(gold) for gold in dataset["solution"]]
    unsure = sorted({gold for gold in golds if gold is not None and not NUMBER.fullmatch(gold)})
    verdicts = get_pool(Limits(budget=600)).judge([(gold, "") for gold in unsure])
    bad = {gold for gold, verdict in zip(unsure, verdicts, strict=True) if verdict.status != "no_answer"}
    dropped = [index for index, gold in enumerate(golds) if gold in bad]
    missing = sum(gold is None for gold in golds)
    if missing:
        logger.warning("%d of %d rows have no solution; accuracy skips them.", missing, len(golds))
    if dropped:
        shown = "; ".join(f"row {index}: {dataset[index]['solution']!r}"[:200] for index in dropped[:SHOWN])
        logger.warning(
            "Dropped %d of %d rows whose solution math-verify cannot read: %s", len(dropped), len(golds), shown
        )
    dataset = dataset.remove_columns("solution").add_column("solution", golds)
    return dataset.select([index for index, gold in enumerate(golds) if gold not in bad])


def drop_long_prompts(dataset: "Dataset", args: DataArguments, tokenizer: "PreTrainedTokenizerBase") -> "Dataset":
    """Drops the prompts over `max_prompt_length` and says how many, or refuses; a prompt is never cut."""
    lengths = [
        len(tokenizer(render(prompt, tokenizer), add_special_tokens=False).input_ids) for prompt in dataset["prompt"]
    ]
    kept = [index for index, length in enumerate(lengths) if length <= args.max_prompt_length]
    if len(kept) < len(lengths):
        message = (
            f"{len(lengths) - len(kept)} of {len(lengths)} prompts have more than max_prompt_length="
            f"{args.max_prompt_length} tokens, the longest {max(lengths)}"
        )
        if args.long_prompts == "refuse":
            raise ValueError(f"{message}; raise it, or set long_prompts: drop.")
        logger.warning("%s; dropped.", message)
    return dataset.select(kept)
