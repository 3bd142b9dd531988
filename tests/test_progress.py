"""What a training shows on a terminal, and what it leaves for the trackers."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from cfpo_trl.running.progress import LogLines, shown
from cfpo_trl.tiny.model import build_model, build_tokenizer
from conftest import LETTERS

ROOT = Path(__file__).parent.parent
LOG = {
    "loss": -0.01,
    "reward": 0.8301,
    "cfpo/tv": 0.00204,
    "cfpo/outside": 0.0104,
    "completions/mean_length": 4.61,
    "num_tokens": 12345.0,
}


@pytest.fixture
def recipe(tmp_path):
    tokenizer = build_tokenizer(LETTERS)
    build_model(tokenizer, hidden_size=32, layers=1).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": first + second, "solution": "aa"} for first in LETTERS for second in LETTERS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model_name_or_path", str(tmp_path / "model"), "--dtype", "float32", "--reward_funcs", "exact_match"]
    options += ["--dataset_name", str(tmp_path / "rows.jsonl"), "--per_device_train_batch_size", "16"]
    options += ["--max_completion_length", "4", "--num_iterations", "2", "--max_steps", "4", "--logging_steps", "2"]
    options += ["--use_cpu", "true", "--gradient_checkpointing", "false", "--output_dir", str(tmp_path / "out")]
    return [*options, "--save_strategy", "no", "--learning_rate", "1e-3"]


def on_a_terminal(command: list[str]) -> str:
    """What the command prints on a terminal of its own."""
    ours, its = pty.openpty()
    process = subprocess.Popen(command, cwd=ROOT, stdin=its, stdout=its, stderr=its, close_fds=True)
    os.close(its)
    printed = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the terminal's other end is closed
            break
        if not chunk:
            break
        printed += chunk
    assert process.wait() == 0, printed.decode()
    return printed.decode()


def test_the_line_of_a_log_and_its_eta(capsys, tmp_path, monkeypatch):
    seconds = iter([100.0, 120.0])
    monkeypatch.setattr("cfpo_trl.running.progress.time.monotonic", lambda: next(seconds))
    args = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True)
    state, control, lines = TrainerState(max_steps=160), TrainerControl(), LogLines()
    lines.on_train_begin(args, state, control)
    state.global_step = 40
    lines.on_log(args, state, control, dict(LOG))
    expected = "step 40/160  reward 0.830  tv 0.0020  outside 1.0%  length 4.6  loss -0.0100  eta 0:01:00\n"
    assert capsys.readouterr().out == expected


def test_held_out_metrics_are_marked_and_a_summary_is_no_line():
    assert shown({"eval_reward": 0.5, "eval_runtime": 1.0}) == ["held out:", "reward 0.500"]
    assert shown({"train_runtime": 1.0, "train_loss": 0.1}) == []


def test_one_line_per_log_on_a_terminal_and_where_everything_lies(recipe):
    printed = on_a_terminal([sys.executable, "src/cfpo_trl/grpo.py", *recipe]).replace("\r", "\n")
    lines = [line for line in printed.splitlines() if "step " in line and "/4 " in line]
    assert len(lines) == 2, printed
    assert all(" reward " in line and "  tv " in line and "  eta 0:00:0" in line for line in lines)
    assert "cfpo/tv" not in printed
    assert "every log in trainer_state.json, the options in resolved_recipe.yaml" in printed


def test_a_file_gets_the_whole_record_and_tensorboard_every_metric(recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    environment = os.environ | {"TENSORBOARD_LOGGING_DIR": str(tmp_path / "board")}
    command = [sys.executable, "src/cfpo_trl/grpo.py", *recipe, "--report_to", "tensorboard"]
    result = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=True)
    assert result.stdout.count("'cfpo/tv'") == 2
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    logged = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    for name in ("reward", "cfpo/tv", "cfpo/penalty"):
        values = [event.value for event in board.Scalars(f"train/{name}")]
        assert values == pytest.approx([entry[name] for entry in logged if name in entry])


def test_completions_as_a_table(recipe):
    command = [sys.executable, "src/cfpo_trl/grpo.py", *recipe, "--log_completions", "true"]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    assert "Prompt" in result.stdout
    assert "Completion" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_trackers_without_a_network(tracker, recipe, tmp_path):
    environment = os.environ | {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "TRACKIO_DIR": str(tmp_path / "t"),
    }
    command = [sys.executable, "src/cfpo_trl/grpo.py", *recipe, "--report_to", tracker]
    with (tmp_path / "printed").open("w") as printed:  # no pipe: a tracker's own process may outlive the run
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=printed, stderr=printed, timeout=300)
    written = {"wandb": "wandb/offline-run-*/*.wandb", "trackio": "t/*.db"}[tracker]
    (record,) = tmp_path.glob(written)
    assert b"cfpo/tv" in record.read_bytes()
