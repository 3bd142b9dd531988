"""A reward model, local or from a hub, as a reward function."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import patch_environment
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations import deepspeed

from .scores import RewardError, checked, scored_together

logger = logging.getLogger("cfpo_trl")


class RewardModel:
    """Scores prompt and completion by a sequence classifier with one output, whole on each process's device.

    A conversation is written by the model's own chat template. A text gets the model's end-of-sequence token, as TRL's
    `RewardTrainer` gives it in training (https://huggingface.co/docs/trl/reward_trainer).

    Args:
        model: Folder or hub name.
        batch_size: Completions in a forward pass; default 16. They are sorted by length, so that padding is little.
        dtype: Of the weights; default bfloat16 where the device has it, else float32.
        max_length: Longest sequence in tokens, default the model's; what is longer loses its end, and a warning says
            how many did.
        normalize: Whether the score is (score − mean) / std, with `mean` and `std` of the model's config, where
            `src/cfpo_trl/reward_training.py` and OpenRLHF leave them; default False.
        clip: Bounds `[low, high]` of the score, normalised or not; default none.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether a model's own code may run; default False.

    Raises:
        ValueError: the model cannot be loaded, has several outputs, or lacks mean and std for `normalize`.
    """

    def __init__(
        self,
        model: str,
        batch_size: int = 16,
        dtype: str | None = None,
        max_length: int | None = None,
        normalize: bool = False,
        clip: Sequence[float] | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ):
        self.name, self.batch_size, self.clip = model, batch_size, clip
        self.__name__ = os.path.basename(model.rstrip("/"))  # TRL's name for it in the log
        device = PartialState().device
        options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
        dtype = dtype or ("bfloat16" if has_bfloat16(device) else "float32")
        try:
            with unsharded():
                self.model = AutoModelForSequenceClassification.from_pretrained(model, dtype=dtype, **options)
            self.tokenizer = AutoTokenizer.from_pretrained(model, **options)
        except OSError as error:
            raise ValueError(f"reward_funcs has {model!r}, which cannot be loaded as a model: {error}") from error
        config = self.model.config
        if config.num_labels != 1:
            raise ValueError(f"{model!r} has {config.num_labels} outputs; a reward model has one (num_labels=1).")
        text_config = config.get_text_config()
        if text_config.pad_token_id is None:  # by it the model finds the last token
            own = self.tokenizer.pad_token_id
            text_config.pad_token_id = self.tokenizer.eos_token_id if own is None else own
        self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(text_config.pad_token_id)
        longest = getattr(text_config, "max_position_embeddings", self.tokenizer.model_max_length)
        self.max_length = max_length or longest
        self.mean, self.std = 0.0, 1.0
        if normalize:
            if not hasattr(config, "mean") or not getattr(config, "std", 0) > 0:
                raise ValueError(
                    f"normalize=True needs `mean` and `std` in the config.json of {model!r}, and they are not there; "
                    "src/cfpo_trl/reward_training.py writes them, or set normalize to false."
                )
            self.mean, self.std = config.mean, config.std
        self.model.to(device).eval().requires_grad_(False)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        """A score per completion. Raises a `RewardError`, on every process, where one is not finite."""
        return scored_together(lambda: self.score(prompts, completions))

    @torch.inference_mode()
    def score(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """As a call, for this process alone."""
        rows = [self.tokenize(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        if cut := sum(len(ids) > self.max_length for ids in rows):
            logger.warning("%s: %d of %d sequences cut to %d tokens.", self.name, cut, len(rows), self.max_length)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        scores = [0.0] * len(rows)
        for start in range(0, len(rows), self.batch_size):
            indices = order[start : start + self.batch_size]
            batch = self.tokenizer.pad(
                {"input_ids": [rows[index][: self.max_length] for index in indices]},
                padding_side="right",
                return_tensors="pt",
            ).to(self.model.device)
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            values = (logits[:, 0].float() - self.mean) / self.std
            for index, value in zip(indices, values.tolist(), strict=True):
                scores[index] = value
        checked(scores, len(rows), f"Reward model {self.name}")
        return scores if self.clip is None else [min(max(score, self.clip[0]), self.clip[1]) for score in scores]

    def tokenize(self, prompt: Any, completion: Any) -> list[int]:
        """Token ids of prompt and completion, two texts or two conversations."""
        if isinstance(completion, str):
            eos = self.tokenizer.eos_token
            text = prompt + completion
            return self.tokenizer(text if not eos or text.endswith(eos) else text + eos).input_ids
        if self.tokenizer.chat_template is None:
            raise RewardError(f"Reward model {self.name} has no chat template, and the completions are conversations.")
        return self.tokenizer.apply_chat_template([*prompt, *completion], return_dict=True).input_ids


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is fast there: on GPUs that have it; on CPUs it is slower than float32."""
    return device.type != "cpu" and (device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False))


@contextmanager
def unsharded() -> Iterator[None]:
    """Models loaded in this block are whole on every process, also where ZeRO-3 or FSDP shards the policy."""
    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        with patch_environment(fsdp_cpu_ram_efficient_loading="false"):  # else with weights on the first process alone
            yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference
