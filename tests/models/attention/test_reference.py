import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import reference

B, T, H, G, E, J = 2, 12, 4, 2, 6, 2
INDEXER_WIDTH = 5
SEGMENTS = jnp.array([[0] * 12, [0] * 3 + [1] * 4 + [2] * 5])


def make_inputs(seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), 6)
    q = jax.random.normal(keys[0], (B, T, H, E), dtype)
    k, v = jax.random.normal(keys[1], (2, B, T, G, E), dtype)
    index = reference.IndexInputs(
        jax.random.normal(keys[2], (B, T, J, INDEXER_WIDTH), dtype),
        jax.random.normal(keys[3], (B, T, INDEXER_WIDTH), dtype),
        jax.nn.sigmoid(jax.random.normal(keys[4], (B, T, J), dtype)),
        jax.random.normal(keys[5], (J,), dtype),
    )
    return q, k, v, index


def make_selection(**fields):
    base = {"scale": 0.4, "temperature": 0.5, "k_rule": "fixed", "k_base": 3, "k_min": 1, "k_max": 6}
    return reference.Selection(**base | fields)


@functools.partial(jax.jit, static_argnames=("k_rule", "k_base", "keep_first", "keep_local"))
def sparse(q, k, v, index, running=0.0, **fields):
    return reference.sparse_attention(q, k, v, index, SEGMENTS, jnp.asarray(running), make_selection(**fields))


def selected(index, running=0.0, **fields):
    return reference.select_keys(index, SEGMENTS, jnp.asarray(running), make_selection(**fields))[0]


def test_visible_is_causal_within_documents():
    visible = reference.visible_mask(SEGMENTS)
    for b, t, s in np.ndindex(B, T, T):
        assert visible[b, t, s] == (s <= t and SEGMENTS[b, s] == SEGMENTS[b, t])


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_everything_selected_is_dot_product_attention(kind):
    q, k, v, index = make_inputs()
    visible = reference.visible_mask(SEGMENTS)
    expected = jax.nn.dot_product_attention(q, k, v, mask=visible[:, None])
    output = reference.attend(q, k, v, visible)[0] if kind == "dense" else sparse(q, k, v, index, k_base=T)[0]
    np.testing.assert_allclose(output, expected, rtol=2e-5, atol=2e-6)


