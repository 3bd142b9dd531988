"""The same seed and global batch give the same run, whatever engine trains it and however the batch is split."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cfpo_trl.seam import METRICS
from cfpo_trl.tiny.model import build_model, build_reward_model, build_tokenizer
from conftest import CONFIGS, accelerate
from equivalence_run import LETTERS, PHASES

HERE = Path(__file__).parent
LOGGED = {"loss", "grad_norm", "reward", "reward_std", "num_tokens", *METRICS}  # TRL's own means depend on the split
LOGGED |= {"kl_in_reward/mean", "completions/length_q90", "reward_length/slope", "rewards/reward/length_correlation"}
ENGINES = ("ddp", "zero2", "zero3", "fsdp2")


def launch(
    engine: str | None, model: Path, output: Path, batch: int, accumulation: int, script: str = "equivalence_run.py"
) -> Path:
    """Runs the script: in one process, or in two with the Accelerate configuration of that name."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable]
    if engine:
        config = "ddp" if engine == "fsdp2" else engine
        command += accelerate(config)
    if engine == "fsdp2":  # Accelerate's launcher passes no FSDP settings on to CPU processes: these are the recipe's
        settings = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())["fsdp_config"]
        environment |= {name.upper(): str(value) for name, value in settings.items()} | {"ACCELERATE_USE_FSDP": "true"}
    command += map(str, [HERE / script, model / "policy", model / "reward", output, batch, accumulation])
    result = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return output


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a policy and a reward model."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer(LETTERS)
    build_model(tokenizer, hidden_size=64).save_pretrained(path / "policy")
    build_reward_model(tokenizer).save_pretrained(path / "reward")
    for folder in ("policy", "reward"):
        tokenizer.save_pretrained(path / folder)
    return path


@pytest.fixture(scope="module")
def one_process(model, tmp_path_factory):
    return launch(None, model, tmp_path_factory.mktemp("one"), batch=16, accumulation=1)


def facts(output: Path, phase: str) -> dict:
    return json.loads((output / phase / "run.json").read_text())


def check_equal(output: Path, reference: Path) -> None:
    """Losses, gradient norms and metrics to 1e-5, weights after 8 steps of 1e-3 to 5e-5 absolute, all in fp32."""
    for phase, options in PHASES.items():
        runs = [[e for e in facts(path, phase)["log"] if "loss" in e] for path in (output, reference)]
        assert len(runs[0]) == len(runs[1]) == 8
        for step, (entry, expected) in enumerate(zip(*runs, strict=True)):
            assert entry.keys() == expected.keys()
            for name in LOGGED & entry.keys():
                assert entry[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7), (phase, step, name)
        off_policy = [entry["cfpo/tv"] > 0.01 for entry in runs[1]]
        assert off_policy == [step % options["num_iterations"] != 0 for step in range(8)]
        weights, expected = (load_file(path / phase / "model.safetensors") for path in (output, reference))
        assert weights.keys() - {"lm_head.weight"} == expected.keys()  # ZeRO-3 saves the tied head a second time
        for name in expected:
            torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=5e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_equal_one(engine, model, one_process, tmp_path):
    output = launch(engine, model, tmp_path, batch=8, accumulation=1)
    check_equal(output, one_process)
    seen = facts(output, "four_updates")
    assert seen["processes"] == 2
    assert engine.rstrip("23").replace("zero", "deepspeed").replace("ddp", "multi_cpu") in seen["type"].lower()
    assert seen["held"]["parameters"] == pytest.approx(0.5 if engine in ("zero3", "fsdp2") else 1.0, abs=0.01)
    assert seen["held"]["optimizer"] == pytest.approx(1.0 if engine == "ddp" else 0.5, abs=0.01)


def test_batch_and_accumulation_swapped(model, one_process, tmp_path):
    check_equal(launch(None, model, tmp_path, batch=4, accumulation=4), one_process)


def test_one_update_differs_from_four(one_process):
    """The comparison can fail: the phases, which share the first rollouts, do not end alike."""
    ends = [load_file(one_process / phase / "model.safetensors") for phase in ("one_update", "four_updates")]
    assert any(not torch.allclose(ends[0][name], ends[1][name], atol=1e-3) for name in ends[0])


@pytest.fixture(scope="module")
def one_asynchronous_process(model, tmp_path_factory):
    script = "asynchronous_equivalence_run.py"
    return launch(None, model, tmp_path_factory.mktemp("one"), batch=16, accumulation=1, script=script)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_asynchronous_processes_equal_one(engine, model, one_asynchronous_process, tmp_path):
    """The same samples, some versions old, packed for two: losses are means over the tokens of both."""
    output = launch(engine, model, tmp_path, batch=8, accumulation=1, script="asynchronous_equivalence_run.py")
    runs = [json.loads((path / "run.json").read_text()) for path in (output, one_asynchronous_process)]
    assert [run["processes"] for run in runs] == [2, 1]
    logs = [[entry for entry in run["log"] if "cfpo/tv" in entry] for run in runs]
    assert len(logs[0]) == len(logs[1]) == 8
    logged = {"grad_norm", "staleness/mean", "staleness/max", "entropy", "kl", *METRICS}
    for entry, expected in zip(*logs, strict=True):
        for name in logged:
            assert entry[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7), (entry["step"], name)
    assert logs[1][-1]["staleness/max"] == 3
    assert logs[1][-1]["cfpo/tv"] > 0.01
    weights, expected = (load_file(path / "model.safetensors") for path in (output, one_asynchronous_process))
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("what", "message"),
    [("transfer", "the vLLM server failed to pause: ConnectionError"), ("samples", "no more rollouts: no samples")],
)
def test_a_failure_of_the_main_process_stops_both_with_a_checkpoint(what, message, model, tmp_path):
    script, batch = HERE / "asynchronous_equivalence_run.py", ["8", "1"]
    command = [sys.executable, *accelerate("ddp"), str(script), str(model / "policy"), "-", str(tmp_path), *batch]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FAILS": what}
    result = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120)
    assert result.returncode != 0
    assert message in result.stderr
    assert (tmp_path / "checkpoint-3" / "trainer_state.json").exists()
