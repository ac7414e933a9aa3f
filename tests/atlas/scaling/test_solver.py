import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas.scaling.solver import Arrow, Coordinates, damped, factor, levenberg_marquardt


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def arrow(t=3, p=4, q=2):
    rng = np.random.default_rng(0)
    J = rng.normal(size=(t, 20, p))
    S = rng.normal(size=(t, 20, q))
    blocks, border = np.einsum("trp,trk->tpk", J, J), np.einsum("trp,trq->tpq", J, S)
    return Arrow(*map(jnp.asarray, (blocks, border, np.einsum("trq,trk->qk", S, S) + np.eye(q))))


def dense(matrix):
    t, p, q = matrix.border.shape
    full = np.zeros((t * p + q, t * p + q))
    for i in range(t):
        rows = slice(i * p, (i + 1) * p)
        full[rows, rows] = matrix.blocks[i]
        full[rows, t * p :] = matrix.border[i]
        full[t * p :, rows] = matrix.border[i].T
    full[t * p :, t * p :] = matrix.corner
    return full


def test_arrow_solve_and_determinant_equal_the_dense_ones():
    matrix = arrow()
    right = Coordinates(jnp.arange(12.0).reshape(3, 4), jnp.array([1.0, -2.0]))
    found = factor(matrix).solve(matrix, right)
    expected = np.linalg.solve(dense(matrix), np.concatenate([right.own.ravel(), right.shared]))
    np.testing.assert_allclose(np.concatenate([found.own.ravel(), found.shared]), expected, rtol=1e-8)
    np.testing.assert_allclose(factor(matrix).log_determinant(), np.linalg.slogdet(dense(matrix))[1], rtol=1e-10)


def test_damping_adds_to_the_diagonal_alone():
    matrix = arrow()
    t, p, q = matrix.border.shape
    extra = np.arange(1.0, 1.0 + t * p + q)
    more = dense(damped(matrix, Coordinates(jnp.array(extra[: t * p].reshape(t, p)), jnp.array(extra[t * p :]))))
    np.testing.assert_allclose(more - dense(matrix), np.diag(extra), atol=1e-12)


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
