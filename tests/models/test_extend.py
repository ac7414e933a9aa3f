"""Decoding through the cache equals the plain forward pass, however the text is split."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import ModelConfig
from tests.models.making import make_decoder

T, CAPACITY = 24, 32
KINDS = {
    "dense": {"attention": "dense"},
    "fixed": {"attention": "sparse", "k_rule": "fixed"},
    "paper": {"attention": "gated_sparse", "k_rule": "paper", "indexer_rotary_width": 2},
    "block": {"attention": "gated_sparse", "selection": "block", "block": 4},
    "inverse": {"attention": "gated_sparse", "k_rule": "inverse", "keep_first": 1},
}
MORE_CASES = (("dense", "float64"), ("fixed", "float64"), ("inverse", "float32"))
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}
BASE = ModelConfig(
    d_model=16, layers=2, heads=4, kv_heads=2, head_width=4, d_ff=24, vocab_size=32, indexer_width=4, k_base=4, k_min=2
)
BASE = dataclasses.replace(BASE, k_max=6)


@functools.cache
def build(kind, dtype):
    config = dataclasses.replace(BASE, dtype=dtype, **KINDS[kind])
    graphdef, params, state = nnx.split(make_decoder(config), nnx.Param, ...)
    # A running variance as after some steps, which makes the adaptive rules adapt.
    return nnx.split(nnx.merge(graphdef, params, jax.tree.map(lambda v: jnp.full_like(v, 1e-3), state)))


@functools.partial(jax.jit, static_argnames="graphdef")
def forward(graphdef, state, tokens_BT):
    return nnx.merge(graphdef, state)(tokens_BT)[0]


@functools.partial(jax.jit, static_argnames="graphdef")
def extend(graphdef, state, tokens_BC, cache):
    return nnx.merge(graphdef, state).extend(tokens_BC, cache)


def empty(model, batch, capacity=CAPACITY):
    return nnx.merge(*model).init_cache(batch, capacity)


def make_tokens(seed, batch):
    """Rows without a repeated token: the scores of two equal tokens differ by rounding alone in the first layer."""
    rows = [jax.random.permutation(key, 32)[:T] for key in jax.random.split(jax.random.key(seed), batch)]
    return jnp.stack(rows).astype(jnp.int32)


def in_pieces(model, tokens_BT, sizes):
    cache, logits, start = empty(model, len(tokens_BT)), [], 0
    for size in sizes:
        piece, cache = extend(*model, tokens_BT[:, start : start + size], cache)
        cache = cache.advance(jnp.full(len(tokens_BT), size))
        logits.append(piece)
        start += size
    return jnp.concatenate(logits, 1), cache


def close(actual, expected, dtype):
    scale = np.max(np.abs(expected))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize(
    "kind, dtype",
    [
        *((kind, "float64") for kind in ("paper", "block", "inverse")),
        ("dense", "float32"),
        *(pytest.param(*case, marks=pytest.mark.thorough) for case in MORE_CASES),
    ],
)
def test_any_split_of_prefill_and_decoding_equals_the_forward_pass(kind, dtype):
    with jax.enable_x64(dtype == "float64"):
        model = build(kind, dtype)
        tokens_BT = make_tokens(1, 2)
        expected = forward(*model, tokens_BT)
        for sizes in [(8, 1, 8, 7), (1,) * 24, (7, 1, 8, 8)]:
            close(in_pieces(model, tokens_BT, sizes)[0], expected, dtype)


@pytest.mark.parametrize("kind", ["dense", "inverse", "block"])
def test_ragged_rows_rejected_tokens_and_neighbours_leave_no_trace(kind):
    """Rows at different lengths, with rejected tokens behind them, continue as each would alone."""
    model = build(kind, "float32")
    tokens_BT = make_tokens(2, 3)
    prompt_B, accepted_B = jnp.array([5, 8, 1]), jnp.array([0, 3, 4])
    _, cache = extend(*model, tokens_BT[:, :8], empty(model, 3))
    cache = cache.advance(prompt_B)
    # A block of which each row keeps a part; what follows in the row is wrong on purpose.
    block_BC = jnp.stack([jnp.roll(row, -p)[:4] for row, p in zip(tokens_BT, prompt_B, strict=True)])
    wrong_BC = jnp.where(jnp.arange(4) < accepted_B[:, None], block_BC, 31 - block_BC)
    _, cache = extend(*model, wrong_BC, cache)
    cache = cache.advance(accepted_B)
    rest_BC = jnp.stack([jnp.roll(row, -n)[:4] for row, n in zip(tokens_BT, cache.length, strict=True)])
    logits, cache = extend(*model, rest_BC, cache)
    for b, n in enumerate(np.asarray(prompt_B + accepted_B)):
        close(logits[b], forward(*model, tokens_BT[b : b + 1])[0, n : n + 4], "float32")
        fresh = extend(*model, tokens_BT[b : b + 1], empty(model, 1))[1]
        for kept, whole in zip(cache.layers, fresh.layers, strict=True):
            # One list a tile instead of one entry a token.
            tiles = -(-(n + 4) // 4)
            slots = [(kept.lists, whole.lists, tiles)] if kind == "block" else []
            slots += [(a, e, n + 4) for a, e in zip(kept[:3], whole[:3], strict=True) if a is not None]
            for ours, expected, end in slots:
                np.testing.assert_allclose(ours[b, :end], expected[0, :end], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["dense", "paper"])
def test_an_unstacked_decoder_extends_alike(kind):
    model = build(kind, "float32")
    unstacked = nnx.split(nnx.merge(*model).unstack())
    tokens_BT = jax.random.randint(jax.random.key(3), (1, 8), 0, 32)
    expected, _ = extend(*model, tokens_BT, empty(model, 1))
    actual, _ = extend(*unstacked, tokens_BT, empty(unstacked, 1))
    np.testing.assert_array_equal(actual, expected)


def test_an_extension_longer_than_the_cache_is_refused():
    model = build("dense", "float32")
    with pytest.raises(ValueError, match=r"capacity=4 must be at least the 5 tokens"):
        nnx.merge(*model).extend(jnp.zeros((1, 5), jnp.int32), empty(model, 1, capacity=4))
