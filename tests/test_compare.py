"""The sweeps: what a study expands to, the numbers of its report, and one that is killed and goes on."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from trl import TrlParser

from cfpo_trl.grpo import ARGUMENTS
from cfpo_trl.studies.objectives import trainer_of
from cfpo_trl.studies.plan import Run, expand, load_study
from cfpo_trl.studies.report import (
    at_equal_length,
    at_equal_reward,
    differences,
    followed,
    headline,
    interval,
    length_controlled,
    reached,
    report,
    summarise,
)
from cfpo_trl.studies.results import table as table_of
from cfpo_trl.studies.run import sweep

ROOT = Path(__file__).parent.parent
STUDIES = sorted(
    path for path in (ROOT / "scripts" / "studies").glob("*.yaml") if "parts" in yaml.safe_load(path.read_text())
)


def study(**changes):
    grid = {"objective": ["grpo", "cfpo"], "num_iterations": [1, 4], "seed": [0, 1]}
    base = {"model_name_or_path": "model", "per_device_train_batch_size": 16}
    return {
        "output": "out",
        "recipe": base,
        "rollout_batches": 12,
        "evaluations": 3,
        "parts": {"one": {"question": "?", "grid": grid}},
    } | changes


def test_runs_of_a_study_are_matched_in_rollouts_and_evaluations():
    runs = expand(study())
    assert len(runs) == 8
    for run in runs:
        iterations = run.recipe["num_iterations"]
        assert run.recipe["max_steps"] == 12 * iterations
        assert run.recipe["eval_steps"] * 3 == run.recipe["max_steps"]
        assert run.recipe["logging_steps"] == iterations
    one, other = (run.recipe for run in runs if run.cell["num_iterations"] == 4 and run.cell["seed"] == 0)
    assert {key for key in one if one[key] != other[key]} == {"objective"}
    assert [run.cell["seed"] for run in runs] == [0] * 4 + [1] * 4  # whole grids first, where it is stopped


def test_split_rollouts_are_matched_too():
    (run,) = expand(
        study(
            parts={
                "stale": {
                    "question": "?",
                    "grid": {"objective": "cfpo", "seed": 0, "steps_per_generation": 4, "num_iterations": 2},
                }
            }
        )
    )
    assert run.recipe["max_steps"] == 12 * 4 * 2


def test_parts_share_runs():
    parts = study()["parts"] | {
        "two": {"question": "?", "grid": {"objective": "cfpo", "num_iterations": 4, "seed": [1, 2]}}
    }
    runs = expand(study(parts=parts))
    assert len(runs) == 9
    assert [run.parts for run in runs if "two" in run.parts] == [["one", "two"], ["two"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grids": {}}, "has grids; a study's keys are evaluations, follow, keep_models, output"),
        ({"recipe": None}, "lacks recipe"),
        ({"parts": {"one": {"question": "?", "grid": {"seed": 0}}}}, "part one of .* at least objective and seed"),
        (
            {
                "parts": {
                    "one": {"question": "?", "grid": {"objective": ["cfpo", "grpo"], "seed": 0, "penalty_slope": 1}}
                }
            },
            "varies penalty_slope, which changes nothing in grpo; compare the objectives cfpo, bounded-1",
        ),
    ],
)
def test_wrong_study_is_refused(tmp_path, change, message):
    content = {key: value for key, value in (study() | change).items() if value is not None}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=message):
        load_study(tmp_path / "study.yaml")


def test_numbers_that_yaml_reads_as_texts_are_numbers(tmp_path):
    (tmp_path / "recipe.yaml").write_text("learning_rate: 3e-6\nnum_iterations: 2\n")
    (tmp_path / "study.yaml").write_text(
        f"output: out\nrecipe: {tmp_path}/recipe.yaml\nrollout_batches: 4\nevaluations: 2\nparts:\n"
        "  one: {question: '?', grid: {objective: [grpo, cfpo], learning_rate: [1e-6, 1.0e-5], seed: 0}}\n"
    )
    runs = expand(load_study(tmp_path / "study.yaml"))
    assert sorted({run.recipe["learning_rate"] for run in runs}) == [1e-6, 1e-5]


@pytest.mark.parametrize(("accumulated", "fails"), [(1, False), (2, False), (4, False), (3, True), (8, True)])
def test_accumulation_must_fit_into_the_batches_that_share_rollouts(accumulated, fails):
    grid = {"objective": "cfpo", "seed": 0, "num_iterations": 2, "steps_per_generation": 2}
    one = study(parts={"one": {"question": "?", "grid": grid | {"gradient_accumulation_steps": accumulated}}})
    if fails:
        with pytest.raises(
            ValueError, match=f"gradient_accumulation_steps={accumulated} does not divide the 4 batches"
        ):
            expand(one)
    else:
        (run,) = expand(one)
        assert run.recipe["max_steps"] == 12 * 4 // accumulated


def test_a_recipe_that_accumulates_shares_rollouts_as_in_trl():
    grid = {"objective": "cfpo", "seed": 0, "num_iterations": 2, "gradient_accumulation_steps": 8}
    one = study(parts={"one": {"question": "?", "grid": grid}})
    one["recipe"].pop("steps_per_generation", None)
    (run,) = expand(one)
    assert run.recipe["steps_per_generation"] == 8
    assert run.recipe["max_steps"] == 12 * 2


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_studies_of_the_repository(path, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    runs = expand(load_study(path))
    assert {run.cell["objective"] for run in runs} >= {"cfpo", "grpo"}
    for run in runs:
        assert trainer_of(run.cell["objective"])
        assert run.recipe["max_steps"] % run.recipe["eval_steps"] == 0
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(runs[-1].script_recipe))
    arguments = ["--config", str(tmp_path / "recipe.yaml"), "--bf16", "false", "--use_cpu", "true"]
    script_args, training_args, *_ = TrlParser(ARGUMENTS).parse_args_and_config(arguments)
    assert script_args.objective in ("cfpo", "grpo")
    assert training_args.report_to == []
    assert not training_args.push_to_hub


def make_table(curves: dict[tuple[str, int], list[float]], failure: str | None = None) -> pd.DataFrame:
    """A table as `cfpo study` writes it: an evaluation every 10 steps, 100 tokens each."""
    rows = []
    for (objective, seed), curve in curves.items():
        for index, value in enumerate(curve):
            facts = {"run": f"{objective}{seed}", "parts": "one", "objective": objective, "seed": seed}
            facts |= {"commit": "abc", "seconds": 1.0, "failure": failure}
            metrics = {"eval_reward": value, "num_tokens": 100.0 * index, "step": 10 * index, "rollout_batches": index}
            rows.append(facts | metrics)
    return pd.DataFrame(rows)


def test_summary_of_a_run():
    row = summarise(make_table({("cfpo", 0): [0.4, 0.6, 0.8, 1.0, 0.9, 0.8]})).iloc[0]
    assert row["start"] == 0.4
    assert row["final"] == pytest.approx(0.9)
    assert row["best"] == pytest.approx(0.9)
    assert not row["collapsed"]
    assert row["updates to 50%"] == pytest.approx(5)
    assert row["tokens to 90%"] == pytest.approx(250)


@pytest.mark.parametrize(
    ("curve", "failure", "collapsed"),
    [
        ([0.5, 0.9, 0.9, 0.9, 0.46, 0.46, 0.46], None, False),
        ([0.5, 0.9, 0.9, 0.9, 0.44, 0.44, 0.44], None, True),
        ([0.5, 0.1, 0.1, 0.1], None, True),  # the start counts
        ([0.5, 0.9, 0.9, 0.9], "RuntimeError: probability tensor contains nan", True),
        ([float("nan")] * 4, None, True),
    ],
)
def test_collapse(curve, failure, collapsed):
    assert summarise(make_table({("grpo", 0): curve}, failure)).iloc[0]["collapsed"] == collapsed


@pytest.mark.parametrize(
    ("curve", "failure", "final", "collapsed"),
    [
        ([-2.0, -1.0, -0.5, -0.5, -0.5], None, -0.5, False),
        ([-2.0, -0.4, -0.4, -0.4, -1.9, -1.9, -1.9], None, -1.9, True),
        ([-2.0, -1.0, -0.4, -0.4, -0.4], "RuntimeError: nan", -2.0, True),
        ([0.5, 2.0, 2.0, 2.0, 0.9, 0.9, 0.9], None, 0.9, True),
    ],
)
def test_rewards_that_are_no_shares(curve, failure, final, collapsed):
    row = summarise(make_table({("grpo", 0): curve}, failure)).iloc[0]
    assert row["final"] == pytest.approx(final)
    assert row["collapsed"] == collapsed


def test_what_is_followed_has_no_value_for_failed_runs_and_may_be_missing(tmp_path):
    table = make_table({("grpo", 0): [0.5, 0.6, 0.7, 0.8], ("grpo", 1): [0.5] * 4})
    failed = make_table({("cfpo", 0): [0.5, 0.9, 0.9, 0.9], ("cfpo", 1): [0.5] * 4}, "RuntimeError: nan")
    table = pd.concat([table, failed], ignore_index=True)
    table["eval_length"] = np.where(table["seed"] == 0, 3.0, np.nan)
    table["entropy"] = 1.0
    runs = summarise(table, ["length"])
    assert runs.loc[runs["objective"] == "cfpo", "length"].isna().all()
    assert at_equal_reward(table, runs, "cfpo", "eval_length").size == 0
    study = {"parts": {"one": {"question": "?", "grid": {}}}, "follow": ["length", "lenght"]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    table.to_parquet(tmp_path / "table.parquet")
    assert "No evaluation logged lenght, which the study follows." in report(tmp_path).read_text()


@pytest.mark.parametrize(
    ("option", "values", "labels"),
    [
        ("reward_clip_range", [[-1, 1], [-3, 3]], ["[-1, 1]", "[-3, 3]"]),
        ("generation_kwargs", [{"top_k": 1}, {"top_k": 2}], ["{'top_k': 1}", "{'top_k': 2}"]),
        ("penalty_slope", [None, 1.0], ["1.0", "None"]),
    ],
)
def test_a_list_a_mapping_and_nothing_are_options_like_any_other(tmp_path, option, values, labels):
    grid = {"objective": ["cfpo"], "seed": [0], option: values}
    parts = {"one": {"question": "?", "grid": grid}}
    runs = expand(study(output=str(tmp_path), parts=parts))
    history = [{"step": step, "eval_reward": 0.5, "entropy": 1.0, "num_tokens": step} for step in (0, 4, 8)]
    for run in runs:
        run.folder.mkdir(parents=True)
        run.result.write_text(json.dumps({"commit": "a", "seconds": 1.0, "failure": None, "history": history}))
    table = table_of(runs)
    assert sorted(table[option].unique()) == labels
    (tmp_path / "study.yaml").write_text(yaml.safe_dump({"parts": parts}))
    table.to_parquet(tmp_path / "table.parquet")
    text = report(tmp_path).read_text()
    assert "nan" not in text
    assert all(f"| {label} |" in text for label in labels)


def test_reached():
    step, score = np.array([0, 10, 20]), np.array([0.2, 0.6, 0.4])
    assert reached(step, score, 0.5) == pytest.approx(7.5)
    assert reached(step, score, 0.1) == 0
    assert reached(step, score, 0.7) == np.inf


def test_differences_are_matched_by_seed_and_their_interval_holds_the_mean():
    flat = {("grpo", 0): [0.5] * 4, ("grpo", 1): [0.7] * 4, ("cfpo", 0): [0.6] * 4, ("cfpo", 1): [0.9] * 4}
    found = differences(summarise(make_table(flat | {("cfpo", 2): [0.1] * 4})), "cfpo")
    assert found == pytest.approx([0.1, 0.2])  # seed 2 has no partner
    mean, low, high = interval([found])
    assert (mean, low, high) == pytest.approx((0.15, 0.1, 0.2))
    many = np.random.default_rng(1).normal(0.1, 0.05, 400)
    mean, low, high = interval([many])
    assert high - low == pytest.approx(2 * 1.96 * 0.05 / 20, rel=0.15)
    assert interval([np.array([])]) is None


def test_differences_at_equal_length():
    """CFPO is 0.3 ahead and 2 tokens longer, at 0.1 and 0.2 of reward per token: 0 of it is not the length's."""
    rewards = {("grpo", 0): 0.4, ("cfpo", 0): 0.7, ("grpo", 1): 0.5, ("cfpo", 1): 0.6}
    table = make_table({run: [reward] * 4 for run, reward in rewards.items()})
    cfpo = table["objective"] == "cfpo"
    table["eval_completions/mean_length"] = np.where(cfpo, 7.0, 5.0)
    table["eval_reward_length/slope"] = np.where(cfpo, 0.2, 0.1)
    table["eval_rewards/true/mean"] = np.where(cfpo, 0.4, 0.3)
    table.loc[table["seed"] == 1, "eval_rewards/true/length_slope"] = -0.1
    runs = summarise(table, ["rewards/true/mean"])
    assert at_equal_length(runs, "cfpo", "final").tolist() == pytest.approx([0.0, -0.2])
    assert differences(runs, "cfpo", "rewards/true/mean").tolist() == pytest.approx([0.1, 0.1])
    assert at_equal_length(runs, "cfpo", "rewards/true/mean").tolist() == pytest.approx([0.3])  # seed 0 has no slope
    text = length_controlled(runs, ["grpo", "cfpo"], ["final", "rewards/true/mean"])
    assert "| all | cfpo | 7.0 | +0.200 [+0.100, +0.300] | -0.100 [-0.200, " in text
    assert "| all | grpo | 5.0 | – | – | – | – |" in text


