"""What becomes of a run that is in the output folder already; and what a signal leaves there."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cfpo_trl import grpo
from cfpo_trl.running.existing_run import intact, newest_intact
from cfpo_trl.running.interrupt import SaveOnSignal
from test_grpo_script import module, recipe  # noqa: F401 (fixtures)


@pytest.fixture
def run(recipe, tmp_path):  # noqa: F811
    """Runs the recipe with checkpoints at steps 2 and 4 of 4, and further options."""

    def start(*options: str) -> None:
        saves = ["--save_strategy", "steps", "--save_steps", "2", "--num_iterations", "2"]
        rewards = ["--reward_funcs", "conftest.early_letters"]  # of which a random model gets some
        grpo.main(["--config", str(recipe), *rewards, *saves, *options])

    return start


@pytest.fixture
def output(tmp_path):
    return tmp_path / "cfpo"


def steps(output) -> list[int]:
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["step"] for entry in log if "loss" in entry]


def weights(path) -> torch.Tensor:
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(path / "model.safetensors").items())])


def unfinish(output, *, newest: bool) -> None:
    """As after a kill: behind the last checkpoint, or before it."""
    (output / "train_results.json").unlink()
    (output / "model.safetensors").unlink()
    if newest:
        shutil.rmtree(output / "checkpoint-4")


@pytest.mark.parametrize("saves", ["steps", "no"])
def test_a_finished_run_stays_as_it_is(run, output, capsys, saves):
    run("--save_strategy", saves)
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    run("--save_strategy", saves, "--logging_steps", "7")
    assert (
        f"{output} holds a finished run of 4 steps with this recipe: nothing is left to do" in capsys.readouterr().out
    )
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("saves", ["steps", "no"])
def test_another_recipe_is_refused_with_the_differences(run, output, saves):
    run("--save_strategy", saves)
    with pytest.raises(
        ValueError, match=r"another recipe \(epsilon: default -> 0.1; learning_rate: 0.01 -> 0.0001; obj"
    ):
        run("--save_strategy", saves, "--objective", "grpo", "--learning_rate", "1e-4", "--epsilon", "0.1")
    assert yaml.safe_load((output / "resolved_recipe.yaml").read_text())["learning_rate"] == 0.01


def test_a_run_goes_on_with_other_intervals(run, output):
    run("--logging_steps", "2")
    unfinish(output, newest=True)
    run("--logging_steps", "1", "--save_steps", "1")
    assert steps(output) == [2, 3, 4]
    assert (output / "checkpoint-3").is_dir()


def test_continue_takes_the_recipe_s_weight_decay_and_adam(run, output):
    run()
    changed = ("--max_steps", "6", "--weight_decay", "0.1", "--adam_beta2", "0.95", "--adam_epsilon", "1e-6")
    run(*changed, "--if_output_exists", "continue")
    saved = torch.load(output / "checkpoint-6" / "optimizer.pt", weights_only=True)["param_groups"]
    assert saved[0]["weight_decay"] == 0.1
    assert all(group["weight_decay"] == 0 for group in saved[1:])
    assert all(group["betas"] == (0.9, 0.95) and group["eps"] == 1e-6 for group in saved)


def test_continue_goes_on_with_another_recipe(run, output):
    run()
    run("--max_steps", "6", "--if_output_exists", "continue")
    assert steps(output) == [1, 2, 3, 4, 5, 6]
    assert yaml.safe_load((output / "resolved_recipe.yaml").read_text())["max_steps"] == 6


def test_continue_takes_the_recipe_s_learning_rate(run, output):
    run("--lr_scheduler_type", "linear", "--max_steps", "4")
    run(
        "--lr_scheduler_type",
        "linear",
        "--max_steps",
        "8",
        "--learning_rate",
        "8e-5",
        "--if_output_exists",
        "continue",
    )
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    rates = {entry["step"]: entry["learning_rate"] for entry in log if "learning_rate" in entry}
    assert rates[4] == pytest.approx(0.01 * (1 - 3 / 4))
    assert [rates[step] for step in (5, 6, 7, 8)] == pytest.approx([8e-5 * (1 - done / 8) for done in (4, 5, 6, 7)])


@pytest.mark.parametrize("option", [("--if_output_exists", "restart"), ("--resume_from_checkpoint", "false")])
def test_restart_keeps_the_old_run_under_another_name(run, output, option):
    run()
    old = weights(output)
    run("--seed", "9", *option)
    assert steps(output) == [1, 2, 3, 4]
    assert torch.equal(weights(output.with_name("cfpo.1")), old)
    assert not torch.equal(weights(output), old)


def test_a_run_without_anything_to_lose_may_change(run, output):
    output.mkdir()
    (output / "resolved_recipe.yaml").write_text("learning_rate: 3.0\n")
    run()
    assert steps(output) == [1, 2, 3, 4]


def test_a_recipe_that_a_full_disk_left_empty_is_none(run, output):
    run()
    unfinish(output, newest=True)
    (output / "resolved_recipe.yaml").write_text("")
    run()
    assert steps(output) == [1, 2, 3, 4]
    assert yaml.safe_load((output / "resolved_recipe.yaml").read_text())["num_iterations"] == 2


def test_a_model_of_unknown_origin_is_not_written_over(run, output, tmp_path):
    shutil.copytree(tmp_path / "model", output)
    with pytest.raises(ValueError, match="holds a model that this run would write over; choose another folder"):
        run()


def test_a_run_that_ended_behind_its_last_checkpoint_takes_no_further_step(run, output):
    run()
    before = weights(output)
    unfinish(output, newest=False)
    run()
    assert torch.equal(weights(output), before)
    assert steps(output) == [1, 2, 3, 4]
    assert (output / "train_results.json").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json", "config.json"])
@pytest.mark.parametrize("size", [0, 0.5])
def test_a_half_written_checkpoint_is_passed_over(run, output, caplog, file, size):
    run()
    before = weights(output)
    unfinish(output, newest=False)
    path = output / "checkpoint-4" / file
    os.truncate(path, int(path.stat().st_size * size))
    run()
    assert "checkpoint-4 is not whole" in caplog.text
    assert f"Going on from {output}/checkpoint-2" in caplog.text
    assert torch.equal(weights(output), before)


def test_whole_checkpoints_are_whole(run, output, tmp_path):
    run()
    assert newest_intact(output) == output / "checkpoint-4"
    assert intact(output / "checkpoint-2")
    assert not intact(tmp_path / "model")
    assert newest_intact(tmp_path / "nowhere") is None


def test_a_named_checkpoint(run, output, tmp_path, caplog):
    run()
    before = weights(output)
    unfinish(output, newest=False)
    run("--resume_from_checkpoint", str(output / "checkpoint-2"))
    assert f"Going on from {output}/checkpoint-2" in caplog.text
    assert torch.equal(weights(output), before)
    unfinish(output, newest=False)
    run("--resume_from_checkpoint", "true")
    with pytest.raises(ValueError, match="is no folder with a whole checkpoint"):
        run("--resume_from_checkpoint", str(tmp_path / "model"), "--output_dir", str(tmp_path / "new"))
    with pytest.raises(ValueError, match="resume_from_checkpoint='true', and there is no checkpoint in"):
        run("--resume_from_checkpoint", "true", "--output_dir", str(tmp_path / "new"))


KILLS = """
import os, signal
calls = []
def mine(completions, **kwargs):
    calls.append(len(completions))
    if len(calls) == {call}:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # as a launcher passes on what the whole group got
    return [float(len(text)) for text in completions]
