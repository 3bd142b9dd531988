"""The study of the field's objectives: its cells, its choices, and what it makes of rows."""

import itertools

import numpy as np
import pandas as pd
import pytest

import asynchronous
import field
import field_report
import smollm2_report
from cfpo_trl.studies.objectives import trainer_of
from cfpo_trl.studies.plan import expand, load_study


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


def confirmed_rows(finals: dict[tuple[str, str], float]) -> pd.DataFrame:
    """Five seeds of each regime and family, each a tenth above the one before."""
    return pd.DataFrame(
        {"regime": regime, "family": family, "seed": seed, "final": final + 0.1 * seed}
        for (regime, family), final in finals.items()
        for seed in field.FRESH_SEEDS
    )


def test_differences_are_matched_by_seed():
    confirmed = confirmed_rows({("stale 4", "GRPO"): 0.0, ("stale 4", "CFPO"): 0.05})
    tuning = pd.DataFrame([{"regime": "stale 4", "family": "CFPO", "seed": 0, "final": 9.0}])
    rows = pd.concat([confirmed, tuning], ignore_index=True)
    assert field_report.differences(rows, "stale 4", "CFPO") == pytest.approx(np.full(5, 0.05))
    means, texts = field_report.main_table(rows, "stale")
    assert means.loc["CFPO", "stale 4"] == pytest.approx(0.05)
    assert texts.loc["CFPO", "stale 4"] == "+0.050 [+0.050, +0.050]"
    assert texts.loc["GRPO", "stale 4"] == "0.300"


def test_verdicts_count_the_regimes_in_which_an_objective_is_behind():
    finals = {("stale 4", "GRPO"): 0.5, ("stale 4", "CFPO"): 0.4, ("stale 4", "GSPO"): 0.6, ("stale 1", "GRPO"): 0.5}
    finals |= {("stale 1", "CFPO"): 0.7, ("reuse 1", "CFPO"): 0.1, ("reuse 1", "GRPO"): 0.5}  # the last: not counted
    table = field_report.verdicts(confirmed_rows(finals)).splitlines()
    assert table[2:] == [
        "| GSPO | 1 | 1 | 0 | 0 | 0 | +0.100 (stale 4) |",
        "| CFPO | 2 | 1 | 0 | 1 | 1 | -0.100 (stale 4) |",
    ]


def test_a_table_is_put_between_its_comments_and_a_page_without_them_is_an_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\n\nolder\n<!-- end -->\nb\n<!-- two -->\n\n<!-- end -->\n")
    field_report.put("one", "new \\1", page)
    field_report.put("two", "other\n", page)
    assert page.read_text() == "a\n<!-- one -->\nnew \\1\n<!-- end -->\nb\n<!-- two -->\nother\n<!-- end -->\n"
    with pytest.raises(AssertionError, match="page.md has no place for three"):
        field_report.put("three", "", page)


def test_the_pretrained_table_compares_best_rates_by_the_mean_of_the_last_evaluations():
    finals = {("GRPO", 1e-6): 0.5, ("GRPO", 1e-5): 0.6, ("CFPO", 1e-6): 0.7, ("CFPO", 1e-5): 0.2}
    rows = pd.DataFrame(
        {
            "part": "p",
            "form": form,
            "learning_rate": rate,
            "seed": seed,
            "rollout_batches": batch,
            "epsilon": 0.2,
            "held_out": final + (0.1 * seed if batch > 4 else -9.0),
        }
        for (form, rate), final in finals.items()
        for seed in (0, 1)
        for batch in (0, 4, 8, 12, 16)
    )
    table = smollm2_report.main_table(rows, "p").splitlines()
    assert table[0] == "| p | ε | rate 1e-06 | rate 1e-05 | at the best rate − GRPO's |"
    assert table[2] == "| GRPO | 0.2 | 0.550 (0.50–0.60) | 0.650 (0.60–0.70) | – |"
    assert table[3] == "| CFPO | 0.2 | 0.750 (0.70–0.80) | 0.250 (0.20–0.30) | +0.100 [+0.100, +0.100] |"


def test_the_pretrained_rows_in_the_repository_are_of_the_study_and_whole():
    rows = pd.read_csv(smollm2_report.ROWS)
    runs = expand(load_study("scripts/studies/smollm2.yaml"))
    assert set(rows["part"]) <= {part for run in runs for part in run.parts}
    assert set(rows["form"]) == {name for name, _ in smollm2_report.FORMS.values()}
    assert (rows.groupby(smollm2_report.KEY[:-1]).size() == 9).all()


def test_asynchronous_forms_are_compared_with_the_clip_of_the_same_seeds():
    rest = {"learning_rate": 4e-4, "max_staleness": 4, "age": 3.0, "area": 0.5, "tv": 0.01, "ratio_max": 2.0}
    finals = {"clip": (0.8, 0.6, 0.1), "bounded": (0.9, 0.8)}
    rows = [
        {"form": form, "seed": seed, "final": final, "ess_min": 0.5 + 0.1 * seed, **rest}
        for form, values in finals.items()
        for seed, final in enumerate(values)
    ]
    clip, bounded = asynchronous.report(pd.DataFrame(rows)).splitlines()[2:]
    assert clip == "| 0.0004 | 4 | 3.0 | clip | 3 | 0.500 |  | 0.500 |  | 0.010 | 0.50 | 2 |"
    final, area = "0.850 | +0.150 [+0.100, +0.200]", "0.500 | +0.000 [+0.000, +0.000]"
    assert bounded == f"| 0.0004 | 4 | 3.0 | bounded | 2 | {final} | {area} | 0.010 | 0.50 | 2 |"