def test_probabilities_are_those_of_the_output():
    q, k, v, index = make_inputs()
    output, p = reference.attend(q, k, v, selected(index))
    assert p.shape == (B, G, H // G, T, T)
    np.testing.assert_allclose(jnp.sum(p, axis=-1), 1, rtol=1e-6)
    expected = jnp.einsum("bgrts,bsge->btgre", p, v).reshape(B, T, H, E)
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def test_huge_logits_do_not_overflow():
    q, k, v, _ = make_inputs()
    output, p = reference.attend(q * 1e3, k * 1e3, v, reference.visible_mask(SEGMENTS))
    assert jnp.all(jnp.isfinite(output)) and jnp.all(jnp.isfinite(p))


def test_index_scores_follow_their_equation():
    index = make_inputs()[3]
    q, k, gate, bias = (np.asarray(a) for a in index)
    expected = np.zeros((B, T, T))
    for b, t, s, j in np.ndindex(B, T, T, J):
        dot = 0.4 * q[b, t, j] @ k[b, s] + bias[j]
        expected[b, t, s] += gate[b, t, j] / (1 + np.exp(-dot))
    scores = reference.index_scores(index, 0.4)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    assert scores.dtype == jnp.float32


def test_variance_is_that_of_the_visible_scores():
    scores = jax.random.uniform(jax.random.key(1), (B, T, T)) + 100
    visible = reference.visible_mask(SEGMENTS)
    variance = reference.score_variance(scores, visible)
    for b, t in np.ndindex(B, T):
        seen = np.asarray(scores[b, t], np.float64)[np.asarray(visible[b, t])]
        np.testing.assert_allclose(variance[b, t], np.var(seen), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("rule", ["fixed", "paper", "inverse"])
def test_adaptive_k_against_numpy(rule):
    variance = np.random.default_rng(0).gamma(1.0, 0.01, (3, 50)).astype(np.float32)
    running = np.float32(0.011)
    ratio = {"fixed": np.ones_like(variance), "paper": variance / running, "inverse": running / variance}[rule]
    expected = np.floor(np.clip(np.float32(20) * ratio, 4, 32)).astype(int)
    actual = reference.adaptive_k(jnp.asarray(variance), jnp.asarray(running), rule, 20, 4, 32)
    np.testing.assert_array_equal(actual, expected)
    if rule != "fixed":
        assert {4, 32} <= set(expected.ravel()) and len(np.unique(expected)) > 10


@pytest.mark.parametrize("rule", ["paper", "inverse"])
def test_without_an_earlier_step_k_is_the_base(rule):
    k = reference.adaptive_k(jnp.array([0.0, 0.5, 9.0]), jnp.array(0.0), rule, 20, 4, 32)
    assert k.tolist() == [20, 20, 20]


def test_a_row_without_variance_has_an_extreme_k():
    assert reference.adaptive_k(jnp.zeros(1), jnp.array(0.1), "paper", 20, 4, 32).tolist() == [4]
    assert reference.adaptive_k(jnp.zeros(1), jnp.array(0.1), "inverse", 20, 4, 32).tolist() == [32]


def test_selected_keys_are_the_highest_scored():
    q, k, v, index = make_inputs()
    scores = np.asarray(reference.index_scores(index, 0.4))
    p, (_, statistics) = reference.attend(q, k, v, selected(index))[1], sparse(q, k, v, index)
    visible = np.asarray(reference.visible_mask(SEGMENTS))
    for b, t in np.ndindex(B, T):
        seen = np.flatnonzero(visible[b, t])
        best = seen[np.argsort(-scores[b, t, seen], kind="stable")][:3]
        assert set(np.flatnonzero(p[b, 0, 0, t])) == set(best)
        assert statistics.selected[b, t] == min(3, len(seen))


def test_kept_positions():
    positions = jnp.arange(T)
    keep = reference.kept_keys(positions[None], reference.first_position(SEGMENTS), positions, 1, 2)
    keep &= reference.visible_mask(SEGMENTS)
    starts = np.array([[0] * 12, [0] * 3 + [3] * 4 + [7] * 5])
    for b, t in np.ndindex(B, T):
        assert set(np.flatnonzero(keep[b, t])) == {starts[b, t], t, max(t - 1, starts[b, t])}
    q, k, v, index = make_inputs()
    p = reference.attend(q, k, v, selected(index, keep_first=1, keep_local=1))[1]
    assert np.all(np.diagonal(p[:, 0, 0], axis1=1, axis2=2) > 0)
    assert np.all(np.take_along_axis(np.asarray(p[:, 0, 0]), starts[..., None], axis=2) > 0)


def test_divergence_against_numpy():
    q, k, v, index = make_inputs()
    p, (_, statistics) = reference.attend(q, k, v, selected(index))[1], sparse(q, k, v, index)
    scores, target = np.asarray(reference.index_scores(index, 0.4)), np.asarray(p).mean((1, 2))
    for b, t in np.ndindex(B, T):
        chosen = target[b, t] > 0
        x, y = target[b, t, chosen], np.exp(scores[b, t, chosen] / 0.5)
        expected = np.sum(x * np.log(x / (y / y.sum())))
        np.testing.assert_allclose(statistics.indexer_loss[b, t], expected, rtol=1e-4, atol=1e-6)


def test_statistics_of_the_first_token():
    q, k, v, index = make_inputs()
    mask, p = selected(index), reference.attend(q, k, v, selected(index))[1]
    _, statistics = sparse(q, k, v, index)
    starts = np.array([[0] * 12, [0] * 3 + [3] * 4 + [7] * 5])
    assert statistics.first_token.shape == (B, T, H)
    for b, t, h in np.ndindex(B, T, H):
        expected = p[b, h // (H // G), h % (H // G), t, starts[b, t]]
        np.testing.assert_allclose(statistics.first_token[b, t, h], expected, rtol=1e-5)
        assert statistics.first_token_selected[b, t] == mask[b, t, starts[b, t]]
    assert not np.all(statistics.first_token_selected)


@pytest.mark.parametrize("rule", ["fixed", "paper"])
def test_indexer_gradient_is_that_of_the_divergence(rule):
    with jax.enable_x64(True):
        q, k, v, index = make_inputs(dtype=jnp.float64)

        @jax.jit
        def loss(index):
            return jnp.sum(sparse(q, k, v, index, running=0.004, k_rule=rule)[1].indexer_loss)

        gradient = jax.grad(loss)(index)
        direction = jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.ndim), a.shape, a.dtype), index)
        slope = sum(jnp.sum(g * d) for g, d in zip(gradient, direction, strict=True))
        moved = [jax.tree.map(lambda a, d, h=h: a + h * d, index, direction) for h in (1e-6, -1e-6)]
        difference = (loss(moved[0]) - loss(moved[1])) / 2e-6
        assert gradient.query.dtype == jnp.float64
        assert all(jnp.max(jnp.abs(g)) > 1e-4 for g in gradient)
        np.testing.assert_allclose(slope, difference, rtol=1e-6)


def test_output_and_divergence_train_different_inputs():
    q, k, v, index = make_inputs()

    def gradients(loss):
        return jax.jit(jax.grad(lambda *a: loss(sparse(*a)), argnums=(0, 1, 2, 3)))(q, k, v, index)

    by_output = gradients(lambda result: jnp.sum(result[0] ** 2))
    by_loss = gradients(lambda result: jnp.sum(result[1].indexer_loss))
    assert all(jnp.any(g != 0) for g in by_output[:3]) and all(jnp.all(g == 0) for g in by_output[3])
    assert all(jnp.all(g == 0) for g in by_loss[:3]) and all(jnp.any(g != 0) for g in by_loss[3])
