"""The study of the field's objectives: its cells, its choices, and what it makes of rows."""

import itertools

import numpy as np
import pandas as pd
import pytest

import field
import field_report
from cfpo_trl.studies.objectives import trainer_of
from cfpo_trl.studies.plan import expand


def rows_of(regime: str, finals) -> pd.DataFrame:
    """Rows as the study keeps them, with these final rewards in the order of the cells to tune."""
    rows = []
    for run, final in zip(expand(field.study({regime: field.to_tune(regime)})), finals, strict=True):
        row = {option: run.cell.get(option, np.nan) for option in (*field.CHOSEN, "seed")}
        row |= {"regime": regime, "final": final}
        rows.append(row)
    table = pd.DataFrame(rows)
    table["family"] = table.apply(field.family_of, axis=1)
    return table


def test_every_regime_has_a_run_for_each_width_and_rate_of_each_objective():
    for regime, about in field.REGIMES.items():
        cells = sum(len(field.FAMILIES[family]) for family in about.families)
        runs = expand(field.study({regime: field.to_tune(regime)}))
        assert len({run.result for run in runs}) == cells * len(about.rates)
        assert bool(runs) != bool(about.like)
        steps = {run.recipe["max_steps"] for run in runs}
        assert steps == ({about.batches * about.options.get("num_iterations", 1)} if about.rates else set())
    for cell in itertools.chain(*field.FAMILIES.values()):
        assert trainer_of(cell["objective"])


def test_every_run_belongs_to_the_family_that_it_was_made_for():
    for name, cells in field.FAMILIES.items():
        for cell in cells:
            assert field.family_of(pd.Series(dict.fromkeys(field.CHOSEN, np.nan) | cell)) == name


def test_the_best_cell_of_each_objective_is_chosen_and_confirmed_on_other_seeds(capsys):
    rows = rows_of(
        "stale 4", np.random.default_rng(0).random(len(expand(field.study({"stale 4": field.to_tune("stale 4")}))))
    )
    cells = field.to_confirm(rows, "stale 4")
    assert len(cells) == len(field.REGIMES["stale 4"].families) * 5
    assert {cell["seed"] for cell in cells} == {1, 2, 3, 4, 5}
    best = rows[rows["family"] == "bounded CFPO"].sort_values("final").iloc[-1]
    mine = [cell for cell in cells if cell["objective"] == "bounded-1" and "importance_sampling_level" not in cell]
    assert {(cell["epsilon"], cell["learning_rate"]) for cell in mine} == {(best["epsilon"], best["learning_rate"])}
    assert field.to_confirm(rows, "stale 1") == cells  # whose choices they are
    assert field.to_confirm(rows.iloc[1:], "stale 4") == field.to_confirm(rows.iloc[1:], "stale 1") == []
    assert "stale 4 is not tuned yet: 1 runs are missing" in capsys.readouterr().out


def test_rows_survive_the_file_and_are_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(field, "ROWS", tmp_path / "rows" / "runs.csv")
    runs = expand(field.study({"stale 4": field.to_tune("stale 4")}))
    rows = rows_of("stale 4", np.linspace(0, 1, len(runs))).assign(commit="676e062")
    field.keep_rows(rows.iloc[:50])
    field.keep_rows(rows.iloc[40:60])
    kept = field.read_rows()
    assert len(kept) == 60
    assert set(kept["commit"]) == {"676e062"}  # no number
    assert len(field.not_done(runs, kept)) == len(runs) - 60


def test_differences_are_matched_by_seed():
    confirmed = [
        {"regime": "stale 4", "family": family, "seed": seed, "final": base + 0.1 * seed}
        for family, base in (("GRPO", 0.0), ("CFPO", 0.05))
        for seed in field.FRESH_SEEDS
    ]
    rows = pd.DataFrame([*confirmed, {"regime": "stale 4", "family": "CFPO", "seed": 0, "final": 9.0}])
    assert field_report.differences(rows, "stale 4", "CFPO") == pytest.approx(np.full(5, 0.05))
    means, texts = field_report.main_table(rows, "stale")
    assert means.loc["CFPO", "stale 4"] == pytest.approx(0.05)
    assert texts.loc["CFPO", "stale 4"] == "+0.050 [+0.050, +0.050]"
    assert texts.loc["GRPO", "stale 4"] == "0.300"
