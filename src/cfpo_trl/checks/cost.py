"""What CFPO costs beside GRPO: time and memory, alternating in one process; and how fast rollouts and rewards are."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.integrations.liger import apply_liger_kernel
from trl import GRPOTrainer

from .. import CFPOTrainer
from .loss import batch_of, device, trainer_of

ROUNDS = 7


@dataclass(frozen=True)
class Size:
    """Random weights in Qwen2.5's shapes, and a micro-batch, for a device of at least so much memory."""

    name: str
    gigabytes: float
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    rows: int
    completion: int  # tokens; a prompt has 64


SIZES = (
    Size("1.5B", 40.0, 1536, 8960, 28, 12, 151_936, 8, 1024),
    Size("0.5B", 14.0, 896, 4864, 24, 14, 151_936, 8, 512),
    Size("tiny", 0.0, 128, 512, 2, 4, 1024, 8, 64),
)

Work = Callable[[], None]


@dataclass(frozen=True)
class Comparison:
    """Two pieces of work, CFPO's and GRPO's: median seconds of each, quartiles of their ratio, and peak bytes."""

    cfpo: float
    grpo: float
    quartiles: tuple[float, float, float]
    cfpo_peak: int
    grpo_peak: int


def seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(work: Work) -> int:
    """Highest amount of tensor memory that `work` holds at once, beyond what was there before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def compare(cfpo: Work, grpo: Work, rounds: int) -> Comparison:
    """Alternates the two, swapping who goes first."""
    for work in (cfpo, grpo):
        work()  # warm-up
    times: dict[Work, list[float]] = {cfpo: [], grpo: []}
    for index in range(rounds):
        for work in (cfpo, grpo) if index % 2 else (grpo, cfpo):
            times[work].append(seconds(work))
    low, middle, high = statistics.quantiles([a / b for a, b in zip(*times.values(), strict=True)], n=4)
    medians = [statistics.median(times[work]) for work in (cfpo, grpo)]
    return Comparison(medians[0], medians[1], (low, middle, high), peak_bytes(cfpo), peak_bytes(grpo))


def size_here() -> Size:
    """The largest that fits this device."""
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if torch.cuda.is_available() else 0.0
    return next(size for size in SIZES if memory >= size.gigabytes)


def random_model(size: Size) -> Qwen2ForCausalLM:
    """On this device; in bf16 on a GPU, as the step is that of bf16 training."""
    config = Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    with torch.device(device()):
        return Qwen2ForCausalLM(config).to(torch.bfloat16 if torch.cuda.is_available() else torch.float32)


def step(out: Path) -> str:
    """Loss, backward and AdamW's step, gradient checkpointing, on one model that both share."""
    return step_of(out, liger=False)


def step_with_liger(out: Path) -> str:
    """[`step`] with Liger's kernels in model and loss."""
    return step_of(out, liger=True)


def step_of(out: Path, liger: bool) -> str:
    size = size_here()
    found = compare(*steps(size, out, gradient_checkpointing=True, use_liger_kernel=liger), ROUNDS)
    low, middle, high = found.quartiles
    times = (
        f"CFPO {1000 * found.cfpo:.0f} ms, GRPO {1000 * found.grpo:.0f} ms, ratio {middle:.3f} [{low:.3f}, {high:.3f}]"
    )
    peaks = f"peak {found.cfpo_peak / 2**30:.2f} and {found.grpo_peak / 2**30:.2f} GiB above the weights"
    return f"{size.name}, {size.rows} × {size.completion} tokens: {times}; {peaks}"


def steps(size: Size, out: Path, **options: bool) -> tuple[Work, Work]:
    """CFPO's step and GRPO's on the same batch, which both have moved away from; model and optimizer are shared."""
    model = random_model(size)
    batch = {name: value.to(device()) for name, value in batch_of(size.rows, 64, size.completion).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)

    def step_by(kind: type[GRPOTrainer]) -> Work:
        trainer = trainer_of(kind, model, out, bf16=torch.cuda.is_available(), num_iterations=2, **options)
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        if trainer.args.use_liger_kernel:  # as `train` does when it begins
            apply_liger_kernel(trainer.model, trainer.args.liger_kernel_config)

        def work() -> None:
            with trainer.accelerator.autocast():
                trainer.compute_loss(trainer.model, dict(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()

        return work

    return step_by(CFPOTrainer), step_by(GRPOTrainer)


def generation(out: Path) -> str:
    """Tokens per second of 32 completions of 64 tokens."""
    model = random_model(size := size_here()).eval()
    ids = torch.randint(2, size.vocabulary, (32, 64), device=device())
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": True, "attention_mask": torch.ones_like(ids)}

    def work() -> None:
        with torch.inference_mode():
            model.generate(ids, **options)

    work()  # warm-up
    rate = 32 * 64 / seconds(work)
    return f"{size.name}: {rate:.0f} tokens/s"


def rewards(out: Path) -> str:
    """Completions per second, 512 of them, 8 to a question; half are right, and all are scored so."""
    from ..rewards import accuracy_reward

    references = [f"\\frac{{{number}}}{{7}}" for number in range(64) for _ in range(8)]
    answers = [f"So it is \\boxed{{{number if k % 2 else number + 1}/7}}." for number in range(64) for k in range(8)]
    accuracy_reward(answers[:8], references[:8])  # starts its processes
    start = time.perf_counter()
    found = accuracy_reward(answers, references)
    rate = len(answers) / (time.perf_counter() - start)
    assert found == [float(k % 2) for _ in range(64) for k in range(8)], "a reward is wrong"
    return f"{rate:.0f} completions/s"
