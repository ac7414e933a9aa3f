import dataclasses
import functools

import numpy as np
import pytest

from experiments.benchmarks import recovery
from experiments.benchmarks.recovery import Study

SMALL = Study((4, 2, 4, 8), languages=3, rho=0.3)


@pytest.mark.parametrize(
    ("statistic", "bounds", "values", "measured", "reached"),
    [
        ("median", {"high": 0.02}, [0.01, 0.02, 0.5], 0.02, "yes"),
        ("median", {"high": 0.02}, [0.01, 0.021, 0.03], 0.021, "no"),
        ("mean", {"low": 0.84, "high": 0.95}, [0.8, 0.9], 0.85, "yes"),
        ("mean", {"low": 0.84, "high": 0.95}, [1.0, 0.98], 0.99, "no"),
        ("smallest", {"low": 1.0}, [1.0, 0.9], 0.9, "no"),
        ("largest", {"high": 1e-4}, [1e-5, np.nan], np.nan, "no"),
    ],
)
def test_a_bar_is_reached_only_inside_its_bounds(statistic, bounds, values, measured, reached):
    row = recovery._row([{"x": value} for value in values], "line", "study", "x", statistic, **bounds)
    assert row["measured"] == pytest.approx(measured, nan_ok=True) and row["reached"] == reached
    assert row["studies"] == len(values)


@pytest.fixture(scope="module")
def outcome():
    return recovery.measure(SMALL, 1)


def test_a_study_measures_errors_against_its_own_law(outcome):
    assert outcome["converged"] in (0.0, 1.0)
    assert 0 < outcome["tau"] < 0.04 and 0 < outcome["alpha"] < 0.02 and 0 < outcome["beta"] < 0.02
    assert 0 <= outcome["phi error"] < 0.05
    assert outcome["told"] == 1.0 and outcome["flagged"] == 0.0
    assert 0.5 <= outcome["tau inside"] <= 1.0 and 0 <= outcome["loss inside"] <= 1.0


def test_another_law_is_noticed(monkeypatch):
    simulate = recovery.simulate

    def mistaken(study, seed):
        truth, frame = simulate(study, seed)
        law = truth.law
        law = dataclasses.replace(law, tau=law.tau + 0.3 * (law.tau != 1), E=1.1 * law.E)
        return dataclasses.replace(truth, law=law), frame

    monkeypatch.setattr(recovery, "simulate", mistaken)
    wrong = recovery.measure(SMALL, 0)
    assert wrong["tau"] == pytest.approx(0.3, abs=0.05) and wrong["log E"] == pytest.approx(np.log(1.1), abs=0.05)
    assert wrong["tau inside"] <= 0.1


@pytest.mark.thorough
def test_designs_that_hide_tau_and_runs_that_diverge():
    hidden = recovery.measure(Study("pairs", languages=3), 0)
    assert hidden["told"] == 0.0 and hidden["flagged"] == 1.0
    found = recovery.measure(dataclasses.replace(SMALL, diverged=0.15, unseen=True), 2)
    assert found["detected"] >= 0.5 and found["false alarms"] <= 0.1
    assert found["unseen r2"] > 0.9 and found["gain in r2"] > 0
    priors = recovery.measure_priors(SMALL, 0)
    assert priors["wrong over none"] == pytest.approx(1.0, abs=0.3) and priors["flat over true"] > 0.7


def test_every_bar_has_its_study(monkeypatch):
    counts = {}

    def fake(name, task, count, workdir):
        assert isinstance(task, functools.partial) and workdir == "kept"
        counts[name] = count
        bars = recovery._bars()
        return [dict.fromkeys([*bars.key[bars.study == name], "converged"], 0.5)] * count

    monkeypatch.setattr(recovery, "outcomes", fake)
    monkeypatch.setattr(recovery.joint_speed, "run", lambda: [])
    rows, facts = recovery.run("kept")
    assert len(rows) == len(recovery._bars()) > 40
    assert all(row["studies"] == counts[row["study"]] for row in rows) and min(counts.values()) >= 4
    assert all(row["measured"] == 0.5 and row["bar"] for row in rows) and facts["converged"] == 0.5


def test_a_study_of_mixtures_is_judged_on_unseen_ones():
    found = recovery.measure_mixtures({"eta": 0.6}, "ces", 120, 0, L=6)
    assert found["converged"] == 1.0 and found["median error"] < 0.01 < found["largest error"] < 0.5
    assert 0.5 <= found["inside"] <= 1.0
