import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import block_tiles, blocks, reference
from models.attention.reference import IndexInputs

B, H, G, E, J, INDEXER_WIDTH = 2, 4, 2, 6, 2, 5


def make_inputs(T, seed=0, dtype=jnp.float32, batch=B):
    keys = jax.random.split(jax.random.key(seed), 7)
    shapes = (T, H, E), (T, G, E), (T, G, E), (T, J, INDEXER_WIDTH), (T, INDEXER_WIDTH), (T, J)
    arrays = [jax.random.normal(k, (batch, *shape), dtype) for k, shape in zip(keys, shapes, strict=False)]
    return *arrays[:3], IndexInputs(*arrays[3:5], jax.nn.sigmoid(arrays[5]), jax.random.normal(keys[6], (J,), dtype))


def make_segments(T, kind):
    """One document; three of random lengths and padding behind them."""
    if kind == "one":
        return jnp.zeros((B, T), jnp.int32)
    cuts = np.sort(np.random.default_rng(T).integers(0, T, (B, 3)), axis=1)
    segments = np.sum(np.arange(T)[None, :, None] >= cuts[:, None], axis=-1)
    return jnp.asarray(np.where(np.arange(T) >= T - 2, -1, segments), jnp.int32)


def make_selection(**fields):
    base = {"scale": 0.4, "temperature": 0.5, "k_rule": "fixed", "k_base": 9, "k_min": 3, "k_max": 16}
    return reference.Selection(**base | fields)


@functools.partial(jax.jit, static_argnames=("attend", "selection", "block"))
def value_and_gradients(attend, inputs, segments, selection, block, running=0.01):
    """Output, statistics and the gradients of a loss that weighs every output and every divergence differently."""

    def loss(inputs):
        o, statistics = attend(*inputs, segments, jnp.asarray(running, o_type), selection, block=block)
        losses = statistics.indexer_loss
        weighed = jnp.sum(o * jnp.cos(jnp.arange(o.size)).reshape(o.shape))
        return weighed + jnp.sum(losses * jnp.sin(jnp.arange(losses.size)).reshape(losses.shape)), (o, statistics)

    o_type = inputs[0].dtype
    (_, outputs), gradients = jax.value_and_grad(loss, has_aux=True)(inputs)
    return outputs, gradients


def assert_equal(actual, expected, tolerance):
    for (path, x), y in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        scale = np.max(np.abs(y)) or 1.0
        np.testing.assert_allclose(
            np.asarray(x, np.float64) / scale,
            np.asarray(y, np.float64) / scale,
            rtol=0,
            atol=tolerance,
            err_msg=jax.tree_util.keystr(path),
        )


CASES = [
    # T, block, segments, what the selection differs in
    (24, 4, "one", {}),
    (37, 4, "many", {"k_rule": "paper"}),
    (33, 8, "many", {"k_rule": "inverse", "keep_first": 3, "keep_local": 10}),
    (21, 5, "many", {"keep_first": 7, "k_base": 1}),
    (5, 8, "one", {}),
    (16, 1, "one", {"keep_local": 3, "k_rule": "paper"}),
]


@pytest.mark.parametrize(
    ("T", "block", "segments", "fields"),
    [CASES[1], *(pytest.param(*case, marks=pytest.mark.thorough) for case in CASES[2:5])],
)
def test_equals_the_oracle_in_float64(T, block, segments, fields, monkeypatch):
    # Two tiles a step, so that a last, incomplete step occurs.
    monkeypatch.setattr(blocks, "tiles_at_once", lambda elements: 2)
    selection, segments = make_selection(**fields), make_segments(T, segments)
    with jax.enable_x64(True):
        inputs = make_inputs(T, seed=T, dtype=jnp.float64)
        actual = value_and_gradients(blocks.block_attention, inputs, segments, selection, block)
        assert_equal(actual, value_and_gradients(blocks.oracle, inputs, segments, selection, block), 1e-10)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.thorough) for seed in (1, 2))])
def test_equals_the_oracle_in_float32(seed):
    selection, segments = make_selection(k_rule="paper"), make_segments(37, "many")
    inputs = make_inputs(37, seed=seed)
    actual = value_and_gradients(blocks.block_attention, inputs, segments, selection, 4)
    assert_equal(actual, value_and_gradients(blocks.oracle, inputs, segments, selection, 4), 1e-5)


