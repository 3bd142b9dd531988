"""Rollouts: the log-probs by which transformers and vLLM write, after updates too, against the trainer's."""

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..rollouts.serving import serving
from .loss import device
from .task import prepared, recipe, train

DIFFERENCE = "sampling/sampling_logp_difference/mean"
TOLERANCE = 0.02  # vLLM's kernels are not the trainer's
FP32 = 1e-3  # transformers' are, token by token
PORT = 8417
ASYNCHRONOUS: dict[str, Any] = {
    "num_iterations": None,  # an option of synchronous training
    "rollouts": "async",
    "max_staleness": 4,
    "vllm_server_port": PORT,
    "max_prompt_length": 8,
    "token_budget": 0,
    "chat_template": "{{ messages[0].content }}",
    "response_template": {
        "defaults": {"role": "assistant"},
        "start_anchor": ">",
        "fields": {"content": {"close": "<eos>"}},
    },
}


def by_transformers(out: Path) -> str:
    """The distributions from which `generate` sampled, token by token, and those of one pass over what it wrote."""
    torch.backends.cuda.matmul.allow_tf32 = False
    start = prepared(out) / "start"
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).to(device()).eval()
    prompts = tokenizer(["123>", "45>", "6>"] * 16, return_tensors="pt", padding=True).to(device())
    lengths = {"min_new_tokens": 4, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    with torch.inference_mode():
        written = model.generate(**prompts, do_sample=True, **lengths)
        mask = torch.nn.functional.pad(prompts["attention_mask"], (0, 4), value=1)
        passed = model(input_ids=written.sequences, attention_mask=mask, use_cache=False).logits[:, -5:-1]
    sampled = torch.stack(written.logits, dim=1)
    difference = (sampled.log_softmax(dim=-1) - passed.log_softmax(dim=-1)).abs().max().item()
    assert difference < FP32, f"log-probs differ by up to {difference:.1e}, tolerance {FP32:g}"
    return f"largest difference of log-probs: {difference:.1e} (tolerance {FP32:g})"


def colocated(out: Path) -> str:
    """In the trainer's process, six updates of 1e-3, each with rollouts of its own."""
    options = {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.2}
    return difference(train(recipe(out, "colocated", num_iterations=1, max_steps=6, learning_rate=1e-3, **options)))


def server(out: Path) -> str:
    """From a server on the last GPU, over NCCL."""
    options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_port": PORT}
    file = recipe(out, "server", num_iterations=1, max_steps=6, learning_rate=1e-3, **options)
    with on_last_gpu(file):
        return difference(train(file, **first_gpu()))


def difference(entries: list[dict[str, Any]]) -> str:
    """The mean difference of log-probs, by update; each is after a transfer of the weights."""
    found = [entry[DIFFERENCE] for entry in entries]
    assert max(found) < TOLERANCE, f"log-probs differ by {max(found):.3f} in the mean, tolerance {TOLERANCE:g}"
    return f"mean difference of log-probs, worst of {len(found)} updates: {max(found):.1e} (tolerance {TOLERANCE:g})"


def asynchronous(out: Path) -> str:
    """Twelve updates while the server goes on writing: the age of what was trained."""
    file = recipe(out, "asynchronous", max_steps=12, **ASYNCHRONOUS)
    with on_last_gpu(file):
        entries = train(file, **first_gpu())
    ages = [entry["staleness/mean"] for entry in entries if "staleness/mean" in entry]
    assert len(ages) == 12, f"{len(ages)} of 12 updates were trained"
    return f"mean age {sum(ages) / len(ages):.1f} versions, largest {max(ages):.1f}"


def on_last_gpu(file: Path) -> AbstractContextManager:
    """The server of the recipe; its log stands beside it."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": str(torch.cuda.device_count() - 1)}
    return serving(file, file.with_suffix(".server.log"), environment)


def first_gpu() -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": "0"} if torch.cuda.is_available() else {}
