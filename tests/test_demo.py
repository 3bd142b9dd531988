"""The main job, as `make demo` runs it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_demo_learns_and_leaves_a_checkpoint_a_log_and_a_plot():
    output = subprocess.check_output([sys.executable, "scripts/demo/demo.py"], cwd=ROOT, text=True)
    before, after, clipped = map(float, re.search(r"sampled \(T = 1\) +(\S+) +(\S+) +(\S+)", output).groups())
    assert before <= 0.5
    assert min(after, clipped) >= 0.9
    trained = ROOT / "runs" / "demo" / "cfpo"
    AutoModelForCausalLM.from_pretrained(trained)
    log = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "cfpo/tv" in entry] == list(range(4, 164, 4))
    assert (trained / "training.png").stat().st_size > 10_000
