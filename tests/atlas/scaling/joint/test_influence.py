"""Derivatives and influence of the joint fit against fits of changed data, noise and priors held."""

import numpy as np
import pandas as pd
import pytest

from atlas.scaling import fit_joint, load_runs, simulation
from atlas.scaling.joint.influence import influence, prediction_gradients, refit

L = 4
POINT = {"N": 2e10, "D": [4e11, 2e11, 3e11, 1e11], "U": np.full(L, 1e11), "target": ["l1", "l3"]}


def study(seed=0):
    truth = simulation.truth(L, seed, phi=0.05)
    plan = simulation.mixtures(L, 4, 2, 8, 6, np.random.default_rng(seed))
    frame = simulation.table(truth, plan, seed, rho=0.4, checkpoints=6, diverged=0.05)
    untrained = frame[frame["mixture"] == "mono"].iloc[::50].assign(language="l3")
    return truth, load_runs(frame), untrained


@pytest.fixture(scope="module")
def fitted():
    truth, runs, _ = study()
    return runs, fit_joint(runs, truth.families)


@pytest.fixture(scope="module")
def by_source():
    truth, runs, _ = study()
    return runs, fit_joint(runs, truth.families, lambda_kind="source")


def values(fit):
    return np.log(fit.predict(**POINT)[0])


def without(fit, run):
    weight = fit.record.state.noise.run_weight.copy()
    weight[fit.record.runs.run_ids.index(run)] = 0.0
    return weight


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["fitted", "by_source"])
def test_gradients_are_those_of_refits(kind, request):
    runs, fit = request.getfixturevalue(kind)
    found = prediction_gradients(fit, **POINT)
    assert found.shape == (2, len(runs))
    direction = np.random.default_rng(0).normal(size=len(runs))
    step = 1e-6
    moved = [values(refit(fit, sign * step * direction)) for sign in (1.0, -1.0)]
    numeric = (moved[0] - moved[1]) / (2.0 * step)
    np.testing.assert_allclose(found @ direction, numeric, rtol=1e-4)


def test_gradient_of_one_row_is_in_its_place(fitted):
    runs, fit = fitted
    found = prediction_gradients(fit, **POINT)
    row, step = int(np.argmax(np.abs(found[1]))), 1e-5
    moved = [values(refit(fit, sign * step * (np.arange(len(runs)) == row))) for sign in (1.0, -1.0)]
    np.testing.assert_allclose(found[:, row], (moved[0] - moved[1]) / (2.0 * step), rtol=1e-4)


def test_influence_is_what_refits_without_a_run_show(fitted):
    runs, fit = fitted
    found = influence(fit, **POINT)
    assert list(found.columns) == ["loss_0", "loss_1"] and set(found.index) == set(runs.run_ids)
    some = found.index[:: max(len(found) // 12, 1)]
    base = values(fit)
    refits = np.array([values(refit(fit, run_weight=without(fit, run))) - base for run in some])
    for i in range(2):
        assert np.corrcoef(found.loc[some].to_numpy()[:, i], refits[:, i])[0, 1] > 0.99
    np.testing.assert_allclose(found.loc[some].to_numpy(), refits, rtol=0.1, atol=0.05 * np.abs(refits).max())


def test_rows_left_out_have_no_say():
    truth, runs, untrained = study()
    mixed = load_runs(pd.concat([untrained, runs.frame]))
    fit = fit_joint(mixed, truth.families)
    found = prediction_gradients(fit, **POINT)
    used = fit.record.used
    assert not used[: len(untrained)].all() and used.sum() == fit.n_rows
    assert (found[:, ~used] == 0.0).all() and found[:, used].any()
    np.testing.assert_allclose(
        found[:, used], prediction_gradients(fit_joint(runs, truth.families), **POINT), rtol=1e-3
    )
