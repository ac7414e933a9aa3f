import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import oracle, streamed, tiles
from models.attention.keys import IndexInputs, in_documents, in_window
from tests.models.attention.inputs import (
    assert_near,
    make_inputs,
    make_segments,
    make_selection,
    run,
    splice,
    value_and_gradients,
)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several blocks of keys, several extents and a last step that is not full, at lengths that are tested quickly."""
    monkeypatch.setattr(tiles, "_KEYS_PER_QUERY", 1)
    monkeypatch.setattr(tiles, "_TILES_PER_EXTENT", 2)
    monkeypatch.setattr(tiles, "_EXTENTS", 2)
    monkeypatch.setattr(tiles, "_STEP_ELEMENTS", 2**8)
    monkeypatch.setattr(streamed, "_LISTED_KEYS", 8)


@functools.cache
def streaming(chunk):
    """One function for each chunk, so that programs are compiled once."""
    return functools.partial(streamed.attend, chunk=chunk)


CASES = [
    # name, float64, chunk, segments, shape, selection
    ("dense", True, 5, "documents", {}, None),
    ("paper", False, 8, "documents", {}, {}),
    ("inverse", True, 5, "padded", {}, {"k_rule": "inverse"}),
    ("fixed", True, 7, "one", {"H": 3, "G": 1}, {"k_rule": "fixed"}),
    ("one tile", True, 64, "documents", {"B": 1, "J": 1}, {}),
    ("one query", True, 1, "documents", {"T": 9}, {"k_rule": "fixed", "k_base": 3}),
    ("one token", False, 4, "one", {"T": 1}, {}),
    ("kept", True, 6, "documents", {"G": 4}, {"keep_first": 2, "keep_local": 3}),
    ("more kept than k", False, 8, "padded", {"T": 32}, {"k_rule": "fixed", "k_base": 1, "keep_local": 4}),
    ("ties", False, 8, "documents", {"ties": True, "I": 2}, {}),
    ("kept ties", True, 5, "one", {"ties": True, "I": 1}, {"k_rule": "fixed", "keep_first": 1, "keep_local": 1}),
    # A few of the keys, which a tile gathers; of the others it reads all in order.
    ("gathered", True, 5, "documents", {}, {"k_base": 2, "k_max": 3}),
    ("gathered ties", False, 6, "padded", {"ties": True}, {"k_rule": "fixed", "k_base": 3, "keep_local": 1}),
    ("everything", False, 8, "documents", {}, {"k_rule": "fixed", "k_base": 29}),
    ("blocks", True, 1, "documents", {"T": 37}, {"block": 4, "k_base": 9, "k_max": 16}),
    ("blocks in float32", False, 1, "padded", {"T": 37}, {"block": 4, "k_base": 9, "k_max": 16}),
    ("kept blocks", True, 1, "padded", {"T": 33}, {"block": 8, "k_rule": "inverse", "keep_first": 3, "keep_local": 10}),
    ("few blocks", True, 1, "documents", {"T": 21}, {"block": 5, "k_rule": "fixed", "k_base": 1, "keep_first": 7}),
    ("one block", True, 1, "one", {"T": 5}, {"block": 8, "k_rule": "fixed"}),
]
THOROUGH = ("one tile", "one query", "one token", "more kept than k", "kept ties", "fixed", "everything", "ties")
THOROUGH += ("gathered ties", "few blocks", "one block", "blocks in float32")


@pytest.mark.parametrize(
    ("x64", "chunk", "segments", "shape", "fields"),
    [pytest.param(*c[1:], id=c[0], marks=[pytest.mark.thorough] * (c[0] in THOROUGH)) for c in CASES],
)
def test_streamed_is_the_oracle(x64, chunk, segments, shape, fields):
    with jax.enable_x64(x64):
        inputs = make_inputs(dtype=jnp.float64 if x64 else jnp.float32, **shape)
        segments = make_segments(segments, *inputs[0].shape[:2])
        selection = None if fields is None else make_selection(**fields)
        expected = value_and_gradients(oracle.attend, inputs, segments, selection)
        actual = value_and_gradients(streaming(chunk), inputs, segments, selection)
        assert_near(actual, expected, 1e-10 if x64 else 1e-5)


def test_a_window_is_that_of_the_oracle():
    q, k, v, _ = make_inputs()
    reads = in_window(in_documents(make_segments("documents", 2, 29)), 6)
    expected, actual = (jax.jit(how)(q, k, v, reads).output for how in (oracle.attend, streaming(4)))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("block", [0, 4])
def test_bfloat16_is_near_the_oracle(block):
    """The scores are float32 in both, so the sets are equal. What is left are the roundings of bfloat16, each a
    relative 2^-9: weights and outputs forward, weights, logit gradients and results backward. A weighted mean
    of rounded terms is no further off than its terms, so 2 · 2^-9 of the largest value bounds the output; the
    gradients take in o through delta, so 8 · 2^-9 bounds those. The loss sees float32 probabilities alone."""
    inputs = make_inputs(dtype=jnp.bfloat16)
    segments, selection = make_segments("documents", 2, 29), make_selection(block=block)
    expected = value_and_gradients(oracle.attend, inputs, segments, selection)
    actual = value_and_gradients(streaming(8), inputs, segments, selection)
    assert_near(actual[0].output, expected[0].output, 2**-8)
    assert_near(actual[0][1:], expected[0][1:], 1e-5)
    assert_near(actual[1][:3], expected[1][:3], 2**-6)
    assert_near(actual[1][3], expected[1][3], 1e-5)


PATHS = {"dense": None, "tokens": {}, "gathered": {"k_base": 2, "k_max": 3}, "blocks": {"block": 4}}


@functools.partial(jax.jit, static_argnames="path")
def forward(inputs, segments, path):
    selection = None if PATHS[path] is None else make_selection(**PATHS[path])
    return run(streaming(4), inputs, segments, selection)


@pytest.mark.parametrize("path", PATHS)
def test_no_query_depends_on_later_tokens(path):
    inputs, others = make_inputs(seed=1), make_inputs(seed=2)
    segments = make_segments("documents", 2, 29)
    expected = forward(inputs, segments, path)
    if path == "tokens":
        assert len(np.unique(expected.selected)) > 5
    for t in range(1, 29):
        changed = forward(splice(inputs, others, t), segments, path)
        for a, e in zip(jax.tree.leaves(changed), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a[:, :t], e[:, :t])


@pytest.mark.parametrize("path", PATHS)
def test_batch_and_padding_change_nothing(path):
    inputs, segments = make_inputs(), make_segments("documents", 2, 29)
    expected = forward(inputs, segments, path)
    alone = forward(jax.tree.map(lambda a: a[1:] if a.ndim > 1 else a, inputs), segments[1:], path)
    padded = jnp.pad(segments, ((0, 0), (0, 9)), constant_values=-1)
    longer = forward(splice(inputs, make_inputs(seed=1, T=38), 29), padded, path)
    of_second, of_text = jax.tree.map(lambda a: a[1:], expected), jax.tree.map(lambda a: a[:, :29], longer)
    for actual, wanted in ((alone, of_second), (of_text, expected)):
        assert_near(actual._replace(indexer_loss=None), wanted._replace(indexer_loss=None), 1e-6)
        if path != "dense":
            # Arrays of other sizes may be multiplied in another order. Divergences are differences of logits of up to
            # J / temperature = 4, which are off by 2^-22 then.
            np.testing.assert_allclose(actual.indexer_loss, wanted.indexer_loss, rtol=0, atol=2 * 2**-22)


@pytest.mark.parametrize("block", [0, 4])
def test_output_and_divergence_train_different_inputs(block):
    inputs, segments = make_inputs(), make_segments("documents", 2, 29)
    selection = make_selection(k_base=9, k_min=9, k_max=16, block=block)

    @jax.jit
    def gradients(cotangent):
        def parts(inputs):
            attended = run(streaming(8), inputs, segments, selection)
            return jnp.sum(attended.output**2), jnp.sum(attended.indexer_loss), jnp.sum(attended.variance)

        return jax.vjp(parts, inputs)[1](tuple(cotangent))[0]

    by_output, by_loss, by_variance = (gradients(jnp.eye(3)[i]) for i in range(3))
    assert all(jnp.any(g != 0) for g in by_output[:3]) and all(jnp.all(g == 0) for g in by_output[3])
    assert all(jnp.all(g == 0) for g in by_loss[:3]) and all(jnp.any(g != 0) for g in by_loss[3])
    # Every index query that chooses among several keys learns, not only those that lists rest on.
    assert jnp.all(jnp.any(by_loss[3].query[:, 1:9] != 0, axis=(2, 3)))
    assert all(jnp.all(g == 0) for g in jax.tree.leaves(by_variance))


def compile_training_step(T, block):
    def spec(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    index = (spec(T, 2, 8, dtype=jnp.float32), spec(T, 8, dtype=jnp.float32), spec(T, 2, dtype=jnp.float32))
    index = IndexInputs(*index, jax.ShapeDtypeStruct((2,), jnp.float32))
    selection = make_selection(k_base=512, k_min=64, k_max=1024, block=block)

    def loss(inputs, segments):
        attended = run(streaming(32), inputs, segments, selection)
        return jnp.sum(attended.output.astype(jnp.float32) ** 2) + jnp.sum(attended.indexer_loss)

    inputs = spec(T, 4, 16), spec(T, 2, 16), spec(T, 2, 16), index
    return jax.jit(jax.value_and_grad(loss)).lower(inputs, spec(T, dtype=jnp.int32)).compile()


@pytest.mark.parametrize("block", [pytest.param(0, marks=pytest.mark.thorough), 16])
def test_memory_of_training_is_linear(block, monkeypatch):
    """Bytes at T = 4K, 8K, 16K lie on a line through about zero, and no array has two axes of length T."""
    monkeypatch.undo()
    monkeypatch.setattr(tiles, "_STEP_ELEMENTS", 2**17)
    steps = {T: compile_training_step(T, block) for T in (4096, 8192, 16384)}
    size = {T: step.memory_analysis().temp_size_in_bytes for T, step in steps.items()}
    assert max(size[16384] / size[8192], size[8192] / size[4096]) < 2.1  # one array [T, T] would make it 4
    shapes = re.findall(r"\[([0-9,]+)\]", steps[8192].as_text())
    assert "1,8192,4,16" in shapes
    assert not [shape for shape in shapes if sum(int(n) >= 8192 for n in shape.split(",") if n) > 1]
