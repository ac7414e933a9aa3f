import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models.attention import oracle, streamed, tiles
from models.attention.indexer import index_scores
from models.attention.keys import IndexInputs, Selection, in_documents, in_window, visible_keys
from models.attention.measure import measure
from tests.models.attention.inputs import make_inputs, make_segments, make_selection

STARTS = np.array([[0] * 29, [0] * 10 + [10] * 5 + [15] * 14])


def reads_of(index, segments, running=0.01):
    return in_documents(segments)._replace(index=index, running_variance=jnp.float32(running))


@pytest.mark.parametrize(("at_once", "block"), [(2**11, 0), (2**22, 0), (2**11, 4)])
def test_measured_is_what_the_oracle_does(monkeypatch, at_once, block):
    monkeypatch.setattr(tiles, "_STEP_ELEMENTS", at_once)
    q, k, v, index = make_inputs()
    segments, selection = make_segments("documents", 2, 29), make_selection(block=block)
    reads = reads_of(index, segments)
    np.testing.assert_array_equal(reads.first, STARTS)
    measured = jax.jit(measure, static_argnames="selection")(q, k, reads, reads.first, selection)
    chosen = np.asarray(oracle.selected_keys(index_scores(index, selection.scale), reads, selection)[0])
    dense = np.asarray(oracle.attend_masked(q, k, v, visible_keys(reads, jnp.arange(29)))[1]).mean(1)
    p = np.asarray(oracle.attend_masked(q, k, v, chosen)[1])
    for b, t in np.ndindex(2, 29):
        mine, start = set(np.flatnonzero(chosen[b, t])), STARTS[b, t]
        best = set(np.argsort(-dense[b, t], kind="stable")[: len(mine)])
        np.testing.assert_allclose(measured.recall[b, t], sum(dense[b, t, s] for s in mine), rtol=1e-5)
        np.testing.assert_allclose(measured.overlap[b, t], len(mine & best) / len(mine), rtol=1e-6)
        np.testing.assert_allclose(measured.first_token[b, t], p[b, :, t, start], rtol=1e-5)
        assert measured.first_token_selected[b, t] == chosen[b, t, start]
    assert np.min(measured.recall) < 0.5 and np.min(measured.overlap) < 0.5
    assert not np.all(measured.first_token_selected)


def test_a_first_token_beyond_the_window_gets_nothing():
    q, k, _, _ = make_inputs()
    document = in_documents(make_segments("one", 2, 29))
    first = measure(q, k, in_window(document, 4), document.first).first_token
    assert np.all(first[:, :4] > 0) and np.all(first[:, 4:] == 0)


def test_measuring_has_no_gradient():
    q, k, _, index = make_inputs(T=6)

    def total(q, k, index):
        selection, reads = make_selection(k_rule="fixed", k_base=2), reads_of(index, make_segments("one", 2, 6))
        measured = measure(q, k, reads, reads.first, selection)
        return jnp.sum(measured.recall + measured.overlap) + jnp.sum(measured.first_token)

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
            return jnp.mean(streamed.attend(q, k, k, reads_of(index, segments, 0.0), selection, chunk=32).indexer_loss)

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def recall(params):
        q, k, index = arguments(params, jax.random.key(99))
        reads = reads_of(index, segments, 0.0)
        return jnp.mean(measure(q, k, reads, reads.first, NEEDLES).recall[:, T // 8 :])

    start, state = recall(params), optimizer.init(params)
    for i in range(200):
        selection = EVERYTHING if i < 100 else NEEDLES
        params, state = train(params, state, jax.random.key(i), selection)
    assert start < 0.6 and recall(params) >= 0.9, (start, recall(params))
