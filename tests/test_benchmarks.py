"""What a recipe's `benchmarks:` accepts, and the command that it starts; the runs are in tests/evaluate."""

from pathlib import Path

import pytest

from cfpo_trl import benchmarks
from cfpo_trl.benchmarks import EvaluateCheckpoints, check_benchmarks


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"TASK": "gsm8k", "MODEL": "x"}, "benchmarks has MODEL; its variables are TASK, BACKEND"),
        ({"SAMPLES": 4}, "benchmarks has no TASK"),
    ],
)
def test_refusals(variables, message):
    with pytest.raises(ValueError, match=message):
        check_benchmarks(variables)


def test_evaluation_takes_every_variable():
    text = (Path(benchmarks.ROOT) / "src" / "cfpo_trl" / "evaluation" / "__main__.py").read_text()
    for name in set(benchmarks.VARIABLES) - {"TASK", "LAUNCH"}:
        assert f'"{name}"' in text


def test_slurm_gets_one_string(tmp_path, monkeypatch):
    """`sbatch` itself is a cluster's: the command is taken where it would start."""
    started = []
    monkeypatch.setattr(benchmarks.subprocess, "Popen", lambda command, **options: started.append(command))
    EvaluateCheckpoints({"TASK": "a,b", "LAUNCH": "sbatch --gpus=1 --wrap"}).start(tmp_path, "checkpoint-8")
    make = f"make evaluate MODEL={tmp_path}/checkpoint-8 OUT={tmp_path}/benchmarks/checkpoint-8 TASK=a,b"
    once = "flock .venvs/evaluate.lock make .venvs/evaluate/installed"  # the training does not wait for it
    assert started == [["sbatch", "--gpus=1", "--wrap", f"{once} && {make}"]]
