"""CFPO against GRPO: step time and peak memory, alternating in one process; and the soft clip against the clamp.

python scripts/benchmarks/benchmark.py [--rounds 15] [--device cuda]     (or `make benchmark`)
"""

import argparse
import platform
import resource
import subprocess
from collections.abc import Callable

import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from cfpo_trl import CFPOTrainer, soft_clip
from cfpo_trl.checks.cost import Work, compare
from cfpo_trl.tiny.model import build_model, build_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SHAPE = (64, 4096)
BATCH, COMPLETION = 16, 256


def build_trainer(trainer_class: type[GRPOTrainer], device: str) -> GRPOTrainer:
    tokenizer = build_tokenizer(LETTERS)
    return trainer_class(
        build_model(tokenizer, hidden_size=1024 if device == "cuda" else 256, layers=8 if device == "cuda" else 4),
        lambda completions, **columns: [text.count("a") / 10 for text in completions],
        GRPOConfig(
            f"runs/benchmark/{trainer_class.__name__}",
            per_device_train_batch_size=BATCH,
            num_generations=8,
            max_completion_length=COMPLETION,
            num_iterations=4,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            gradient_checkpointing=False,
            report_to="none",
        ),
        Dataset.from_list([{"prompt": letter} for letter in LETTERS]),
        processing_class=tokenizer,
    )


def make_batch(device: str) -> dict[str, torch.Tensor]:
    """Rollouts of fixed length: the same work for both trainers, and no generation, which they share."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 28, (BATCH, COMPLETION + 8), generator=generator)
    batch = {
        "prompt_ids": ids[:, :8],
        "prompt_mask": torch.ones(BATCH, 8, dtype=torch.long),
        "completion_ids": ids[:, 8:],
        "completion_mask": torch.ones(BATCH, COMPLETION, dtype=torch.long),
        "advantages": torch.randn(BATCH, generator=generator),
        "old_per_token_logps": torch.full((BATCH, COMPLETION), -3.3),
        "num_items_in_batch": torch.tensor(BATCH * COMPLETION),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def show(name: str, cfpo: Work, grpo: Work, rounds: int) -> None:
    """Prints the medians, the median ratio and its quartiles, and the peaks."""
    found = compare(cfpo, grpo, rounds)
    low, middle, high = found.quartiles
    memory = [peak / 2**20 for peak in (found.cfpo_peak, found.grpo_peak)]
    print(
        f"{name:<34}{1000 * found.cfpo:>9.2f}{1000 * found.grpo:>9.2f}{middle:>8.3f}  [{low:.3f}, {high:.3f}]"
        f"{memory[0]:>9.1f}{memory[1]:>9.1f}{memory[0] / memory[1]:>8.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds; the median counts")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = options.device

    batch = make_batch(device)

    def step(trainer_class: type[GRPOTrainer]) -> Work:
        trainer = build_trainer(trainer_class, device)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.to(device).train()
        optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-9)

        def work() -> None:
            with trainer.accelerator.autocast():
                trainer.compute_loss(trainer.model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

        return work

    def clip(operator: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], dtype: torch.dtype) -> Work:
        log_ratio = (0.1 * torch.randn(SHAPE)).to(device, dtype).requires_grad_()
        advantages = torch.randn(SHAPE[0], 1).to(device)

        def work() -> None:
            ratio = log_ratio.exp()
            torch.min(ratio * advantages, operator(ratio, advantages) * advantages).sum().backward()

        return work

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"commit {commit}, torch {torch.__version__}, Python {platform.python_version()}, {where}")
    print(f"{options.rounds} rounds, medians; ms; ratio CFPO / GRPO with quartiles; peak MiB\n")
    print(f"{'':<34}{'CFPO':>9}{'GRPO':>9}{'ratio':>8}{'quartiles':>16}{'CFPO':>10}{'GRPO':>9}{'ratio':>8}")
    parameters = f"loss, backward, AdamW ({BATCH}, {COMPLETION})"
    show(parameters, step(CFPOTrainer), step(GRPOTrainer), options.rounds)
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        show(
            f"surrogate {SHAPE} {str(dtype).split('.')[1]}",
            clip(lambda ratio, advantages: soft_clip(ratio, advantages, 0.2), dtype),
            clip(lambda ratio, advantages: torch.clamp(ratio, 0.8, 1.2), dtype),
            options.rounds * 4,
        )
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"\npeak resident memory of the process: {resident:.1f} GiB")


if __name__ == "__main__":
    main()
