"""Datasets and prompts: from a hub, a file, a folder or a generator, to the columns that the trainer reads."""

import logging
import math
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from accelerate import PartialState
from tqdm import tqdm

from ..rewards.code_tests import UnreadableTests, read_tests
from ..rewards.golds import UnreadableGold, read_gold
from ..rewards.pool import Limits, VerifierPool
from ..suggestions import nearest
from ..together import decided_by_main
from .existing_run import RunArguments
from .images import COLUMNS as IMAGES
from .images import placeholders_of, with_images
from .recipe import mapping

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase
    from trl import DatasetMixtureConfig

# The functions import datasets themselves: the arguments are parsed and checked before it has loaded.

logger = logging.getLogger(__name__)

GENERATED = "reasoning_gym:"
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
SHOWN = 3  # bad rows that a message shows
MIXTURE_SEED = 0
CHECKED_TOGETHER = 1000  # references; other processes wait for so many at a time
PLAIN_NUMBER = re.compile(r"\$-?\d+(?:\.\d+)?\$")  # no need to ask math-verify


@dataclass
class DataArguments(RunArguments):
    """Which data, and how a row becomes a prompt; beside TRL's `dataset_name`, `dataset_config` and splits.

    Args:
        dataset_options (`dict`, *optional*): Options of a `reasoning_gym:<task>` dataset; `size` (default 1,000) and
            `seed` (default 0) hold for the training split, `test_size` (default 100) for the other.
        dataset_prompt_column (`str`, defaults to `"prompt"`): Column of the prompts, texts or conversations.
        dataset_solution_column (`str`, defaults to `"solution"`): Column of the reference answers.
        system_prompt (`str`, *optional*): First message of every conversation, or text before every plain prompt.
        chat_template (`str`, *optional*): A Jinja template, or the path of one, in place of the tokenizer's.
        response_template (`dict`, *optional*): How the tokenizer reads a completion as a message, for a chat template
            that TRL does not know: https://huggingface.co/docs/transformers/main/en/chat_response_parsing.
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
    response_template: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "How the tokenizer reads a completion as a message."}
    )
    prompt_format: Literal["auto", "conversational", "plain"] = field(
        default="auto", metadata={"help": "`auto`: conversational where the tokenizer has a chat template."}
    )
    max_prompt_length: int | None = field(default=None, metadata={"help": "Longest prompt in tokens."})
    long_prompts: Literal["drop", "refuse"] = field(
        default="drop", metadata={"help": "What becomes of prompts over `max_prompt_length`."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dataset_options = mapping("dataset_options", self.dataset_options)
        self.response_template = mapping("response_template", self.response_template)
        if self.chat_template and "{" not in self.chat_template and not Path(self.chat_template).is_file():
            raise ValueError(f"chat_template={self.chat_template!r} is no file here, and no Jinja template.")
        if self.dataset_streaming:
            raise ValueError("dataset_streaming=True: every row is checked before training; leave it out.")
        for name, choices in (
            ("prompt_format", ("auto", "conversational", "plain")),
            ("long_prompts", ("drop", "refuse")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(choices)}.")


def read_template(template: str) -> str:
    """The chat template: the text itself, or that of the file it names."""
    return template if "{" in template else Path(template).read_text(encoding="utf-8")


def load_splits(args: DataArguments, mixture: "DatasetMixtureConfig") -> "DatasetDict":
    """The dataset's splits, as stored.

    Raises:
        ValueError: there is no such file, folder, hub dataset or reasoning-gym task, or neither a name nor a mixture.
    """
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError
    from transformers import set_seed
    from trl import get_dataset

    name = args.dataset_name
    if mixture.datasets and name:
        raise ValueError(f"dataset_name={name!r} and a mixture in `datasets` are both given; remove one.")
    if mixture.datasets:
        if mixture.streaming:
            raise ValueError("streaming=True: every row is checked before training; leave it out.")
        set_seed(MIXTURE_SEED)  # its test split is drawn from the global state: alike on all processes and at a resume
        return get_dataset(mixture)
    if not name:
        raise ValueError("No data: give dataset_name, or a mixture in `datasets`.")
    if name.startswith(GENERATED):
        return generate(name.removeprefix(GENERATED), mapping("dataset_options", args.dataset_options))
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
    splits, seen = {}, set[str]()
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


def check_columns(
    dataset: "Dataset", args: DataArguments, needs_solution: list[str], tests: "Sequence[str]" = ()
) -> None:
    """Raises a `ValueError` that names the column and the choices, where what the run needs is not there."""
    prompt, solution = args.dataset_prompt_column, args.dataset_solution_column
    columns = ", ".join(dataset.column_names)
    if prompt not in dataset.column_names:
        raise ValueError(
            f"dataset_prompt_column={prompt!r} is not in the dataset{nearest(prompt, dataset.column_names)}; its "
            f"columns are: {columns}."
        )
    for column in tests:
        if column not in dataset.column_names:
            raise ValueError(
                f"The code reward reads tests in the column {column!r}{nearest(column, dataset.column_names)}, and "
                f"the dataset has: {columns}. Name it: `reward_parameters: {{code: {{tests: …}}}}`."
            )
    if not needs_solution:
        return
    if solution not in dataset.column_names:
        raise ValueError(
            f"dataset_solution_column={solution!r} is not in the dataset{nearest(solution, dataset.column_names)}, "
            f"and the rewards {', '.join(needs_solution)} need it; its columns are: {columns}."
        )
    if prompt == solution:
        raise ValueError(f"dataset_prompt_column and dataset_solution_column are both {prompt!r}; name two columns.")


def prepare(
    dataset: "Dataset",
    args: DataArguments,
    processor: Any,
    needs_mathematics: bool,
    template_kwargs: dict[str, Any] | None = None,
    tests: "Sequence[str]" = (),
    shown: "Callable[[dict[str, Any]], dict[str, Any]]" = lambda row: {},
) -> "Dataset":
    """The dataset as stored, with the columns `prompt` and `solution` as the trainer and the rewards read them.

    Args:
        dataset: Rows as stored, with the columns that [`check_columns`] asks for; they stay, under their names.
        args: Column names, prompt format and limits.
        processor: The model's tokenizer, or processor; renders the prompts, to measure them.
        needs_mathematics: Drop the rows whose solution the accuracy reward cannot read.
        template_kwargs: Variables of the chat template, TRL's `chat_template_kwargs`.
        tests: Columns of tests of programs; drop the rows whose tests the code reward does not understand.
        shown: Variables of the chat template by which a row's prompt shows tools.

    Raises:
        ValueError: a row has no prompt, the columns look exchanged, a prompt is too long and `long_prompts` is
            refuse, or no row is left.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    dataset = with_images(dataset, args.dataset_name)
    prompts = list(dataset[args.dataset_prompt_column])
    check_prompts(prompts, args.dataset_prompt_column)
    conversational = args.prompt_format == "conversational" or (
        args.prompt_format == "auto" and tokenizer.chat_template is not None
    )
    if args.system_prompt and (replaced := sum(map(has_system_message, prompts))):
        logger.warning("system_prompt takes the place of the system message in %d conversations.", replaced)
    solution = args.dataset_solution_column
    if solution in dataset.column_names:
        dataset = with_column(dataset, "solution", list(dataset[solution]))
    built = [build_prompt(prompt, args.system_prompt, conversational) for prompt in prompts]
    dataset = with_column(dataset, "prompt", built)
    if needs_mathematics:
        dataset = drop_unreadable_golds(dataset, prompts)
    for column in tests:
        dataset = drop_unreadable_tests(dataset, column)
    if args.max_prompt_length is not None:
        rows = dataset.remove_columns([name for name in IMAGES if name in dataset.column_names])
        texts = [
            render(row["prompt"], processor, {**(template_kwargs or {}), **shown(row)}, images)
            for row, images in zip(rows, placeholders_of(dataset), strict=True)
        ]
        dataset = drop_long_prompts(dataset, texts, args.max_prompt_length, args.long_prompts, tokenizer)
    if len(dataset) == 0:
        raise ValueError("No row of a split is left to train on, or to evaluate on: see the messages above.")
    return dataset


