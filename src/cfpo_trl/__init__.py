"""Clipping-Free Policy Optimization (CFPO) for TRL, https://arxiv.org/abs/2601.22801."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .alignment import AlignmentTrainer
    from .asynchronous import AsyncCFPOConfig, AsyncCFPOTrainer
    from .config import CFPOConfig
    from .objective import cfpo_objective, soft_clip, tv_distance
    from .trainer import CFPOTrainer

__version__ = "0.2.0"

__all__ = [
    "AlignmentTrainer",
    "AsyncCFPOConfig",
    "AsyncCFPOTrainer",
    "CFPOConfig",
    "CFPOTrainer",
    "cfpo_objective",
    "soft_clip",
    "tv_distance",
]

_MODULE_OF = {
    "AlignmentTrainer": "alignment",
    "AsyncCFPOConfig": "asynchronous",
    "AsyncCFPOTrainer": "asynchronous",
    "CFPOConfig": "config",
    "CFPOTrainer": "trainer",
    "cfpo_objective": "objective",
    "soft_clip": "objective",
    "tv_distance": "objective",
}


def __getattr__(name: str) -> Any:
    # torch and TRL take seconds to import: load each name on first use.
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
