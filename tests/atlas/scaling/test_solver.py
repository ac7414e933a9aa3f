import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas.scaling.solver import levenberg_marquardt


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_descent_crosses_a_curved_valley():
    def residual(x):
        return jnp.array([10.0 * (x[1] - x[0] ** 2), 1.0 - x[0]])

    def evaluate(x):
        J = jax.jacfwd(residual)(x)
        return 0.5 * jnp.sum(residual(x) ** 2), J.T @ residual(x), J.T @ J

    def solve(hessian, gradient, damping):
        return jnp.linalg.solve(hessian + damping * jnp.diag(jnp.diagonal(hessian)), gradient)

    end = levenberg_marquardt(evaluate, solve, jnp.array([-1.2, 1.0]), 100, 1e-20)
    np.testing.assert_allclose(end.x, [1.0, 1.0], rtol=1e-9)
    assert end.decrement < 1e-20 and end.iterations < 100


def test_descent_refuses_points_where_the_objective_is_not_finite():
    def evaluate(x):
        return -jnp.log(1.0 - x) - x, 1.0 / (1.0 - x) - 1.0, jnp.float64(0.01)

    end = levenberg_marquardt(evaluate, lambda h, g, d: g / (h * (1.0 + d)), jnp.float64(0.9), 200, 1e-16)
    assert abs(end.x) < 1e-5


def test_a_descent_that_is_stopped_has_no_small_decrement():
    """x² from 3, not to be had below 1: every further step is refused, however much it is damped."""

    def evaluate(x):
        return jnp.where(x < 1.0, jnp.nan, x**2), 2.0 * x, jnp.float64(2.0)

    end = levenberg_marquardt(evaluate, lambda h, g, d: g / (h * (1.0 + d)), jnp.float64(3.0), 200, 1e-16)
    assert end.x == pytest.approx(1.0) and end.decrement > 1.0