@functools.partial(jax.jit, static_argnames=("selection", "block"))
def attend(inputs, segments, selection, block, running=0.01):
    return blocks.block_attention(*inputs, segments, jnp.asarray(running), selection, block=block)


@functools.partial(jax.jit, static_argnames=("selection", "block"))
def select(index, segments, selection, block, running=0.01):
    return blocks.select_blocks(index, segments, jnp.asarray(running, index.key.dtype), selection, block=block)[0]


def listed_by_hand(index, segments, selection, block, running):
    """The selected blocks of every tile as sets, by a stable sort."""
    scores = np.asarray(reference.index_scores(index, selection.scale))
    chosen = {}
    for b, first in np.ndindex(segments.shape[0], segments.shape[1]):
        if first % block:
            continue
        same = [s for s in range(first + 1) if np.all(np.asarray(segments)[b, s : first + 1] == segments[b, first])]
        variance = np.var(scores[b, first, same], dtype=np.float32)
        k = reference.choose_k(jnp.asarray([variance]), jnp.float32(running), selection)[0]
        latest = [s for s in same if first - s < selection.keep_local]
        kept = {s // block for s in [*same[: selection.keep_first], *latest, first]}
        rest = sorted({s // block for s in same} - kept)
        best = [max(scores[b, first, s] for s in same if s // block == m) for m in rest]
        order = [rest[i] for i in np.argsort(-np.array(best), kind="stable")]
        chosen[b, first // block] = kept | set(order[: max(-(-int(k) // block) - len(kept), 0)])
    return chosen


@pytest.mark.parametrize(("T", "block", "segments", "fields"), CASES)
def test_lists_by_hand(T, block, segments, fields):
    selection, segments = make_selection(**fields), make_segments(T, segments)
    index = make_inputs(T, seed=T)[3]
    lists = select(index, segments, selection, block)
    assert lists.dtype == jnp.int32
    assert lists.shape == (B, -(-T // block), blocks.list_length(selection, T, block=block))
    for (b, tile), expected in listed_by_hand(index, segments, selection, block, 0.01).items():
        row = lists[b, tile].tolist()
        assert row == sorted(expected) + [-1] * (len(row) - len(expected))


def test_of_equal_blocks_the_lower_wins():
    index = make_inputs(24)[3]
    index = jax.tree.map(jnp.zeros_like, index)._replace(gate=index.gate)
    lists = select(index, make_segments(24, "one"), make_selection(), 4)
    assert lists[0].tolist() == [[0, -1, -1], [0, 1, -1], [0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 1, 5]]


@pytest.mark.parametrize("keep_first", [1, 2, 6])
def test_no_list_outgrows_its_length(keep_first):
    """Whatever must be kept finds room, wherever the document starts."""
    selection = make_selection(k_base=1, keep_first=keep_first, keep_local=6)
    longest = blocks.list_length(selection, 48, block=4)
    index = make_inputs(48, batch=4)[3]
    segments = jnp.asarray(np.arange(48) >= np.arange(1, 5)[:, None], jnp.int32)
    lists = select(index, segments, selection, 4)
    assert np.max(np.sum(np.asarray(lists) >= 0, axis=-1)) == longest


def test_nothing_leaks_from_the_future():
    T = 19
    selection, segments = make_selection(k_rule="paper"), make_segments(T, "many")
    inputs, other = make_inputs(T), make_inputs(T, seed=9)
    base = attend(inputs, segments, selection, 4)
    for t in range(T - 1):
        later = np.arange(T) > t

        def changed(a, b, later=later):
            return jnp.where(later.reshape(1, T, *(1,) * (a.ndim - 2)), b, a) if a.ndim > 1 else a

        results = attend(jax.tree.map(changed, inputs, other), segments, selection, 4)
        for before, after in zip(jax.tree.leaves(base), jax.tree.leaves(results), strict=True):
            np.testing.assert_array_equal(np.asarray(before)[:, : t + 1], np.asarray(after)[:, : t + 1])


def test_rows_do_not_know_their_batch_nor_what_follows():
    T = 19
    selection, segments = make_selection(k_rule="paper"), make_segments(T, "many")
    inputs = make_inputs(T)
    together = attend(inputs, segments, selection, 4)
    longer = jax.tree.map(
        lambda a: jnp.pad(a, ((0, 0), (0, 9), *((0, 0),) * (a.ndim - 2))) if a.ndim > 1 else a, inputs
    )
    padded = jnp.pad(segments, ((0, 0), (0, 9)), constant_values=-1)
    together_longer = attend(longer, padded, selection, 4)
    assert_equal(jax.tree.map(lambda a: a[:, :T], together_longer), together, 1e-6)
    for b in range(B):
        one = jax.tree.map(lambda a, b=b: a[b : b + 1] if a.ndim > 1 else a, inputs)
        alone = attend(one, segments[b : b + 1], selection, 4)
        assert_equal(alone, jax.tree.map(lambda a, b=b: a[b : b + 1], together), 1e-6)


def test_everything_selected_is_dot_product_attention():
    T = 21
    q, k, v, index = make_inputs(T)
    segments = make_segments(T, "many")
    o, statistics = attend((q, k, v, index), segments, make_selection(k_base=T), 4)
    visible = reference.visible_mask(segments)
    expected = jax.nn.dot_product_attention(q, k, v, mask=visible[:, None])
    np.testing.assert_allclose(o, expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(statistics.selected, jnp.sum(visible, axis=-1))


def test_output_and_divergence_train_different_inputs():
    inputs, segments = make_inputs(16), make_segments(16, "one")

    def gradients(part):
        def loss(inputs):
            return jnp.sum(part(blocks.block_attention(*inputs, segments, jnp.zeros(()), make_selection(), block=4)))

        return jax.jit(jax.grad(loss))(inputs)

    *by_output, index = gradients(lambda result: result[0] ** 2)
    assert all(jnp.any(g != 0) for g in by_output) and all(jnp.all(g == 0) for g in index)
    *by_loss, index = gradients(lambda result: result[1].indexer_loss)
    assert all(jnp.all(g == 0) for g in by_loss)
    # Every index query learns, not only those that the lists rest on.
    assert all(jnp.any(g != 0) for g in index) and jnp.all(jnp.any(index.query[:, 1:] != 0, axis=(2, 3)))


def test_bfloat16_stays_within_its_rounding():
    T = 32
    selection, segments = make_selection(), make_segments(T, "many")
    *qkv, index = make_inputs(T)
    rounded = [a.astype(jnp.bfloat16) for a in qkv]
    (o, statistics), gradients = value_and_gradients(blocks.block_attention, (*rounded, index), segments, selection, 4)
    exact = tuple(a.astype(jnp.float32) for a in rounded)
    (expected, expected_statistics), expected_gradients = value_and_gradients(
        blocks.oracle, (*exact, index), segments, selection, 4
    )
    assert o.dtype == gradients[0].dtype == jnp.bfloat16
    assert_equal((o, gradients[:3]), (expected, expected_gradients[:3]), 2e-2)
    assert_equal((statistics, gradients[3]), (expected_statistics, expected_gradients[3]), 2e-2)


@functools.partial(jax.jit, static_argnames=("selection", "block"))
def exact(inputs, selection, block, running):
    segments = jnp.zeros(inputs[0].shape[:2], jnp.int32)
    return blocks.oracle(*inputs, segments, jnp.asarray(running), selection, block=block)[0]


@functools.partial(jax.jit, static_argnames=("selection", "block"))
def extend(cache, q, k, v, index, start, running, selection, block):
    """One extension of every row from its own start on: write, list, attend."""
    slots = start[:, None] + jnp.arange(q.shape[1])
    write = jax.vmap(lambda old, at, new: old.at[at].set(new))
    keys, values, index_keys, lists = cache
    keys, values, index_keys = (
        write(old, slots, new) for old, new in ((keys, k), (values, v), (index_keys, index.key))
    )
    lists = blocks.extend_lists(lists, index._replace(key=index_keys), slots, running, selection, block=block)
    return blocks.attend_cached(q, keys, values, lists, slots, block=block), (keys, values, index_keys, lists)


@pytest.mark.parametrize("parts", [(21,), (1,) * 21, (3, 1, 9, 1, 1, 3, 3), (9, 9, 3)], ids=str)
def test_any_split_of_decoding_equals_prefill(parts):
    T, S, block, selection = 21, 24, 4, make_selection(k_rule="paper", keep_first=5, keep_local=2)
    with jax.enable_x64(True):
        q, k, v, index = make_inputs(T, dtype=jnp.float64)
        running = jnp.float64(0.01)
        expected = exact((q, k, v, index), selection, block, running)
        A = blocks.list_length(selection, S, block=block)
        # What rolled-back extensions leave behind must not matter.
        junk = [jnp.full((B, S, *a.shape[2:]), 7.0) for a in (k, v, index.key)]
        cache, start, outputs = (*junk, jnp.full((B, S // block, A), 3, jnp.int32)), 0, []
        for C in parts:
            part = jax.tree.map(lambda a, i=start, C=C: a[:, i : i + C] if a.ndim > 1 else a, (q, k, v, index))
            o, cache = extend(cache, *part, jnp.full(B, start), running, selection, block)
            outputs.append(o)
            start += C
    np.testing.assert_allclose(jnp.concatenate(outputs, axis=1), expected, rtol=0, atol=1e-10)


def test_rows_of_a_cache_stand_at_their_own_positions():
    T, S, block, selection = 14, 16, 4, make_selection(k_base=6)
    q, k, v, index = make_inputs(T)
    expected = exact((q, k, v, index), selection, block, 0.0)
    empty = [jnp.zeros((B, S, *a.shape[2:])) for a in (k, v, index.key)]
    lists = jnp.full((B, S // block, blocks.list_length(selection, S, block=block)), -1, jnp.int32)

    def part(start, C):
        at = start[:, None] + jnp.arange(C)
        take = jax.vmap(lambda a, at: a[at])
        return jax.tree.map(lambda a: take(a, at) if a.ndim > 1 else a, (q, k, v, index))

    start = jnp.zeros(B, jnp.int32)
    _, cache = extend((*empty, lists), *part(start, 9), start, jnp.zeros(()), selection, block)
    start = jnp.array([9, 2])  # the second row goes back by seven tokens
    o, _ = extend(cache, *part(start, 5), start, jnp.zeros(()), selection, block)
    np.testing.assert_allclose(o, jax.vmap(lambda a, at: a[at])(expected, start[:, None] + jnp.arange(5)), atol=1e-5)


def compiled(T, block=16):
    """A training step of one row at k = 64; arrays are abstract, so that nothing runs."""
    inputs = jax.eval_shape(lambda: make_inputs(T, batch=1))
    selection = make_selection(k_base=64)

    def loss(inputs):
        segments = jnp.zeros((1, T), jnp.int32)
        o, statistics = blocks.block_attention(*inputs, segments, jnp.zeros(()), selection, block=block)
        return jnp.sum(o) + jnp.sum(statistics.indexer_loss)

    return jax.jit(jax.value_and_grad(loss)).lower(inputs).compile()


def test_memory_is_linear(monkeypatch):
    monkeypatch.setattr(block_tiles, "_STEP_ELEMENTS", 2**17)
    lengths = (4096, 8192, 16384)
    programs = [compiled(T) for T in lengths]
    sizes = [program.memory_analysis().temp_size_in_bytes for program in programs]
    for T, program in zip(lengths, programs, strict=True):
        for shape in re.findall(r"\[([\d,]+)\]", program.as_text()):
            assert shape.split(",").count(str(T)) < 2, shape
    assert sizes[2] - sizes[1] < 2.2 * (sizes[1] - sizes[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda a: blocks.block_attention(*a, SEGMENTS, jnp.zeros(()), make_selection(), block=0),
            "block=0 must be a pos",
        ),
        (lambda a: blocks.oracle(*a, SEGMENTS, jnp.zeros(()), make_selection(), block=2.0), "block=2.0 must be a pos"),
        (
            lambda a: blocks.attend_cached(*a[:3], LISTS, jnp.zeros((B, 10), jnp.int32), block=4),
            "block=4 must divide the cache's capacity of 10",
        ),
        (
            lambda a: blocks.extend_lists(LISTS, a[3], jnp.zeros((B, 10), jnp.int32), 0.0, make_selection(), block=3),
            "block=3 must divide the cache's capacity of 10",
        ),
    ],
)
def test_bad_blocks(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_inputs(10))


SEGMENTS = jnp.zeros((B, 10), jnp.int32)
LISTS = jnp.zeros((B, 2, 1), jnp.int32)
