"""Correlation within runs against dense multivariate normals, and robust weights against what they are for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas.scaling import noise

SIZES = np.array([[4, 1, 3, 2], [1, 5, 2, 0]])  # rows of each group of two targets; the second has one group fewer
ROWS = 12  # of which the last of each target are padding


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def groups(trust=None) -> noise.Groups:
    index = np.zeros((2, ROWS), int)
    weight = np.zeros((2, ROWS))
    for target, sizes in enumerate(SIZES):
        index[target, : sizes.sum()] = np.repeat(np.arange(4), sizes)
        weight[target, : sizes.sum()] = 1.0
    trust = np.ones_like(SIZES, float) if trust is None else trust
    return noise.Groups(*map(jnp.asarray, (index, weight, SIZES, trust)))


def drawn(seed: int = 0):
    random = np.random.default_rng(seed)
    return jnp.asarray(random.normal(size=(2, ROWS))), jnp.asarray(random.normal(size=(2, ROWS, 3)))


def dense(target: int, rho: float, trust=None) -> tuple[np.ndarray, int]:
    """Correlation of a target's rows, the inverse weighted by trust where it is given."""
    index = np.repeat(np.arange(4), SIZES[target])
    same = index[:, None] == index
    correlation = rho * same + (1.0 - rho) * np.eye(len(index))
    return (correlation if trust is None else np.linalg.inv(correlation) * trust[target][index]), len(index)


@jax.jit
def whitened(residual, jacobian, of, rho):
    return noise.whitened(noise.sums(residual, jacobian, of), of, rho), noise.log_determinant(of, rho)


@pytest.mark.parametrize("rho", [0.0, 0.4, 0.9])
def test_whitened_sums_are_those_of_the_inverse_correlation(rho):
    trust = np.array([[1.0, 0.5, 0.2, 1.0], [0.0, 1.0, 0.7, 1.0]])
    residual, jacobian = drawn()
    of = groups(jnp.asarray(trust))
    (square, gradient, hessian), log_determinant = whitened(residual, jacobian, of, rho)
    determinant = 0.0
    for target in range(2):
        inverse, rows = dense(target, rho, trust)
        r, J = np.asarray(residual)[target, :rows], np.asarray(jacobian)[target, :rows]
        np.testing.assert_allclose(square[target], r @ inverse @ r * (1.0 - rho))
        np.testing.assert_allclose(gradient[target], J.T @ inverse @ r * (1.0 - rho), atol=1e-12)
        np.testing.assert_allclose(hessian[target], J.T @ inverse @ J * (1.0 - rho), atol=1e-12)
        for m, weight in zip(SIZES[target], trust[target], strict=True):
            determinant += weight * np.linalg.slogdet(rho * np.ones((m, m)) + (1.0 - rho) * np.eye(m))[1]
    np.testing.assert_allclose(log_determinant, determinant, atol=1e-12)


@functools.partial(jax.jit, static_argnames="solve")
def estimate(sums, of, grid, variance, solve=noise.solve_freely):
    return noise.estimate(sums, of, solve, grid, variance)


GAP = np.array([0.5, -1.0, 0.2])  # of the present point from a prior's mean


@functools.cache
def with_prior(deviation):
    """The optimum under a normal prior on each parameter."""

    def solve(gradient, hessian, scale):
        posterior = hessian / scale + jnp.eye(3) / deviation**2
        step = jnp.linalg.solve(posterior, gradient / scale - GAP / deviation**2)
        used = jnp.trace(jnp.linalg.solve(posterior, hessian)) / scale
        drop, penalty = 2.0 * step @ gradient - step @ hessian @ step, 0.5 * jnp.sum((GAP + step) ** 2) / deviation**2
        return noise.Solved(drop, penalty, jnp.linalg.slogdet(posterior)[1], used)

    return solve


def one_target():
    of = jax.tree.map(lambda a: a[0], groups())
    residual, jacobian = (a[0] for a in drawn(3))
    return of, residual, jacobian, noise.sums(residual, jacobian, of)


