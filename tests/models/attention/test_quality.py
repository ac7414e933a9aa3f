import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.attention import reference, streamed
from models.attention.quality import selection_quality
from models.attention.reference import IndexInputs, Selection
from tests.models.attention.test_streamed import make_inputs, make_segments, make_selection


@pytest.mark.parametrize("chunk", [5, 64])
def test_quality_against_the_oracle(chunk):
    q, k, v, index = make_inputs()
    segments, selection, running = make_segments("documents", 2, 29), make_selection(), jnp.float32(0.01)
    quality = jax.jit(functools.partial(selection_quality, selection=selection, chunk=chunk))
    quality = quality(q, k, index, segments, running)
    chosen = np.asarray(reference.select_keys(index, segments, running, selection)[0])
    visible = reference.visible_mask(segments)
    dense = np.asarray(reference.attend(q, k, v, visible)[1]).mean((1, 2))
    for b, t in np.ndindex(2, 29):
        mine = set(np.flatnonzero(chosen[b, t]))
        best = set(np.argsort(-dense[b, t], kind="stable")[: len(mine)])
        np.testing.assert_allclose(quality.recall[b, t], sum(dense[b, t, s] for s in mine), rtol=1e-5)
        np.testing.assert_allclose(quality.overlap[b, t], len(mine & best) / len(mine), rtol=1e-6)
    assert np.min(quality.recall) < 0.5 and np.min(quality.overlap) < 0.5


def test_quality_has_no_gradient():
    q, k, _, index = make_inputs(T=6)

    def total(q, k, index):
        selection = make_selection(k_rule="fixed", k_base=2)
        quality = selection_quality(q, k, index, make_segments("one", 2, 6), jnp.float32(0), selection, chunk=4)
        return jnp.sum(quality.recall + quality.overlap)

    gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, index)
    assert all(jnp.all(g == 0) for g in jax.tree.leaves(gradients))


T, WIDTH = 64, 8
NEEDLES = Selection(0.35, 0.1, "fixed", k_base=T // 8, k_min=1, k_max=T)
EVERYTHING = Selection(0.35, 0.1, "fixed", k_base=T, k_min=1, k_max=T)


def make_needles(key):
    """Every token has a code of norm 4, and attends to the earlier token whose code its query holds."""
    codes_key, needle_key = jax.random.split(key)
    code_BTE = jax.random.normal(codes_key, (4, T, 16))
    code_BTE *= 4 / jnp.linalg.norm(code_BTE, axis=-1, keepdims=True)
    needle_BT = jnp.floor(jax.random.uniform(needle_key, (4, T)) * (jnp.arange(T) + 1)).astype(jnp.int32)
    return jnp.take_along_axis(code_BTE, needle_BT[..., None], axis=1), code_BTE


def index_of(params, wanted_BTE, code_BTE):
    query_BTJI = jnp.einsum("bte,eji->btji", wanted_BTE, params["query"])
    gate_BTJ = jnp.broadcast_to(jax.nn.sigmoid(params["gate"]), query_BTJI.shape[:3])
    return IndexInputs(query_BTJI, code_BTE @ params["key"], gate_BTJ, params["bias"])


def test_a_trained_indexer_finds_planted_needles():
    """100 steps of dense warm-up and 100 on the selected set raise the recall of dense attention at k = T/8."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "query": jax.random.normal(keys[0], (16, 2, WIDTH)) / 4,
        "key": jax.random.normal(keys[1], (16, WIDTH)) / 4,
        "gate": jnp.zeros(2),
        "bias": jnp.zeros(2),
    }
    optimizer, segments = optax.adam(0.02), jnp.zeros((4, T), jnp.int32)

    def arguments(params, key):
        wanted_BTE, code_BTE = make_needles(key)
        index = index_of(params, wanted_BTE, code_BTE)
        return 4 * wanted_BTE[:, :, None], code_BTE[:, :, None], index

    @functools.partial(jax.jit, static_argnames="selection")
    def train(params, state, key, selection):
        def loss(params):
            q, k, index = arguments(params, key)
            results = streamed.sparse_attention(q, k, k, index, segments, jnp.zeros(()), selection, chunk=32)
            return jnp.mean(results[1].indexer_loss)

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def recall(params):
        q, k, index = arguments(params, jax.random.key(99))
        quality = selection_quality(q, k, index, segments, jnp.zeros(()), NEEDLES, chunk=32)
        return jnp.mean(quality.recall[:, T // 8 :])

    start, state = recall(params), optimizer.init(params)
    for i in range(200):
        selection = EVERYTHING if i < 100 else NEEDLES
        params, state = train(params, state, jax.random.key(i), selection)
    assert start < 0.6 and recall(params) >= 0.9, (start, recall(params))