def check_prompts(prompts: "Sequence[Any]", column: str) -> None:
    """Raises a `ValueError` that names the rows whose prompt is missing, or neither a text nor a conversation."""
    if bad := [index for index, prompt in enumerate(prompts) if prompt is None or prompt in ("", [])]:
        raise ValueError(
            f"{len(bad)} of {len(prompts)} rows have no prompt in the column {column!r}, the first: row {bad[0]}. "
            "Remove them, or name another column."
        )
    for index, prompt in enumerate(prompts):
        messages = prompt if isinstance(prompt, list) else []
        if not isinstance(prompt, str) and not (
            messages and all(isinstance(m, dict) and "role" in m for m in messages)
        ):
            raise ValueError(
                f"dataset_prompt_column={column!r}: row {index} has {prompt!r:.100}, which is neither a text nor a "
                "conversation, a list of messages with role and content."
            )


def with_column(dataset: "Dataset", name: str, values: list) -> "Dataset":
    """The dataset with that column, in place of one of that name."""
    if name not in dataset.column_names:
        return dataset.add_column(name, values)
    # Added first: without a column it would have no rows.
    return dataset.add_column(f"new_{name}", values).remove_columns(name).rename_column(f"new_{name}", name)


def has_system_message(prompt: Any) -> bool:
    return not isinstance(prompt, str) and prompt[0].get("role") == "system"


def build_prompt(prompt: Any, system_prompt: str | None, conversational: bool) -> Any:
    """The prompt in the form asked for; a conversation stays one, and `system_prompt` is its one system message."""
    if isinstance(prompt, str) and not conversational:
        return f"{system_prompt}\n{prompt}" if system_prompt else prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not system_prompt:
        return messages
    return [{"role": "system", "content": system_prompt}, *messages[has_system_message(messages) :]]


