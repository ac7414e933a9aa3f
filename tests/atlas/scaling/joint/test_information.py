"""Expected variances against the covariance of the precision matrix written out in full, and against real fits."""

import jax
import numpy as np
import pandas as pd
import pytest

from atlas.scaling import fit_joint, load_runs, simulation
from atlas.scaling.joint import system
from atlas.scaling.joint.information import Information, PlannedRuns
from atlas.scaling.noise import HUBER_VARIANCE

L = 4
PARTS = tuple(np.geomspace(0.05, 1.0, 10).tolist())
POINT = {"N": 2e10, "D": np.array([4e11, 2e11, 3e11, 1e11]), "U": np.full(L, 1e11), "target": ["l1", "l3"]}


def study(seed=0):
    truth = simulation.truth(L, seed)
    plan = simulation.mixtures(L, 2, 1, 3, 0, np.random.default_rng(seed))
    return truth, simulation.table(truth, plan, seed, rho=0.4, checkpoints=6)


def candidates(truth, count=20, seed=0):
    rng = np.random.default_rng(seed)
    shares = (
        np.where(rng.random((count, L)) < 0.6, rng.dirichlet(np.ones(L), count), 0.0)
        + 0.2 * np.eye(L)[np.arange(count) % L]
    )
    D = np.exp(rng.uniform(np.log(1e10), np.log(3e11), (count, 1))) * shares / shares.sum(1, keepdims=True)
    return PlannedRuns(
        np.exp(rng.uniform(np.log(1e8), np.log(8e9), count)), D, np.broadcast_to(truth.U, D.shape), PARTS
    )


@pytest.fixture(scope="module", params=["target", pytest.param("source", marks=pytest.mark.thorough)])
def fitted(request):
    truth, table = study()
    return truth, fit_joint(load_runs(table), truth.families, lambda_kind=request.param)


def row_slopes(fit, N, D, U, target):
    """Slopes [n, all parameters] of log losses."""
    t, p = fit.record.theta.shape
    q = fit.record.precision.corner.shape[0]
    points, _ = fit.points(N, D, U, target)
    found = np.zeros((len(points.N), t * p + q))
    with jax.enable_x64(True):
        slopes = np.asarray(system.slopes(fit.record.theta, fit.record.direct, *points)[1])
    for i, own in enumerate(points.target):
        found[i, own * p : (own + 1) * p] = slopes[i, :p]
        found[i, t * p : t * p + len(fit.record.direct)] = slopes[i, p:]
    return found


def information_of(fit, runs, index):
    """Fisher information of one planned run, from the covariance matrix of its checkpoints' noise."""
    total = 0.0
    parts = np.array(runs.checkpoints)
    for t in np.flatnonzero(runs.D[index, : len(fit.targets)] > 0):
        J = row_slopes(fit, runs.N[index], parts[:, None] * runs.D[index], runs.U[index], np.full(len(parts), t))
        noise = (
            fit.sigma**2 * HUBER_VARIANCE * ((1 - fit.rho) * np.eye(len(parts)) + fit.rho * np.ones((len(parts),) * 2))
        )
        total = total + J.T @ np.linalg.solve(noise, J)
    return total


def test_expected_variance_is_that_of_the_full_matrix(fitted):
    truth, fit = fitted
    runs, knowledge = candidates(truth), Information.of(fit)
    found = knowledge.expected_variance(runs, **POINT)
    assert found.shape == (len(runs), 2)
    c = row_slopes(fit, **POINT)
    full = fit.record.precision.dense()
    for i in (0, 1, 7, 19):
        expected = np.diag(c @ np.linalg.solve(full + information_of(fit, runs, i), c.T))
        np.testing.assert_allclose(found[i], expected, rtol=1e-6)
    assert (found <= knowledge.variance(**POINT) * (1 + 1e-9)).all()
    assert found.min() < 0.9 * knowledge.variance(**POINT).max()


def test_adding_runs_one_by_one_is_adding_them_together(fitted):
    truth, fit = fitted
    runs, knowledge = candidates(truth, 3), Information.of(fit)
    together = knowledge.adding(runs)
    one_by_one = knowledge
    for i in range(3):
        one_by_one = one_by_one.adding(runs.take([i]))
    for ours, theirs in zip(together.precision, one_by_one.precision, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    last = knowledge.adding(runs.take([0, 1])).expected_variance(runs.take([2]), **POINT)
    np.testing.assert_allclose(together.variance(**POINT), last[0], rtol=1e-8)


def test_nothing_added_is_the_fit(fitted):
    _, fit = fitted
    knowledge = Information.of(fit)
    loss, deviation = fit.predict(**POINT)
    np.testing.assert_allclose(np.sqrt(knowledge.variance(**POINT)) * loss, deviation, rtol=1e-9)


@pytest.mark.thorough
def test_the_promise_is_kept_when_the_runs_are_trained():
    truth, table = study()
    fit = fit_joint(load_runs(table), truth.families)
    promised = Information.of(fit)
    shares = [np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.2, 0.6, 0.1, 0.1])]
    plan = [("dirichlet", s) for s in shares for _ in range(4)]
    more = simulation.table(truth, plan, 7, rho=0.4, checkpoints=6)
    more["run"] = "new" + more["run"]
    last = more.groupby("run").tail(1)
    D = last[[f"tokens.{name}" for name in truth.languages]].to_numpy()
    runs = PlannedRuns(
        last["num_params"].to_numpy(), D, np.broadcast_to(truth.U, D.shape), tuple(np.geomspace(0.05, 1, 6))
    )
    promised = np.sqrt(promised.adding(runs).variance(**POINT))
    after = fit_joint(load_runs(pd.concat([table, more])), truth.families)
    loss, deviation = after.predict(**POINT)
    np.testing.assert_allclose(promised, deviation / loss, rtol=0.35)
    assert (promised < 0.7 * np.sqrt(Information.of(fit).variance(**POINT))).all()