def test_differences_at_equal_reward():
    """GRPO ends higher; where it first has CFPO's 0.6, half-way between its first two evaluations, it is 5 longer."""
    table = make_table({("grpo", 0): [0.4, 0.8, 0.9, 0.9, 0.9], ("cfpo", 0): [0.4, 0.5, 0.6, 0.6, 0.6]})
    table["eval_length"] = [2.0, 20.0, 30.0, 30.0, 30.0, 2.0, 4.0, 6.0, 8.0, 8.0]
    runs = summarise(table, ["length"])
    assert differences(runs, "cfpo", "length").tolist() == pytest.approx([22 / 3 - 30])
    assert at_equal_reward(table, runs, "cfpo", "eval_length").tolist() == pytest.approx([6.0 - 11.0])
    row = followed(table, runs, ["grpo", "cfpo"], ["length"]).splitlines()[-1]
    assert row == "| all | cfpo | 7.333 | -22.667 [-22.667, -22.667] | -5.000 [-5.000, -5.000] |"


def test_headline_counts_collapsed_and_failed_runs():
    runs = summarise(make_table({("grpo", 0): [0.5, 0.1, 0.1, 0.1], ("cfpo", 0): [0.5, 0.6, 0.6, 0.6]}))
    text = headline(runs, {"one": {}}, ["grpo", "cfpo"])
    assert "| one | grpo | 0.100 | 0.500 | – | 1 of 1 | 0 |" in text
    assert "| one | cfpo | 0.600 | 0.600 | +0.500 [+0.500, +0.500] | 0 of 1 | 0 |" in text