def render(
    prompt: Any, processor: Any, template_kwargs: dict[str, Any] | None = None, images: "Sequence[Any]" = ()
) -> str:
    """The text that the model sees; an image is there by its placeholder."""
    if isinstance(prompt, str):
        return prompt
    if hasattr(processor, "image_processor"):
        from trl import prepare_multimodal_messages

        prompt = prepare_multimodal_messages(prompt, images=list(images))
    return processor.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True, **(template_kwargs or {}))


def opens_think(rendered: str) -> bool:
    """Whether a rendered prompt ends inside `<think>`, so that completions start without the tag."""
    return rendered.rstrip().endswith("<think>")


def drop_unreadable_golds(dataset: "Dataset", prompts: "Sequence[Any]") -> "Dataset":
    """Drops the rows whose solution is not surely understood, or not by math-verify; counts them, and shows some.

    Raises:
        ValueError: most solutions are not understood, and most prompts would be.
    """
    solutions = list(dataset["solution"])
    read, why = read_golds(solutions)
    in_doubt = sorted({gold for gold in read if gold and not PLAIN_NUMBER.fullmatch(gold)})
    unparseable = unparseable_golds(in_doubt)
    why |= {index: "math-verify cannot parse it" for index, gold in enumerate(read) if gold in unparseable}
    if len(why) > len(dataset) / 2:
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if len(texts) - len(read_golds(texts)[1]) > len(dataset) / 2:
            raise ValueError(
                f"{len(why)} of {len(dataset)} solutions are no answers, and most prompts look like answers: are "
                "dataset_prompt_column and dataset_solution_column exchanged?"
            )
    if missing := sum(gold is None for index, gold in enumerate(read) if index not in why):
        logger.warning("%d of %d rows have no solution; accuracy skips them.", missing, len(dataset))
    if why:
        shown = "; ".join(f"row {index}: {solutions[index]!r:.200} ({why[index]})" for index in sorted(why)[:SHOWN])
        logger.warning(
            "Dropped %d of %d rows whose solution is not surely understood: %s", len(why), len(dataset), shown
        )
    return dataset.select([index for index in range(len(dataset)) if index not in why]) if why else dataset


def drop_unreadable_tests(dataset: "Dataset", column: str) -> "Dataset":
    """Drops the rows whose tests of programs are missing or not surely understood; counts them, and shows some."""
    why: dict[int, str] = {}
    for index, tests in enumerate(dataset[column]):
        try:
            read_tests(tests)
        except UnreadableTests as reason:
            why[index] = str(reason)
    if why:
        shown = "; ".join(f"row {index}: {why[index]:.200}" for index in sorted(why)[:SHOWN])
        logger.warning(
            "Dropped %d of %d rows whose %s are not surely understood: %s", len(why), len(dataset), column, shown
        )
    return dataset.select([index for index in range(len(dataset)) if index not in why]) if why else dataset


def read_golds(golds: "Sequence[Any]") -> tuple[list[str | None], dict[int, str]]:
    """Each reference as LaTeX, None where there is none; and why by index for those that are not understood."""
    read, why = [], {}
    for index, gold in enumerate(golds):
        try:
            read.append(read_gold(gold))
        except UnreadableGold as reason:
            read.append(None)
            why[index] = str(reason)
    return read, why


def unparseable_golds(golds: list[str]) -> set[str]:
    """Those that math-verify cannot parse; the main process asks it, and shows how far it is."""
    pool = VerifierPool(Limits(budget=math.inf))
    chunks = [golds[start : start + CHECKED_TOGETHER] for start in range(0, len(golds), CHECKED_TOGETHER)]
    unparseable = set()
    hidden = True if not PartialState().is_main_process else None  # None: hidden without a terminal
    for chunk in tqdm(chunks, desc=f"Checking {len(golds)} solutions", disable=hidden):
        verdicts = decided_by_main(partial(pool.judge, [(gold, "") for gold in chunk]))
        unparseable |= {gold for gold, verdict in zip(chunk, verdicts, strict=True) if verdict.status != "no_answer"}
    pool.close()
    return unparseable


def drop_long_prompts(
    dataset: "Dataset", texts: list[str], longest: int, long_prompts: str, tokenizer: "PreTrainedTokenizerBase"
) -> "Dataset":
    """Drops the rows whose rendered prompts have more than `longest` tokens and says how many, or refuses.

    A prompt is never cut.
    """
    lengths = [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
    kept = [index for index, length in enumerate(lengths) if length <= longest]
    if len(kept) < len(lengths):
        message = (
            f"{len(lengths) - len(kept)} of {len(lengths)} prompts have more than max_prompt_length="
            f"{longest} tokens, the longest {max(lengths)}"
        )
        if long_prompts == "refuse":
            raise ValueError(f"{message}; raise it, or set long_prompts: drop.")
        logger.warning("%s; dropped.", message)
    return dataset.select(kept)
