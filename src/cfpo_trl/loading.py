"""How the scripts load a model, by the options of TRL's ModelConfig, and what they go on from."""

import logging
import os
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig

logger = logging.getLogger("cfpo_trl")


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


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """`resume_from_checkpoint`, or the last checkpoint in `output_dir`, or None."""
    if args.resume_from_checkpoint is not None:
        return args.resume_from_checkpoint
    checkpoint = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
    if checkpoint:
        logger.info("Going on from %s; for a fresh start choose another output_dir, or remove it.", checkpoint)
    return checkpoint
