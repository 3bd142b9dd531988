"""The wheel in a clean environment outside of the repository: train, evaluate and compare as a pip user would."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cfpo_trl.evaluation.environment import FOLDER, folder

ROOT = Path(__file__).parent.parent
MODEL = """
from cfpo_trl.tiny.model import build_model, build_tokenizer
from cfpo_trl.tiny.warm_start import write_splits
tokenizer = build_tokenizer("abcdefgh>")
build_model(tokenizer, hidden_size=32).save_pretrained("runs/demo/start")
tokenizer.save_pretrained("runs/demo/start")
letters = "abcdefgh"
rows = [{"prompt": f"{a}{b}{c}>", "solution": c + b + a} for a in letters for b in letters for c in letters]
write_splits(rows, 100, __import__("pathlib").Path("runs/demo/words"))
"""
STUDY = """
output: runs/study
recipe: demo-config_cfpo.yaml
rollout_batches: 2
evaluations: 1
parts:
  one: {question: "?", grid: {objective: [grpo, cfpo], per_device_train_batch_size: 64, seed: 0}}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder whose `env` has the wheel, with the tested versions, and nothing of the repository."""
    folder = tmp_path_factory.mktemp("outside")
    source = folder / "source"  # a build leaves files in the source
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    constraints = shutil.copy(source / "constraints.txt", folder)
    shutil.rmtree(source)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
    install = [str(folder / "env" / "bin" / "pip"), "install", "--quiet", "--constraint", str(constraints)]
    subprocess.run([*install, "torch"], check=True)
    subprocess.run([*install, f"{wheel}[plots]"], check=True)
    subprocess.run([folder / "env" / "bin" / "python", "-c", MODEL], cwd=folder, check=True)
    return folder


def cfpo(work: Path, *arguments: str) -> str:
    # lighteval's environment is made once, wherever it lies: the repository's serves
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {FOLDER: str(folder())}
    command = [work / "env" / "bin" / "cfpo", *arguments]
    result = subprocess.run(command, cwd=work, env=environment, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_a_wheel_is_enough_to_train_evaluate_and_compare(work):
    where = "import cfpo_trl; print(cfpo_trl.__file__)"
    package = subprocess.check_output([work / "env" / "bin" / "python", "-c", where], cwd=work, text=True)
    assert Path(package).is_relative_to(work)

    assert "demo/config_cfpo" in cfpo(work, "recipes")
    options = ["--max_steps", "4", "--per_device_train_batch_size", "64", "--logging_steps", "2"]
    cfpo(work, "train", "--config", "demo/config_cfpo", *options)
    log = json.loads((work / "runs" / "demo" / "cfpo" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "cfpo/tv" in entry] == [2, 4]

    task = ["--task", "runs/demo/words/test.jsonl", "--metric", "exact_match", "--limit", "20", "--out", "runs/scores"]
    assert "words_test" in cfpo(work, "evaluate", "--model", "runs/demo/cfpo", *task)
    assert len((work / "runs" / "scores" / "words_test.jsonl").read_text().splitlines()) == 20

    assert cfpo(work, "recipes", "demo/config_cfpo") == "demo-config_cfpo.yaml\n"
    (work / "study.yaml").write_text(STUDY)
    cfpo(work, "study", "study.yaml")
    assert len((work / "runs" / "study" / "runs.csv").read_text().splitlines()) == 3
    assert (work / "runs" / "study" / "report.md").exists()
