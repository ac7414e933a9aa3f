import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas.scaling.joint.arrow import Arrow, Coordinates, damped, factor


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


def test_arrow_solve_and_determinant_equal_the_dense_ones():
    matrix = arrow()
    right = Coordinates(jnp.arange(12.0).reshape(3, 4), jnp.array([1.0, -2.0]))
    found = factor(matrix).solve(matrix, right)
    expected = np.linalg.solve(matrix.dense(), np.concatenate([right.own.ravel(), right.shared]))
    np.testing.assert_allclose(np.concatenate([found.own.ravel(), found.shared]), expected, rtol=1e-8)
    np.testing.assert_allclose(factor(matrix).log_determinant(), np.linalg.slogdet(matrix.dense())[1], rtol=1e-10)


def test_damping_adds_to_the_diagonal_alone():
    matrix = arrow()
    t, p, q = matrix.border.shape
    extra = np.arange(1.0, 1.0 + t * p + q)
    more = damped(matrix, Coordinates(jnp.array(extra[: t * p].reshape(t, p)), jnp.array(extra[t * p :]))).dense()
    np.testing.assert_allclose(more - matrix.dense(), np.diag(extra), atol=1e-12)
