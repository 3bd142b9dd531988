"""Random batches; and stubs, for Ray's workers too, of the packages that cannot be installed without CUDA."""

import os
import sys
from pathlib import Path

import pytest
import torch

STUBS = Path(__file__).parent / "stubs"
os.environ["PYTHONPATH"] = os.pathsep.join([str(STUBS), os.environ.get("PYTHONPATH", "")])
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(STUBS))


@pytest.fixture
def batch():
    """Log-probs, advantages, weights, and the mask of completions of 7, 4, 1, 5 and no tokens; fp64, `(5, 7)`."""
    generator = torch.Generator().manual_seed(0)
    shape = (5, 7)
    old = -torch.rand(shape, generator=generator, dtype=torch.float64) * 3 - 0.1
    return {
        "old_log_prob": old,
        "log_prob": old + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64),
        "advantages": torch.randn(shape, generator=generator, dtype=torch.float64),
        "mask": (torch.arange(7) < torch.tensor([[7], [4], [1], [5], [0]])).long(),
        "weights": (0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)).exp(),
        "rollout_log_prob": old + 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64),
    }