@pytest.mark.parametrize("deviation", [None, 0.3, 3.0])
def test_the_score_is_the_exact_likelihood_of_a_linear_law(deviation):
    """Without a prior the restricted likelihood; with one the marginal, in which a prior relative to σ would differ."""
    of, residual, jacobian, sums = one_target()
    precision = np.zeros((3, 3)) if deviation is None else np.eye(3) / deviation**2
    solve = noise.solve_freely if deviation is None else with_prior(deviation)
    found, exact = [], []
    for rho in (0.0, 0.3, 0.6, 0.9):
        at = estimate(sums, of, jnp.array([rho]), 0.5, solve)
        correlation, rows = dense(0, rho)
        y, X = np.asarray(residual)[:rows], np.asarray(jacobian)[:rows]
        found.append(float(at.score))
        exact.append(minus_two_log_likelihood(y, X, float(at.variance) * correlation, precision))
    assert np.ptp(np.array(found) - exact) < 1e-9


def minus_two_log_likelihood(y, X, covariance, precision):
    """Of y = X·step + noise, restricted to what X cannot reach where there is no prior around −GAP."""
    if not precision.any():
        outside = np.linalg.svd(X.T)[2][X.shape[1] :]
        y, covariance, X = outside @ y, outside @ covariance @ outside.T, np.zeros((len(outside), 3))
    else:
        covariance, y = covariance + X @ np.linalg.inv(precision) @ X.T, y + X @ GAP
    return y @ np.linalg.solve(covariance, y) + np.linalg.slogdet(covariance)[1]


def test_without_a_prior_the_variance_is_the_restricted_maximum():
    of, residual, jacobian, sums = one_target()
    at = estimate(sums, of, jnp.array([0.4]), 7.0)
    correlation, rows = dense(0, 0.4)
    y, X = np.asarray(residual)[:rows], np.asarray(jacobian)[:rows]
    score = lambda variance: minus_two_log_likelihood(y, X, variance * correlation, np.zeros((3, 3)))  # noqa: E731
    variance = float(at.variance)
    assert score(variance) < min(score(1.001 * variance), score(0.999 * variance))


def test_correlation_is_recovered_and_rows_alone_do_not_show_any():
    random = np.random.default_rng(0)
    index = np.repeat(np.arange(300), 6)
    values = np.sqrt(0.4) * random.normal(size=300)[index] + np.sqrt(0.6) * random.normal(size=1800)
    ones = jnp.ones((1800, 1))
    grid = jnp.linspace(0.0, 0.95, 20)
    for which, size in ((index, 6), (np.arange(1800), 1)):
        count = 1800 // size
        of = noise.Groups(jnp.asarray(which), jnp.ones(1800), jnp.full(count, float(size)), jnp.ones(count))
        found = estimate(noise.sums(jnp.asarray(values), ones, of), of, grid, 1.0)
        assert float(found.rho) == pytest.approx(0.4 if size > 1 else 0.0, abs=0.06)
        np.testing.assert_allclose(found.variance, 1.0, rtol=0.08)
    assert float(noise.independent_rows(of, 0.5)) == 1800


def test_exact_rows_leave_the_least_variance():
    of, _, jacobian, _ = one_target()
    sums = noise.sums(jacobian @ jnp.array([1.0, 2.0, 3.0]), jacobian, of)
    found = estimate(sums, of, jnp.array([0.0, 0.5]), 1.0)
    assert float(found.variance) == noise.LEAST_VARIANCE and np.isfinite(found.score)


def test_winsorised_residuals_have_the_moments_that_are_booked():
    x = np.random.default_rng(0).normal(size=200_000)
    told = noise.winsorised(x, noise.HUBER)
    assert float(jnp.var(told)) == pytest.approx(noise.HUBER_VARIANCE, rel=0.01)
    assert float(jnp.mean(noise.winsorised_slope(x, noise.HUBER))) == pytest.approx(1.0, rel=0.01)
    assert float(noise.deviation(jnp.asarray(x), jnp.asarray(x) > -9)) == pytest.approx(1.0, rel=0.01)


def test_a_run_astray_loses_its_say_on_all_targets():
    residual, _ = drawn()
    of, run = groups(), jnp.array([[0, 1, 2, 3], [1, 2, 4, 4]])
    astray = jnp.where(jnp.take_along_axis(run, of.index, -1) == 2, 9.0, 0.0)
    weights = noise.run_weights(residual + astray, of, run, 6, jnp.float64(1.0), jnp.float64(0.3))
    assert float(weights[2]) == 0.0 and float(weights[5]) == 1.0
    assert (weights[jnp.array([0, 1, 3, 4])] > 0.3).all()
