"""The misfit of the joint law: what it misses of runs unlike the others, in studies whose form is right or wrong."""

import functools
import json

import numpy as np
import pytest

from atlas.scaling import fit_joint, load_runs, simulation
from atlas.scaling.joint.misfit import _asked, _excess, _runs_of, _unlike

L = 5


@functools.cache
def study(eta=None, seed=1):
    truth = simulation.truth(L, seed, eta=eta)
    plan = simulation.mixtures(L, 3, 1, 6, 6, np.random.default_rng(seed))
    runs = load_runs(simulation.table(truth, plan, seed, checkpoints=8, rho=0.4))
    return runs, fit_joint(runs, truth.families)


def test_a_wrong_form_is_told_from_noise():
    (_, right), (_, wrong) = study(), study(eta=0.5)
    assert right.misfit < 0.007 < 0.014 < wrong.misfit
    assert wrong.run_noise == pytest.approx(np.hypot(wrong.sigma, wrong.misfit))
    assert json.loads(json.dumps(wrong.to_json()))["misfit"] == wrong.misfit


def test_the_interval_of_a_new_run_has_its_noise_and_the_misfit():
    runs, fit = study(eta=0.5)
    point = runs.N[:3], *(a[:3] for a in runs.aligned(fit.sources)), runs.target[:3]
    (loss, deviation), (low, high) = fit.predict(*point), fit.run_interval(*point)
    expected = 1.6448536 * np.sqrt((deviation / loss) ** 2 + fit.sigma**2 + fit.misfit**2)
    np.testing.assert_allclose(np.log(high / loss), expected, rtol=1e-6)
    np.testing.assert_allclose(np.log(loss / low), expected, rtol=1e-6)


def test_runs_of_most_compute_and_of_most_languages_are_asked_at_their_ends():
    runs, fit = study()
    rows, weight = fit.record.rows, fit.record.state.noise.run_weight
    largest, richest = ({runs.run_ids[i] for i in np.flatnonzero(held)} for held in _unlike(rows, weight))
    frame = runs.evaluations().assign(flops=runs.N * runs.total_tokens, present=(runs.shares > 0).sum(1))
    by_run = frame.groupby("run")[["flops", "present"]].max()
    assert largest == set(by_run.flops.nlargest(len(by_run) // 5).index)
    assert 0 < len(richest) <= len(by_run) // 5 and by_run.present[list(richest)].min() == L
    held = np.isin(runs.run_ids, list(largest))
    asked = _asked(rows, np.pad(held, (0, len(weight) - len(held))))
    ends = frame[frame.run.isin(largest) & (frame.tokens == frame.groupby("run").tokens.transform("max"))]
    assert asked.sum() == len(ends) and set(_runs_of(rows)[asked]) == set(np.flatnonzero(held))


def test_nothing_is_asked_where_runs_are_alike_or_the_others_tell_too_little():
    truth = simulation.truth(L, 0)
    plan = [("uniform", np.full(L, 1 / L))] * 12 + [("mono", np.eye(L)[0])] * 12
    runs = load_runs(simulation.table(truth, plan, 0, checkpoints=1, same=True))
    fit = fit_joint(runs)
    assert list(_unlike(fit.record.rows, fit.record.state.noise.run_weight)) == [] and fit.misfit == 0.0
    held = np.zeros(len(fit.record.state.noise.run_weight), bool)
    held[runs.run[(runs.shares > 0).sum(1) == L]] = True
    assert set(np.nonzero(_asked(fit.record.rows, held))[0]) == {0}


def test_excess_is_of_the_errors_beyond_noise():
    rng, run = np.random.default_rng(0), np.arange(4000) // 4
    variance = rng.uniform(0.5, 2.0, 4000)
    assert _excess(rng.normal(size=4000) * np.sqrt(variance), variance, run) < 0.1
    wide = rng.normal(size=4000) * np.sqrt(variance + 3.0)
    assert _excess(wide, variance, run) == pytest.approx(3.0, rel=0.1)
    stray = np.where(np.arange(4000) == 0, 1e6, wide)
    assert _excess(stray, variance, run) == pytest.approx(3.0, rel=0.1)
    together = _excess(np.repeat(wide[::4], 4), variance, run)
    assert together > _excess(np.repeat(wide[::4], 4), variance, np.arange(4000))  # four rows of a run tell as one
    assert _excess(np.array([9.0]), np.ones(1), np.zeros(1, int)) == 0.0
