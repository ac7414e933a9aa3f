import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import token_losses
from tests.models.making import make_decoder

SEPARATOR, PADDING = 30, 31


def build(config):
    return nnx.split(make_decoder(config), nnx.Param, ...)


@functools.partial(jax.jit, static_argnames="graphdef")
def run(graphdef, params, state, tokens_BS):
    return token_losses(nnx.merge(graphdef, params, state), tokens_BS, SEPARATOR, PADDING)


def losses(config, tokens_BS):
    return run(*build(config), tokens_BS)


def test_losses_are_negative_log_likelihoods(tiny, tokens_BS):
    config = tiny()
    nats, _, metrics = losses(config, tokens_BS)
    inputs, targets = tokens_BS[:, :-1], tokens_BS[:, 1:]
    segments = jnp.cumsum(inputs == SEPARATOR, axis=1)
    logits, _ = nnx.merge(*build(config))(inputs, jnp.where(inputs == PADDING, -1, segments))
    p = jax.nn.softmax(logits, axis=-1)
    expected = -np.log(np.take_along_axis(np.asarray(p), np.asarray(targets)[..., None], axis=-1)[..., 0])
    np.testing.assert_allclose(nats, expected, rtol=1e-5)
    assert nats.dtype == jnp.float32 and metrics["indexer_loss"] == 0


def test_padding_targets_weigh_nothing(tiny, tokens_BS):
    _, weights, _ = losses(tiny(), tokens_BS)
    assert weights.dtype == jnp.float32
    np.testing.assert_array_equal(weights, tokens_BS[:, 1:] != PADDING)
    assert weights[2, 10] == 1 and weights[2, 11] == 0


def test_a_document_begins_at_its_separator(tiny, tokens_BS):
    """The second window has separators at 5 and 11: what precedes one does not matter from there on."""
    config = tiny(attention="gated_sparse")
    before, _, _ = losses(config, tokens_BS)
    changed = tokens_BS.at[1, :5].set((tokens_BS[1, :5] + 1) % SEPARATOR)
    after, _, _ = losses(config, changed)
    np.testing.assert_allclose(after[1, 5:], before[1, 5:], rtol=1e-5, atol=1e-6)
    assert np.all(before[1, :5] != after[1, :5])
    inside = tokens_BS.at[1, 6].add(1)
    assert np.any(np.abs(losses(config, inside)[0][1, 7:11] - before[1, 7:11]) > 1e-4)


def test_padding_changes_nothing_before_it(tiny, tokens_BS):
    config = tiny(attention="gated_sparse")
    nats, weights, metrics = losses(config, tokens_BS[:, :13])
    longer = jnp.pad(tokens_BS[:, :13], ((0, 0), (0, 20)), constant_values=PADDING)
    nats_longer, weights_longer, _ = losses(config, longer)
    np.testing.assert_allclose(nats_longer[:, :12], nats, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(weights_longer, jnp.pad(weights, ((0, 0), (0, 20))))
    assert metrics["indexer_loss"] > 0


@pytest.mark.parametrize("loss_chunk", [1, 15, 1000])
def test_chunks_change_no_loss_and_no_gradient(tiny, tokens_BS, loss_chunk):
    results = []
    for chunk in (0, loss_chunk):
        graphdef, params, state = build(tiny(loss_chunk=chunk))

        def total(params, graphdef=graphdef, state=state):
            nats, weights, _ = token_losses(nnx.merge(graphdef, params, state), tokens_BS, SEPARATOR, PADDING)
            return jnp.sum(nats * weights), nats

        results.append(jax.jit(jax.grad(total, has_aux=True))(params))
    for plain, chunked in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(chunked, plain, rtol=1e-5, atol=1e-6)


def test_chunked_losses_never_hold_all_logits(tiny, tokens_BS):
    def shapes(chunk):
        graphdef, params, state = build(tiny(loss_chunk=chunk, vocab_size=37))

        def total(params):
            model = nnx.merge(graphdef, params, state)
            return jnp.sum(token_losses(model, tokens_BS, SEPARATOR, PADDING)[0])

        return str(jax.make_jaxpr(jax.grad(total))(params))

    assert "3,16,37" in shapes(0)
    assert "3,16,37" not in shapes(12) and "48,37" not in shapes(12) and "3,4,37" in shapes(12)
