import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import oracle
from models.attention.indexer import index_scores
from models.attention.keys import in_documents, visible_keys
from tests.models.attention.inputs import make_inputs, make_segments, make_selection, run, value_and_gradients

B, T, H, G = 2, 12, 4, 2
SEGMENTS = make_segments("documents", B, T)
VISIBLE = visible_keys(in_documents(SEGMENTS), jnp.arange(T))


def selected(index, selection, running=0.01):
    reads = in_documents(SEGMENTS)._replace(index=index, running_variance=jnp.asarray(running))
    return oracle.selected_keys(index_scores(index, selection.scale), reads, selection)[0]


@pytest.mark.parametrize("fields", [None, {"k_base": T}, {"k_base": T, "block": 4}])
def test_everything_read_is_dot_product_attention(fields):
    q, k, v, index = make_inputs(T=T)
    selection = fields and make_selection(k_rule="fixed", **fields)
    expected = jax.nn.dot_product_attention(q, k, v, mask=VISIBLE[:, None])
    attended = run(oracle.attend, (q, k, v, index), SEGMENTS, selection)
    np.testing.assert_allclose(attended.output, expected, rtol=2e-5, atol=2e-6)
    if selection:
        np.testing.assert_array_equal(attended.selected, jnp.sum(VISIBLE, axis=-1))


def test_probabilities_are_those_of_the_output():
    q, k, v, index = make_inputs(T=T)
    mask = selected(index, make_selection())
    output, p = oracle.attend_masked(q, k, v, mask)
    assert p.shape == (B, H, T, T)
    np.testing.assert_allclose(jnp.sum(p, axis=-1), 1, rtol=1e-6)
    assert np.all((p > 0) == mask[:, None])
    expected = jnp.einsum("bhts,bshe->bthe", p, jnp.repeat(v, H // G, axis=2))
    np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6)


def test_huge_logits_do_not_overflow():
    q, k, v, _ = make_inputs(T=T)
    output, p = oracle.attend_masked(q * 1e3, k * 1e3, v, VISIBLE)
    assert jnp.all(jnp.isfinite(output)) and jnp.all(jnp.isfinite(p))


@pytest.mark.parametrize("block", [0, 4])
def test_loss_is_the_divergence_from_the_mean_of_heads(block):
    inputs, selection = make_inputs(T=T), make_selection(block=block)
    q, k, v, index = inputs
    mask = selected(index, selection)
    scores, target = np.asarray(index_scores(index, 0.4)), np.asarray(oracle.attend_masked(q, k, v, mask)[1])
    attended = run(oracle.attend, inputs, SEGMENTS, selection)
    np.testing.assert_array_equal(attended.selected, jnp.sum(mask, axis=-1))
    for b, t in np.ndindex(B, T):
        chosen = np.flatnonzero(mask[b, t])
        x, y = target.mean(1)[b, t, chosen], np.exp(scores[b, t, chosen] / 0.5)
        expected = np.sum(x * np.log(x / (y / y.sum())))
        np.testing.assert_allclose(attended.indexer_loss[b, t], expected, rtol=1e-4, atol=1e-6)


def test_indexer_gradient_is_that_of_the_divergence():
    with jax.enable_x64(True):
        q, k, v, index = make_inputs(T=T, dtype=jnp.float64)

        @jax.jit
        def loss(index):
            return jnp.sum(run(oracle.attend, (q, k, v, index), SEGMENTS, make_selection()).indexer_loss)

        gradient = jax.jit(jax.grad(loss))(index)
        direction = jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.ndim), a.shape, a.dtype), index)
        slope = sum(jnp.sum(g * d) for g, d in zip(gradient, direction, strict=True))
        moved = [jax.tree.map(lambda a, d, h=h: a + h * d, index, direction) for h in (1e-6, -1e-6)]
        difference = (loss(moved[0]) - loss(moved[1])) / 2e-6
        assert gradient.query.dtype == jnp.float64
        assert all(jnp.max(jnp.abs(g)) > 1e-4 for g in gradient)
        np.testing.assert_allclose(slope, difference, rtol=1e-6)


def test_only_adaptive_rules_give_a_variance():
    inputs = make_inputs(T=T)
    for block in (0, 4):
        adaptive, fixed = (make_selection(k_rule=rule, block=block) for rule in ("paper", "fixed"))
        assert run(oracle.attend, inputs, SEGMENTS, adaptive).variance.shape == (B, T)
        assert run(oracle.attend, inputs, SEGMENTS, fixed).variance is None


def test_output_and_divergence_train_different_inputs():
    def gradients(loss):
        return jax.jit(jax.grad(lambda inputs: loss(run(oracle.attend, inputs, SEGMENTS, make_selection()))))(inputs)

    inputs = make_inputs(T=T)
    *qkv, index = gradients(lambda attended: jnp.sum(attended.output**2))
    assert all(jnp.any(g != 0) for g in qkv) and all(jnp.all(g == 0) for g in index)
    *qkv, index = gradients(lambda attended: jnp.sum(attended.indexer_loss))
    assert all(jnp.all(g == 0) for g in qkv) and all(jnp.any(g != 0) for g in index)


def test_shares_of_heads_follow_the_groups():
    """Query head h reads key/value head h // (H/G)."""
    q, k, v, index = make_inputs(T=T)
    (attended, _) = value_and_gradients(oracle.attend, (q, k, v.at[:, :, 1].set(0), index), SEGMENTS)
    assert jnp.all(attended.output[:, :, 2:] == 0) and jnp.all(jnp.any(attended.output[:, :, :2] != 0, axis=-1))
