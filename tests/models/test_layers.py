import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.layers import FeedForward, linear, make_rotation, rms_norm, rotate, weight


def test_rms_norm_is_computed_in_float32():
    x = jnp.array([[3e4, 4e4]], jnp.float32)
    np.testing.assert_allclose(rms_norm(x), x / np.sqrt(12.5e8), rtol=1e-6)
    # The squares overflow float16, and bfloat16 keeps its dtype.
    assert np.all(np.isfinite(rms_norm(x.astype(jnp.float16))))
    assert rms_norm(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_rotation_depends_on_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def dot(t, s):
        q_t = rotate(q, make_rotation(jnp.array([[t]]), 8, 10000.0))
        return jnp.sum(q_t * rotate(k, make_rotation(jnp.array([[s]]), 8, 10000.0)))

    np.testing.assert_allclose(dot(5, 2), dot(105, 102), rtol=1e-4)
    assert abs(dot(5, 2) - dot(5, 3)) > 1e-3


def test_rotation_angles():
    rotated = rotate(jnp.ones((1, 1, 1, 4)), make_rotation(jnp.array([[3]]), 4, 100.0))[0, 0, 0]
    angles = np.array([3.0, 0.3])
    expected = np.concatenate([np.cos(angles) - np.sin(angles), np.cos(angles) + np.sin(angles)])
    np.testing.assert_allclose(rotated, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "equation, x_shape, w_shape",
    [
        ("bti,io->bto", (2, 3, 4), (4, 5)),
        ("bti,iho->btho", (2, 3, 4), (4, 2, 3)),
        ("bthi,hio->bto", (2, 3, 2, 4), (2, 4, 5)),
    ],
)
def test_linear_is_the_contraction_it_names(equation, x_shape, w_shape):
    x = jax.random.normal(jax.random.key(0), x_shape)
    w = nnx.Param(jax.random.normal(jax.random.key(1), w_shape))
    actual = linear(x, w, inputs=len(x_shape) - 2)
    np.testing.assert_allclose(actual, jnp.einsum(equation, x, w[...]), rtol=1e-5, atol=1e-5)


def test_weights_have_their_deviation_and_are_truncated():
    w = weight(nnx.Rngs(0), (64, 256), ("embed", "mlp"), fan_in=64, gain=0.5)[...]
    np.testing.assert_allclose(jnp.std(w), 0.5 / 8, rtol=0.03)
    assert jnp.max(jnp.abs(w)) <= 2 / 0.8796 * 0.5 / 8


def test_feed_forward_is_swiglu(tiny):
    module = FeedForward(tiny(), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 3, 16))
    gate = x @ module.gate[...]
    expected = (gate / (1 + jnp.exp(-gate)) * (x @ module.up[...])) @ module.down[...]
    np.testing.assert_allclose(module(x), expected, rtol=1e-4, atol=1e-6)
