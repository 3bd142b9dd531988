"""The checkpoint that is evaluated: found, of a version that can be read, merged where it is an adapter."""

import hashlib
import json
from pathlib import Path

from packaging.version import Version
from transformers import AutoConfig, AutoTokenizer

from .errors import EvaluationError


class CheckpointError(EvaluationError):
    """MODEL cannot be evaluated; the message says why, and what can be done."""


def prepare(model: str, scratch: Path, readers: dict[str, str]) -> str:
    """The path or hub name of a whole model; an adapter is merged into its base below `scratch`.

    Args:
        model: Folder of a checkpoint or an adapter, or a hub's name.
        scratch: Folder that ends with the run.
        readers: Versions of transformers that will read it, by whose they are.

    Raises:
        CheckpointError: there is no such model, it is one of images, or a newer transformers saved it.
    """
    if (Path(model) / "adapter_config.json").exists():
        return str(merge(Path(model), scratch / "merged", readers))
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"MODEL={model!r} is no folder with a config.json or an adapter_config.json, and no model that a hub "
            f"gave: {str(error).splitlines()[0]}"
        ) from error
    if hasattr(config, "vision_config"):
        raise CheckpointError(
            f"MODEL={model!r} is a model of images, and lighteval's tasks are of text; evaluate it by eval_strategy "
            "in its recipe."
        )
    saved = getattr(config, "transformers_version", None)
    for reader, installed in readers.items():
        if saved and Version(saved) > Version(installed):
            raise CheckpointError(
                f"MODEL={model!r} was saved by transformers {saved}, and {reader} has {installed}: an older version "
                "can silently misread a newer configuration (rope settings). Install a newer one there; the "
                "evaluator's pin is in src/cfpo_trl/evaluation/constraints.txt."
            )
    return model


def merge(adapter: Path, folder: Path, readers: dict[str, str]) -> Path:
    """The base model with the adapter merged into it, and the adapter's tokenizer."""
    from peft import AutoPeftModelForCausalLM

    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    prepare(base, folder, readers)  # the same rules hold for it
    merged = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype="auto").merge_and_unload()
    merged.save_pretrained(folder)
    AutoTokenizer.from_pretrained(adapter if (adapter / "tokenizer_config.json").exists() else base).save_pretrained(
        folder
    )
    return folder


def fingerprint(model: str) -> str | None:
    """SHA-256 over the weights of a folder; None for a model of a hub."""
    digest = hashlib.sha256()
    files = sorted(Path(model).glob("*.safetensors"))
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest() if files else None