def finished(output: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in output.glob("runs/*/result.json")}


def write_study(path: Path, output: Path, grid: dict, **changes) -> list[str]:
    """The quick study with another grid; returns the command that runs it."""
    content = yaml.safe_load((ROOT / "scripts/studies/quick.yaml").read_text()) | {"output": str(output)} | changes
    content["parts"]["regime"]["grid"] = grid
    path.write_text(yaml.safe_dump(content))
    return [sys.executable, "-m", "cfpo_trl.cli", "study", str(path)]


@pytest.mark.slow
def test_quick_study_is_killed_goes_on_and_reports(tmp_path):
    """As a user runs it, but for a folder of its own."""
    content = yaml.safe_load((ROOT / "scripts/studies/quick.yaml").read_text())
    output = tmp_path / "quick"
    command = write_study(tmp_path / "study.yaml", output, content["parts"]["regime"]["grid"])
    said = tmp_path / "stderr"
    with said.open("w") as stderr:  # a pipe that nobody reads would hold it up
        first = subprocess.Popen(command, cwd=ROOT, stderr=stderr)
    while len(finished(output)) < 3:
        assert first.poll() is None
        time.sleep(0.5)
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "Another study works in" in second.stderr
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 1
    assert "Stopped: by a signal. What is finished is kept; the same command goes on" in said.read_text()
    before = finished(output)
    assert not subprocess.run(["pgrep", "-f", f"studies.worker {first.pid}"], capture_output=True).stdout

    subprocess.run(command, cwd=ROOT, check=True)
    after = finished(output)
    assert len(before) < len(after) == 16
    assert before.items() <= after.items()  # what was finished was not run again

    table = pd.read_parquet(output / "table.parquet")
    assert table["run"].nunique() == 16
    assert table["failure"].isna().all()
    assert (table.groupby("run")["eval_reward"].count() == 7).all()  # the start, and six more
    for _, run in table.groupby("run"):
        trained = run[run["step"] > 0]
        assert len(trained) == 24  # a row per batch of rollouts
        assert trained[["reward", "entropy", "grad_norm", "cfpo/tv", "num_tokens"]].notna().all(axis=None)
    one = table[table["num_iterations"] == 1].set_index(["learning_rate", "seed", "step"])
    metrics = ["reward", "eval_reward", "loss", "grad_norm", "entropy"]
    grpo, cfpo = (one.loc[one["objective"] == name, metrics] for name in ("grpo", "cfpo"))
    pd.testing.assert_frame_equal(grpo, cfpo)  # with one update per batch they are the same algorithm
    runs = summarise(table)
    small_steps = runs[runs["learning_rate"] == 1.0e-4]  # the other learning rate is too large for eight iterations
    assert (small_steps["final"] > small_steps["start"] + 0.05).all()

    text = report(output).read_text()
    assert text.count("![](") == 4  # final, curves, and diagnostics for each number of iterations
    for name in ("regime-final.png", "regime-curves.png", "regime-diagnostics-0.png", "regime-diagnostics-1.png"):
        assert f"![]({name})" in text
        assert (output / name).stat().st_size > 10_000
    assert len(pd.read_csv(output / "runs.csv")) == 16
    recipe = yaml.safe_load(next(output.glob("runs/*/recipe.yaml")).read_text())
    assert json.loads(next(output.glob("runs/*/result.json")).read_text())["cell"].items() <= recipe.items()


