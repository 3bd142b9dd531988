"""How the scripts load a model, by the options of TRL's ModelConfig."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from trl import ModelConfig

from ..mistakes import Mistake
from ..suggestions import nearest
from .data import read_template

RESPONSE_TEMPLATES = "https://huggingface.co/docs/transformers/main/en/chat_response_parsing"


def check_model(name: str | None) -> None:
    """Raises a `Mistake` where no model is named, or a folder that is not there; hub names are the hub's to know."""
    if not name:
        raise Mistake("No model: give model_name_or_path, a folder or a hub's name.")
    path = Path(name)
    if path.is_dir():
        if not any((path / file).exists() for file in ("config.json", "adapter_config.json")):
            raise Mistake(f"model_name_or_path={name!r} is a folder without a model's config.json.")
        return
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and path.parent.is_dir()):
        beside = [str(other) for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise Mistake(f"model_name_or_path={name!r}: there is no such folder{nearest(name, beside)}.")


def trusts_remote_code(training_args: TrainingArguments, model_args: ModelConfig) -> bool:
    """`trust_remote_code`, which later TRLs moved from the model's arguments to the training's."""
    return getattr(training_args, "trust_remote_code", None) or getattr(model_args, "trust_remote_code", False)


def model_init_kwargs(training_args: Any, model_args: ModelConfig) -> dict[str, Any]:
    """What a trainer hands to `from_pretrained`: revision, attention, dtype, trust; `model_init_kwargs` overrides."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "trust_remote_code": trusts_remote_code(training_args, model_args),
        **(training_args.model_init_kwargs or {}),
    }


def load_processor(
    training_args: Any,
    model_args: ModelConfig,
    chat_template: str | None,
    response_template: dict[str, Any] | None = None,
) -> Any:
    """The model's processor or tokenizer, with other templates where they are given; the chat's as text or a file."""
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        padding_side="left",
        trust_remote_code=trusts_remote_code(training_args, model_args),
    )
    if chat_template:
        processor.chat_template = read_template(chat_template)
        getattr(processor, "tokenizer", processor).chat_template = processor.chat_template
    if response_template:
        check_response_template(response_template)
        getattr(processor, "tokenizer", processor).response_template = response_template
    return processor


def check_response_template(template: dict[str, Any]) -> None:
    """Raises a `Mistake` for what transformers cannot read: TRL would find no calls then, and say nothing."""
    try:
        from transformers.utils.chat_parsing.response_templates import load_response_template
    except ImportError as error:
        raise Mistake("response_template needs transformers>=5.13.") from error
    try:
        load_response_template(template)
    except (ValueError, TypeError, AttributeError) as error:
        raise Mistake(f"response_template: {error} Its form: {RESPONSE_TEMPLATES}.") from error


def reads_messages(tokenizer: Any) -> bool:
    """Whether TRL can read completions as messages: by the tokenizer's own template, or by one that it has."""
    from trl.chat_template_utils import add_response_schema

    if getattr(tokenizer, "response_template", None) or getattr(tokenizer, "response_schema", None):
        return True
    try:
        add_response_schema(tokenizer)
    except ValueError:  # it does not know the chat template
        return False
    return True


def public_name(dataset_name: str | None) -> str | None:
    """The dataset's name as a model card may show it: a path of this machine is none of its readers' business."""
    return None if dataset_name is None or Path(dataset_name).exists() else dataset_name


@contextmanager
def hide_tied_heads(model: Any) -> Iterator[None]:
    """Hides that the output head is missing, which transformers says at every resume where it is the embedding."""
    tied = list(getattr(model, "_tied_weights_keys", None) or ())
    missing = f"There were missing keys in the checkpoint model loaded: {tied}."
    source = logging.getLogger("transformers.trainer")

    def tells_more(record: logging.LogRecord) -> bool:
        return record.getMessage() != missing

    source.addFilter(tells_more)
    try:
        yield
    finally:
        source.removeFilter(tells_more)
