"""The harnesses of faults and of long runs: their own arithmetic, and a few faults."""

import csv
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import chaos
import soak

ROOT = Path(__file__).parent.parent


def test_a_slope_and_its_interval():
    rng = np.random.default_rng(0)
    rows = [{"step": step, "MiB": 100 + 0.004 * step + rng.normal()} for step in range(500, 5000, 10)]
    found, low, high = soak.slope(rows, "MiB")
    assert low < 4 < high
    assert found == pytest.approx(4, abs=0.2)
    flat, low, high = soak.slope([row | {"MiB": 7.0} for row in rows], "MiB")
    assert flat == pytest.approx(0, abs=1e-9)


def test_a_hundred_faults_strike_every_way_of_training_with_every_fault_and_victim():
    planned = chaos.plan(list(chaos.MODES), 100, seed=0)
    assert planned == chaos.plan(list(chaos.MODES), 100, seed=0)
    assert planned[:8] == chaos.plan(list(chaos.MODES), 8, seed=0)  # fewer are the first of more
    for name, mode in chaos.MODES.items():
        of_mode = [(fault, victim) for _, way, fault, victim in planned if way == name]
        assert {fault for fault, _ in of_mode} == set(mode.faults)
        assert {victim for _, victim in of_mode} == set(mode.victims)


def test_outcomes_by_fault_and_way_of_training():
    rows = [
        {"mode": "two", "fault": "SIGTERM", "struck": "rank", "ended": "3.4", "good": "True"},
        {"mode": "two", "fault": "SIGTERM", "struck": "command", "ended": "61.2", "good": "False"},
        {"mode": "one", "fault": "clock", "struck": "the wall clock", "ended": "8.0", "good": "True"},
        {"mode": "one", "fault": "clock", "struck": "it had ended", "ended": "90.0", "good": "True"},
    ]
    assert chaos.outcomes(rows).splitlines() == [
        "| fault | one | two | slowest end, s |",
        "| --- | --- | --- | --- |",
        "| SIGTERM |  | 1 of 2 | 61 |",
        "| clock | 1 of 1 |  | 8 |",
    ]


def test_a_cut_checkpoint_is_the_newest(tmp_path):
    for step in (4, 8, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").write_bytes(bytes(1000))
    assert chaos.cut_newest_checkpoint(tmp_path, random.Random(0))
    sizes = {path.parent.name: path.stat().st_size for path in tmp_path.glob("*/optimizer.pt")}
    assert sizes == {"checkpoint-4": 1000, "checkpoint-8": 1000, "checkpoint-12": 500}


@pytest.mark.slow
def test_a_few_faults_leave_nothing_behind(tmp_path):
    rows = tmp_path / "rows.csv"
    command = [sys.executable, str(ROOT / "scripts" / "faults" / "chaos.py"), "--faults", "4", "--rows", str(rows)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--modes", "one", "reward server", "--seed", "29"],
        cwd=tmp_path,
        env=environment,
        text=True,
        capture_output=True,
    )
    found = list(csv.DictReader(rows.open()))
    assert [row["good"] for row in found] == ["True"] * 4, found
    assert done.returncode == 0