@pytest.mark.slow
def test_penalty_slope_changes_the_runs_that_it_names(tmp_path):
    grid = {"objective": "cfpo", "penalty_slope": [None, 1.0], "num_iterations": 4, "learning_rate": 3e-3, "seed": 0}
    changes = {"rollout_batches": 3, "evaluations": 1}
    command = write_study(tmp_path / "study.yaml", tmp_path / "out", grid, **changes)
    subprocess.run(command, cwd=ROOT, check=True)
    penalties = pd.read_parquet(tmp_path / "out" / "table.parquet").groupby("penalty_slope")["cfpo/penalty"].max()
    assert penalties["1.0"] != penalties["None"]


@pytest.mark.slow
def test_a_killed_run_that_saved_goes_on_as_if_uninterrupted(tmp_path):
    recipe = yaml.safe_load((ROOT / "scripts/studies/quick_recipe.yaml").read_text())
    recipe |= {"save_strategy": "steps", "save_steps": 8}
    grid = {"objective": "cfpo", "num_iterations": 2, "learning_rate": 3.0e-4, "seed": 0}
    tables = []
    for name in ("whole", "killed"):
        changes = {"recipe": recipe, "rollout_batches": 12, "evaluations": 3}
        command = write_study(tmp_path / f"{name}.yaml", tmp_path / name, grid, **changes)
        if name == "killed":
            first = subprocess.Popen(command, cwd=ROOT)
            while not list((tmp_path / name).glob("runs/*/checkpoint-8/trainer_state.json")):
                assert first.poll() is None
                time.sleep(0.01)
            first.kill()
            first.wait()
            time.sleep(3)
            assert not finished(tmp_path / name)
        subprocess.run(command, cwd=ROOT, check=True)
        tables.append(pd.read_parquet(tmp_path / name / "table.parquet"))
        assert not list((tmp_path / name).glob("runs/*/checkpoint-*"))
    metrics = ["step", "loss", "reward", "eval_reward", "grad_norm", "entropy", "cfpo/tv", "num_tokens"]
    pd.testing.assert_frame_equal(tables[0][metrics], tables[1][metrics])
    log = next((tmp_path / "killed").glob("runs/*/log.txt")).read_text()
    assert "Going on from" in log