"""


def test_a_signal_stops_at_the_end_of_a_batch_of_rollouts(run, output, module, capsys):  # noqa: F811
    module(KILLS.format(call=1))
    options = ["--reward_funcs", "own_rewards.mine", "--save_steps", "100"]
    with pytest.raises(SystemExit) as exit:
        run(*options, "--max_steps", "8", "--num_iterations", "4")
    assert exit.value.code == 128 + signal.SIGTERM
    assert "Stopped at step 4; saved in" in (printed := capsys.readouterr().out)
    assert "departs from" not in printed
    run(*options, "--max_steps", "8", "--num_iterations", "4")
    stopped = weights(output)
    run(*options, "--max_steps", "8", "--num_iterations", "4", "--output_dir", str(output) + "-whole")
    assert torch.equal(stopped, weights(output.with_name("cfpo-whole")))


def test_a_signal_that_cannot_wait_says_that_the_run_will_be_inexact(run, module, capsys, monkeypatch):  # noqa: F811
    module(KILLS.format(call=1))
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0")
    with pytest.raises(SystemExit):
        run("--reward_funcs", "own_rewards.mine", "--save_steps", "100", "--max_steps", "8", "--num_iterations", "4")
    printed = capsys.readouterr().out
    assert "Stopped at step 1; saved in" in printed
    assert "departs from the trajectory of an uninterrupted run" in printed


def test_a_signal_in_the_last_evaluation_loses_nothing(run, output, module, capsys):  # noqa: F811
    module(KILLS.format(call=3))  # two batches of rollouts, and then the evaluation
    options = ["--eval_strategy", "steps", "--eval_steps", "4", "--dataset_test_split", "train"]
    options += ["--per_device_eval_batch_size", "16", "--num_generations_eval", "1", "--save_strategy", "no"]
    with pytest.raises(SystemExit) as exit:
        run("--reward_funcs", "own_rewards.mine", *options)
    assert exit.value.code == 128 + signal.SIGTERM
    printed = capsys.readouterr().out
    assert "None" not in printed
    assert f"Model saved in {output}" in printed
    assert (output / "model.safetensors").exists()


def test_a_repeated_signal_counts_once_for_some_seconds(monkeypatch):
    killed = []
    with SaveOnSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGINT
        assert not killed
        stop.at = time.monotonic() - 6
        monkeypatch.setattr("cfpo_trl.running.interrupt.os.kill", lambda *arguments: killed.append(arguments))
        stop._note(signal.SIGINT, None)
        assert killed == [(os.getpid(), signal.SIGINT)]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
