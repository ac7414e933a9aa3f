"""Derivatives and influence of the joint fit against fits of changed data, noise and priors held."""

import dataclasses

import jax
import numpy as np
import pandas as pd
import pytest

from atlas.errors import UserError
from atlas.scaling import fit_joint, load_runs, simulation
from atlas.scaling.joint import rounds as refinement
from atlas.scaling.joint import system as posterior
from atlas.scaling.joint.fit import rows_by_target
from atlas.scaling.joint.influence import influence, parameter_gradients, prediction_gradients
from atlas.scaling.joint.prior import joint_prior
from atlas.scaling.joint.verdicts import log_law

L = 4
FAMILIES = simulation.truth(L, 0).families
POINT = {"N": 2e10, "D": [4e11, 2e11, 3e11, 1e11], "U": np.full(L, 1e11), "target": ["l1", "l3"]}
NAMES = ["phi", "E[l2]", "A[l1]", "alpha[l0]", "B[l3]", "lambda[{}l1]", "tau[l1<-l0]", "tau[l2<-l3]"]


def names(fit):
    return [name.format("" if fit.source_lambda is None else "<-") for name in NAMES]


def study(seed=0):
    law = simulation.truth(L, seed, phi=0.05)
    plan = simulation.mixtures(L, 4, 2, 8, 6, np.random.default_rng(seed))
    frame = simulation.table(law, plan, seed, rho=0.4, checkpoints=6, diverged=0.05)
    untrained = frame[frame["mixture"] == "mono"].iloc[::50].assign(language="l3")
    return law, load_runs(frame), untrained


@pytest.fixture(scope="module")
def fitted():
    law, runs, _ = study()
    return runs, fit_joint(runs, law.families)


@pytest.fixture(scope="module")
def by_source():
    law, runs, _ = study()
    return runs, fit_joint(runs, law.families, lambda_kind="source")


def again(fit, log_shift=0.0, without=None):
    """The fit with its noise, weights and priors, after log losses moved or a run lost its weight."""
    record = fit.record
    runs = dataclasses.replace(record.runs, loss=record.runs.loss * np.exp(log_shift))
    rows, state = rows_by_target(runs, fit.N0, fit.D0), record.state
    if without is not None:
        weight = state.noise.run_weight.copy()
        weight[runs.run_ids.index(without)] = 0.0
        state = state._replace(noise=state.noise._replace(run_weight=weight))
    kind = "target" if fit.source_lambda is None else "source"
    spreads = joint_prior(record.runs, FAMILIES, None, "targets", kind, True)[1]  # not read while priors are held
    with jax.enable_x64(True):
        linear = posterior.linearise(state, rows, fit.guard)
        state = refinement.settle(state, linear, rows, spreads, fit.guard, 1e-11).state
        theta, shared = (np.asarray(part) for part in state.x)
    direct = shared[: len(fit.direct)]
    rates = np.exp(direct[1:]) if len(direct) > 1 else None
    return dataclasses.replace(fit, theta=theta, phi=float(direct[0]), source_lambda=rates)


def values(fit):
    """log losses at POINT, then NAMES, positive ones as logarithms."""
    found = list(np.log(fit.predict(**POINT)[0]))
    for name in names(fit):
        key, _, label = name.rstrip("]").partition("[")
        if key == "phi":
            found.append(fit.phi)
        elif key == "tau":
            target, source = label.split("<-")
            found.append(fit.theta[fit.targets.index(target), 6 + fit.sources.index(source)])
        elif key == "lambda" and fit.source_lambda is not None:
            found.append(np.log(fit.source_lambda[fit.sources.index(label.removeprefix("<-"))]))
        else:
            levels, _ = log_law(fit.theta[fit.targets.index(label)], (fit.N0, fit.D0))
            found.append(levels[["E", "A", "alpha", "B", "beta", "lambda"].index(key)])
    return np.array(found)


@pytest.mark.parametrize("kind", ["fitted", pytest.param("by_source", marks=pytest.mark.thorough)])
def test_gradients_are_those_of_refits(kind, request):
    runs, fit = request.getfixturevalue(kind)
    found = np.concatenate([prediction_gradients(fit, **POINT), parameter_gradients(fit, names(fit))])
    assert found.shape == (2 + len(NAMES), len(runs))
    direction = np.random.default_rng(0).normal(size=len(runs))
    step = 1e-6
    moved = [values(again(fit, sign * step * direction)) for sign in (1.0, -1.0)]
    numeric = (moved[0] - moved[1]) / (2.0 * step)
    np.testing.assert_allclose(found @ direction, numeric, rtol=1e-4)


def test_gradient_of_one_row_is_in_its_place(fitted):
    runs, fit = fitted
    found = prediction_gradients(fit, **POINT)
    row, step = int(np.argmax(np.abs(found[1]))), 1e-5
    moved = [values(again(fit, sign * step * (np.arange(len(runs)) == row)))[:2] for sign in (1.0, -1.0)]
    np.testing.assert_allclose(found[:, row], (moved[0] - moved[1]) / (2.0 * step), rtol=1e-4)


def test_influence_is_what_refits_without_a_run_show(fitted):
    runs, fit = fitted
    found = influence(fit, **POINT)
    assert list(found.columns) == ["loss_0", "loss_1"] and set(found.index) == set(runs.run_ids)
    some = found.index[:: max(len(found) // 12, 1)]
    base = values(fit)[:2]
    refits = np.array([values(again(fit, without=run))[:2] - base for run in some])
    for i in range(2):
        assert np.corrcoef(found.loc[some].to_numpy()[:, i], refits[:, i])[0, 1] > 0.99
    np.testing.assert_allclose(found.loc[some].to_numpy(), refits, rtol=0.1, atol=0.05 * np.abs(refits).max())


def test_rows_left_out_have_no_say():
    law, runs, untrained = study()
    mixed = load_runs(pd.concat([untrained, runs.frame]))
    fit = fit_joint(mixed, law.families)
    found = prediction_gradients(fit, **POINT)
    used = fit.record.used
    assert not used[: len(untrained)].all() and used.sum() == fit.n_rows
    assert (found[:, ~used] == 0.0).all() and found[:, used].any()
    np.testing.assert_allclose(found[:, used], prediction_gradients(fit_joint(runs, law.families), **POINT), rtol=1e-3)


def test_unknown_parameters_are_named(fitted):
    with pytest.raises(UserError, match="unknown parameter 'tau'"):
        parameter_gradients(fitted[1], ["tau"])