@pytest.mark.slow
def test_a_run_that_fails_is_a_result_and_the_others_go_on(tmp_path):
    grid = {"objective": ["cfpo"], "learning_rate": [1.0e-4, 1.0e30], "seed": 0, "num_iterations": 2}
    command = write_study(tmp_path / "study.yaml", tmp_path / "out", grid, rollout_batches=2, evaluations=1)
    subprocess.run(command, cwd=ROOT, check=True)
    runs = summarise(pd.read_parquet(tmp_path / "out" / "table.parquet")).set_index("learning_rate")
    assert pd.isna(runs.loc[1.0e-4, "failure"])
    assert runs.loc[1.0e-4, "final"] > 0.2
    assert "nan" in runs.loc[1.0e30, "failure"]
    assert runs.loc[1.0e30, "collapsed"]
    assert "failed" in report(tmp_path / "out").read_text()


@pytest.mark.slow
def test_an_error_that_is_no_result_stops_the_study_and_leaves_none(tmp_path):
    grid = {"objective": ["cfpo"], "model_name_or_path": "runs/no/such-model", "seed": [0, 1, 2, 3]}
    command = write_study(tmp_path / "study.yaml", tmp_path / "out", grid, rollout_batches=2, evaluations=1)
    stopped = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert stopped.returncode == 1
    message = stopped.stderr.splitlines()[-1]
    assert message.startswith("Stopped: ")
    assert "runs/no/such-model" in message
    log = Path(message.partition("its log is ")[2].partition(".txt")[0] + ".txt")
    assert "Traceback" in log.read_text()
    assert not finished(tmp_path / "out")


def test_a_run_that_begins_behind_the_stop_is_stopped_too(monkeypatch, tmp_path):
    class Late:
        """A worker whose run goes on until the second stop, as one does that began behind the first."""

        def __init__(self, device):
            self.stops, self.ended = 0, threading.Event()

        def train(self, run, keep_model):
            if run.folder.name == "fails":
                raise RuntimeError("a run failed")
            late.append(self.ended.wait(20))

        def stop(self):
            self.stops += 1
            if self.stops == 2:
                self.ended.set()

    late = []
    monkeypatch.setattr("cfpo_trl.studies.run.Worker", Late)
    runs = [Run({"objective": "cfpo"}, {}, tmp_path / name, []) for name in ("waits", "fails", "is not begun")]
    with pytest.raises(RuntimeError, match="a run failed"):
        sweep({}, runs, 2, None)
    assert late == [True]


def test_unknown_part_is_refused():
    command = [sys.executable, "-m", "cfpo_trl.cli", "study", "scripts/studies/quick.yaml", "--parts", "regimes"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "no part regimes; scripts/studies/quick.yaml has regime" in refused.stderr
