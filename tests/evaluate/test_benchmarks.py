"""A recipe's `benchmarks:`, with the trainer in its own environment and the evaluator in this one."""

import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "runs" / "demo"
TRAINER = ROOT / ".venv" / "bin" / "python"


def train(output: Path, benchmarks: dict, *launch: str) -> subprocess.CompletedProcess:
    options = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--output_dir", str(output)]
    options += ["--per_device_train_batch_size", "64", "--benchmarks", json.dumps(benchmarks)]
    command = [*(launch or [str(TRAINER)]), "src/cfpo_trl/grpo.py", "--config", "recipes/demo/config_cfpo.yaml"]
    return subprocess.run([*command, *options], cwd=ROOT, text=True, capture_output=True)


def test_every_checkpoint_is_evaluated_beside_the_training(tmp_path):
    task = {"TASK": str(DEMO / "words" / "test.jsonl"), "METRIC": "exact_match", "MAX_NEW_TOKENS": 6, "LIMIT": 50}
    launch = [str(TRAINER), "-m", "torch.distributed.run", "--nproc_per_node", "2"]  # whose variables it must not hear
    result = train(tmp_path, task, *launch)
    assert result.returncode == 0, result.stderr[-3000:]
    results = sorted((tmp_path / "benchmarks").glob("*/results.json"))
    assert [path.parent.name for path in results] == ["checkpoint-2", "checkpoint-4", "final"]
    summaries = [json.loads(path.read_text()) for path in results]
    assert all(summary["tasks"][0]["questions"] == 50 for summary in summaries)
    assert len({summary["weights_sha256"] for summary in summaries}) == 2  # the last checkpoint is the final model


def test_a_failed_evaluation_does_not_fail_the_training(tmp_path):
    result = train(tmp_path, {"TASK": "gone.jsonl", "LAUNCH": "env PYTHONUNBUFFERED=1"})
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Benchmarks failed with status 1: see" in result.stderr
    assert "there is no such file" in (tmp_path / "benchmarks" / "final" / "log.txt").read_text()
