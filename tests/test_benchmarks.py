"""What a recipe's `benchmarks:` accepts, and the command that it starts; the runs are in tests/evaluate."""

import sys
from pathlib import Path

import pytest

from cfpo_trl.evaluation import callback
from cfpo_trl.evaluation.callback import EvaluateCheckpoints, check_benchmarks
from cfpo_trl.evaluation.environment import VARIABLES


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


def test_every_variable_is_an_option_of_the_evaluation():
    text = (Path(callback.__file__).parent / "__main__.py").read_text()
    for name in VARIABLES:
        assert f'"--{name.lower().replace("_", "-")}"' in text


def test_slurm_gets_one_string(tmp_path, monkeypatch):
    """`sbatch` itself is a cluster's: the command is taken where it would start."""
    started = []
    monkeypatch.setattr(callback.subprocess, "Popen", lambda command, **options: started.append(command))
    EvaluateCheckpoints({"TASK": "a,b", "LAUNCH": "sbatch --gpus=1 --wrap"}).start(tmp_path, "checkpoint-8")
    folders = f"--model={tmp_path}/checkpoint-8 --out={tmp_path}/benchmarks/checkpoint-8"
    command = f"{sys.executable} -m cfpo_trl.cli evaluate {folders} --task=a,b"
    assert started == [["sbatch", "--gpus=1", "--wrap", command]]
