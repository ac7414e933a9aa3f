import math

import numpy as np
import pytest

from atlas.scaling import Estimate
from atlas.scaling.joint import fitted
from experiments.benchmarks import coverage


def test_score_is_in_standard_errors():
    assert coverage.score(Estimate.normal(1.0, 0.5, True), 0.0, positive=False) == (False, 2.0, True)
    inside, error, told = coverage.score(Estimate.lognormal(0.0, 0.5, False), math.e**0.25)
    assert inside and not told and error == pytest.approx(-0.5)


@pytest.mark.parametrize(("shrink", "reached"), [(1.0, "yes"), (0.5, "no"), (2.0, "no")])
def test_only_honest_intervals_pass(shrink, reached):
    errors = np.random.default_rng(0).normal(size=2000)
    scores = [[coverage.score(Estimate.normal(e, shrink, True), 0.0, positive=False)] for e in errors]
    row = coverage._row("joint", "phi", scores)
    assert row["reached"] == reached
    assert row["spread"] == pytest.approx(1 / shrink, rel=0.05) and abs(row["bias"]) < 0.1 / shrink
    assert row["studies"] == row["intervals"] == 2000


def test_intervals_of_chinchilla_hold_the_truth_most_times():
    outcomes = [coverage.measure_series(30, 8, "least_squares", seed) for seed in range(25)]
    for name in ("E", "A", "alpha", "B", "beta", "loss", "run"):
        row = coverage._row("series", name, [outcome[name] for outcome in outcomes])
        assert row["coverage"] >= 0.7 and 0.5 < row["spread"] < 1.6 and row["told"] == 1.0


def test_correlations_differ_between_studies():
    found = [coverage.correlation(seed) for seed in range(200)]
    assert 0.3 <= min(found) < 0.32 and 0.58 < max(found) <= 0.6


@pytest.mark.thorough
def test_bootstrap_and_joint_fit_are_scored(monkeypatch):
    monkeypatch.setattr(coverage, "_RESAMPLES", 50)
    names = {"E", "A", "alpha", "B", "beta", "loss"}
    resampled = coverage.measure_series(40, 8, "bootstrap", 0)
    assert set(resampled) == names and all(abs(error) < 5 for ((_, error, _),) in resampled.values())
    joint = coverage.measure_joint(1)
    assert set(joint) == names | {"lambda", "tau", "phi"}
    assert {name: len(scores) for name, scores in joint.items()} == dict.fromkeys(joint, 5) | {"tau": 20, "phi": 1}
    assert np.mean([abs(error) < 4 for scores in joint.values() for _, error, _ in scores]) > 0.9


@pytest.mark.thorough
def test_intervals_of_new_runs_hold_their_losses_under_a_wrong_form_too(monkeypatch):
    def covered(form):
        scores = [coverage.measure_new(coverage.NEW_RUNS[f"37 runs, {form} form"], seed) for seed in range(20)]
        return {name: np.mean([inside for found in scores for inside, *_ in found[name]]) for name in scores[0]}

    assert all(coverage.LOW <= part <= coverage.HIGH_NEW for part in covered("right").values())
    assert all(part >= coverage.LOW for part in covered("wrong").values())
    monkeypatch.setattr(fitted, "misfit", lambda *_: 0.0)
    assert covered("wrong")["mixture"] < coverage.LOW
