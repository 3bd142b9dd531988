"""The loss and its gradient on this machine's device, against a reference in fp64 that is written out here."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from .. import CFPOConfig, CFPOTrainer
from ..tiny.model import build_model, build_tokenizer
from .task import LETTERS

EPSILON = 0.2
FP32, BF16 = 1e-4, 0.05  # of the gradient's norm; bf16 has 8 bits, and its gradients 1 % here


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def trainer_of(kind: type[GRPOTrainer], model: PreTrainedModel, out: Path, **options: Any) -> GRPOTrainer:
    """A trainer whose reward counts a digit, for losses on batches of our own and for short trainings."""
    tokenizer = build_tokenizer(LETTERS + ">")
    shared = {"per_device_train_batch_size": 16, "num_generations": 8, "max_completion_length": 12, "epsilon": EPSILON}
    cpu = {} if torch.cuda.is_available() else {"use_cpu": True}
    config = CFPOConfig if kind is CFPOTrainer else GRPOConfig
    plain = {"bf16": False, "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no"}
    return kind(
        model,
        lambda completions, **columns: [text.count("1") / 10 for text in completions],
        config(str(out / "loss"), **{**shared, **plain, **cpu, **options}),
        Dataset.from_list([{"prompt": letter} for letter in LETTERS]),
        processing_class=tokenizer,
    )


def batch_of(rows: int = 16, prompt: int = 4, completion: int = 12) -> dict[str, Tensor]:
    """Completions of a policy from which an untrained tiny model is some way off; lengths in tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 12, (rows, prompt + completion), generator=generator)
    return {
        "prompt_ids": ids[:, :prompt],
        "prompt_mask": torch.ones(rows, prompt, dtype=torch.long),
        "completion_ids": ids[:, prompt:],
        "completion_mask": torch.ones(rows, completion, dtype=torch.long),
        "advantages": torch.randn(rows, generator=generator),
        "old_per_token_logps": -2.5 + 0.3 * torch.randn(rows, completion, generator=generator),
        "num_items_in_batch": torch.tensor(rows * completion),
    }


def reference(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[float, Tensor]:
    """The equation of the paper in fp64, mean over tokens: the loss, and its gradient as one vector."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    logps = model(input_ids=ids).logits[:, 3:-1].log_softmax(dim=-1)
    logps = logps.gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2)
    ratio, advantages = (logps - batch["old_per_token_logps"].double()).exp(), batch["advantages"].double()[:, None]
    loss = -(ratio * advantages - advantages.abs() / (2 * EPSILON) * (ratio - 1) ** 2).mean()
    gradient = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), torch.cat([part.flatten() for part in gradient])


def precision(out: Path) -> str:
    """Loss and gradient through the whole trainer, fp32 and bf16 autocast, against [`reference`]."""
    torch.backends.cuda.matmul.allow_tf32 = False
    tokenizer, batch = build_tokenizer(LETTERS + ">"), batch_of()
    loss, gradient = reference(build_model(tokenizer).double(), batch)
    words = []
    for name, tolerance in (("fp32", FP32), ("bf16", BF16)):
        trainer = trainer_of(CFPOTrainer, build_model(tokenizer), out, num_iterations=2, bf16=name == "bf16")
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.to(device()).train()
        with trainer.accelerator.autocast():
            found = trainer.compute_loss(trainer.model, {key: value.to(device()) for key, value in batch.items()})
        found.backward()
        mine = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()]).double().cpu()
        error = ((mine - gradient).norm() / gradient.norm()).item()
        off = abs(found.item() - loss)
        assert off < tolerance, f"{name}: the loss is {off:.1e} off, tolerance {tolerance:g}"
        assert error < tolerance, f"{name}: the gradient is {error:.1e} of its norm off, tolerance {tolerance:g}"
        words.append(f"{name}: loss {off:.1e} off, gradient {error:.1e} (tolerance {tolerance:g})")
    return "; ".join(words)


def one_update(out: Path) -> str:
    """Three updates, each on rollouts of its own, by either trainer: largest difference of a weight."""
    torch.backends.cuda.matmul.allow_tf32 = False
    ends = []
    for kind in (CFPOTrainer, GRPOTrainer):
        trainer = trainer_of(
            kind, build_model(build_tokenizer(LETTERS + ">")), out, max_steps=3, learning_rate=1e-3, disable_tqdm=True
        )
        trainer.train()
        ends.append(torch.cat([weight.detach().flatten().cpu() for weight in trainer.model.parameters()]))
    difference = (ends[0] - ends[1]).abs().max().item()
    assert difference < 1e-6, f"a weight differs by {difference:.1e}"
    return f"largest difference of a weight: {difference:.1e}"


def attention(out: Path) -> str:
    """Log-probs of a bf16 model by flash attention and by PyTorch's own: their mean difference."""
    found = []
    for kind in ("sdpa", "flash_attention_2"):
        model = build_model(build_tokenizer(LETTERS + ">")).to(device(), torch.bfloat16)
        model.set_attn_implementation(kind)
        ids = batch_of()["completion_ids"].to(device())
        with torch.no_grad():
            found.append(model(input_ids=ids).logits.float().log_softmax(dim=-1))
    difference = (found[0] - found[1]).abs().mean().item()
    assert difference < 0.02, f"log-probs differ by {difference:.3f} in the mean"
    return f"mean difference of log-probs: {difference:.1e}"
