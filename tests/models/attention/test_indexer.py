import jax
import jax.numpy as jnp
import numpy as np

from models.attention.indexer import divergence, index_scores, score_variance
from models.attention.keys import in_documents, visible_keys
from tests.models.attention.inputs import make_inputs, make_segments

B, T = 2, 12


def test_index_scores_follow_their_equation():
    index = make_inputs(T=T)[3]
    q, k, gate, bias = (np.asarray(a) for a in index)
    expected = np.zeros((B, T, T))
    for b, t, s, j in np.ndindex(B, T, T, 2):
        dot = 0.4 * q[b, t, j] @ k[b, s] + bias[j]
        expected[b, t, s] += gate[b, t, j] / (1 + np.exp(-dot))
    scores = index_scores(index, 0.4)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert scores.dtype == jnp.float32


def test_variance_is_that_of_the_visible_scores():
    scores = jax.random.uniform(jax.random.key(1), (B, T, T)) + 100
    visible = visible_keys(in_documents(make_segments("documents", B, T)), jnp.arange(T))
    variance = score_variance(scores, visible)
    for b, t in np.ndindex(B, T):
        seen = np.asarray(scores[b, t], np.float64)[np.asarray(visible[b, t])]
        np.testing.assert_allclose(variance[b, t], np.var(seen), rtol=1e-3, atol=1e-9)


def test_divergence_against_numpy():
    rng = np.random.default_rng(0)
    target = rng.dirichlet(np.ones(T), (B, T)) * (rng.random((B, T, T)) < 0.7)
    logits, chosen = rng.standard_normal((B, T, T)), target > 0
    target = target / target.sum(-1, keepdims=True)
    normaliser = np.log(np.sum(np.exp(logits), axis=-1, where=chosen))
    actual = divergence(*(jnp.asarray(a, jnp.float32) for a in (target, logits, normaliser)))
    for b, t in np.ndindex(B, T):
        x, y = target[b, t, chosen[b, t]], np.exp(logits[b, t, chosen[b, t]])
        np.testing.assert_allclose(actual[b, t], np.sum(x * np.log(x / (y / y.sum()))), rtol=1e-4, atol=1e-5)
