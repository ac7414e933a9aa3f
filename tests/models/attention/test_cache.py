"""Attention against a cache equals that of the whole text; see also tests/models/test_extend.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import ModelConfig
from models.attention import Attention, oracle
from models.attention import cache as caches
from models.attention.cache import LayerCache
from models.attention.keys import Reads
from models.attention.selection import list_length
from tests.models.attention.inputs import make_inputs, make_segments, make_selection, run

B = 2


@functools.partial(jax.jit, static_argnames="selection")
def extend(layer, q, k, v, index, start, selection):
    """One extension of every row from its own start on: write, select, attend."""
    position = start[:, None] + jnp.arange(q.shape[1])
    new = zip(layer[:3], (k, v, index.key), strict=True)
    layer = LayerCache(*(caches.write(slots, part, start) for slots, part in new), layer.lists)
    reads = Reads(position, jnp.zeros_like(position), index._replace(key=layer.index_key), jnp.asarray(0.01, q.dtype))
    return caches.attend(q, layer, reads, selection)


def take(inputs, start, C):
    """The inputs of C tokens from each row's start on."""
    at = start[:, None] + jnp.arange(C)
    return jax.tree.map(lambda a: jax.vmap(lambda row, at: row[at])(a, at) if a.ndim > 1 else a, inputs)


def leftovers(inputs, S, selection):
    """Slots as extensions that were taken back leave them."""
    _, k, v, index = inputs
    junk = [jnp.full((B, S, *a.shape[2:]), 7.0, a.dtype) for a in (k, v, index.key)]
    if not selection.block:
        return LayerCache(*junk)
    return LayerCache(*junk, jnp.full((B, S // selection.block, list_length(selection, S)), 3, jnp.int32))


# Tokens gather where an extension is short and mask where it is long.
SELECTIONS = {"blocks": make_selection(block=4, keep_first=5, keep_local=2), "tokens": make_selection(k_max=5)}


@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize("parts", [(21,), (3, 1, 9, 1, 1, 3, 3)], ids=str)
def test_any_split_of_decoding_equals_the_whole_text(kind, parts):
    T, S, selection = 21, 24, SELECTIONS[kind]
    with jax.enable_x64(True):
        inputs = make_inputs(T=T, dtype=jnp.float64)
        expected = run(oracle.attend, inputs, make_segments("one", B, T), selection).output
        layer, start, outputs = leftovers(inputs, S, selection), 0, []
        for C in parts:
            at = jnp.full(B, start)
            o, layer = extend(layer, *take(inputs, at, C), at, selection)
            outputs.append(o)
            start += C
        np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", SELECTIONS)
def test_rows_stand_at_their_own_positions(kind):
    T, S, selection = 14, 16, SELECTIONS[kind]
    inputs = make_inputs(T=T)
    expected = run(oracle.attend, inputs, make_segments("one", B, T), selection).output
    start = jnp.zeros(B, jnp.int32)
    _, layer = extend(leftovers(inputs, S, selection), *take(inputs, start, 9), start, selection)
    start = jnp.array([9, 2])  # the second row goes back by seven tokens
    o, _ = extend(layer, *take(inputs, start, 5), start, selection)
    np.testing.assert_allclose(o, take(expected, start, 5), atol=1e-5)


@pytest.mark.parametrize("length", [0, 7, 60])
@pytest.mark.parametrize("keep", [(0, 0), (2, 3)])
def test_gathered_rows_equal_the_masked_product(length, keep):
    """With 64 slots a query of one token gathers; 64 queries at once mask."""
    inputs = make_inputs(seed=length, T=64)
    selection = make_selection(k_rule="inverse", k_min=2, k_max=8, keep_first=keep[0], keep_local=keep[1])
    start = jnp.zeros(B, jnp.int32)
    masked, layer = extend(leftovers(inputs, 64, selection), *inputs, start, selection)
    start = jnp.full(B, length)
    gathered, _ = extend(layer, *take(inputs, start, 1), start, selection)
    np.testing.assert_allclose(gathered, masked[:, length : length + 1], rtol=1e-5, atol=1e-6)


def test_a_block_must_divide_the_capacity():
    attention = Attention(ModelConfig(attention="sparse", selection="block", block=16), rngs=nnx.Rngs(0))
    assert attention.init_cache(1, 64, jnp.float32).lists.shape[1] == 4
    with pytest.raises(ValueError, match="block=16 must divide the cache's capacity of 40"):
        attention.init_cache(1, 40, jnp.float32)
