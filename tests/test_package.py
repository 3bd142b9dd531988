"""What `import cfpo_trl` costs and shows."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import cfpo_trl

ROOT = Path(__file__).parent.parent
LAZY = """
import sys, time
start = time.perf_counter()
import cfpo_trl
seconds = time.perf_counter() - start
assert not {"torch", "trl", "transformers"} & set(sys.modules), "import cfpo_trl is not lazy"
print(seconds)
"""


def test_import_is_lazy_and_takes_less_than_200_ms():
    assert float(subprocess.check_output([sys.executable, "-c", LAZY], text=True)) < 0.2


def test_objective_loads_without_trl():
    code = "import cfpo_trl, sys; cfpo_trl.soft_clip; assert 'torch' in sys.modules and 'trl' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    names = {"AlignmentTrainer", "CFPOConfig", "CFPOTrainer", "cfpo_objective", "soft_clip", "tv_distance"}
    names |= {"AsyncCFPOConfig", "AsyncCFPOTrainer"}
    assert names == set(cfpo_trl.__all__)
    assert names <= set(dir(cfpo_trl))
    assert all(getattr(cfpo_trl, name).__name__ == name for name in names)
    with pytest.raises(AttributeError, match="module 'cfpo_trl' has no attribute 'GRPO'"):
        _ = cfpo_trl.GRPO


def test_public_rewards():
    from cfpo_trl import rewards

    names = {"accuracy_reward", "exact_match_reward", "length_reward", "reasoning_accuracy_reward", "load_reward"}
    names |= {f"get_{kind}_reward" for kind in ("accuracy", "code_format", "cosine", "format", "reasoning_accuracy")}
    names |= {"get_tag_count_reward", "reasoning_steps_reward"}
    assert names == set(rewards.__all__)
    assert all(callable(getattr(rewards, name)) for name in names)


def test_typed_and_versioned():
    assert (Path(cfpo_trl.__file__).parent / "py.typed").exists()
    assert metadata.version("cfpo_trl") == cfpo_trl.__version__
    assert cfpo_trl.__version__ in (ROOT / "CITATION.cff").read_text()
    assert f"## {cfpo_trl.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_pin_every_requirement():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    for requirement in metadata.requires("cfpo_trl"):
        name = requirement.split(";")[0].split("<")[0].split(">")[0].strip().lower().replace("_", "-")
        assert name in pinned, requirement
