import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import reference, streamed, tiles
from models.attention.reference import IndexInputs, Selection

SHAPE = {"B": 2, "T": 29, "H": 4, "G": 2, "E": 6, "J": 2, "I": 5}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of keys and several extents, at lengths that are tested quickly."""
    monkeypatch.setattr(tiles, "_KEYS_PER_QUERY", 1)
    monkeypatch.setattr(tiles, "_TILES_PER_EXTENT", 2)
    monkeypatch.setattr(tiles, "_EXTENTS", 2)


def make_inputs(seed=0, dtype=jnp.float32, ties=False, **shape):
    B, T, H, G, E, J, I = (SHAPE | shape).values()
    rng, precise = np.random.default_rng(seed), jnp.promote_types(dtype, jnp.float32)

    def normal(*shape, dtype=precise):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    q, k, v = normal(B, T, H, E, dtype=dtype), normal(B, T, G, E, dtype=dtype), normal(B, T, G, E, dtype=dtype)
    query, key, gate, bias = normal(B, T, J, I), normal(B, T, I), jax.nn.sigmoid(normal(B, T, J)), normal(J)
    if ties:
        query, key, gate = jnp.round(query), jnp.round(key), jnp.round(4 * gate) / 4
    return q, k, v, IndexInputs(query, key, gate, bias)


def make_segments(kind, B, T):
    """The first rows are one document each, the last one is of a kind."""
    late, later = (np.arange(T) > T // 3).astype(int), (np.arange(T) > T // 2).astype(int)
    last = {"one": 0 * late, "documents": late + later, "padded": -later}[kind]
    return jnp.asarray([*[0 * late] * (B - 1), last], jnp.int32)


def make_selection(**fields):
    base = {"scale": 0.4, "temperature": 0.5, "k_rule": "paper", "k_base": 5, "k_min": 1, "k_max": 9}
    return Selection(**base | fields)


def value_and_gradients(function, inputs, segments, selection, running=0.01):
    """Output and statistics, and the gradients of a random linear function of output and loss."""
    q = inputs[0]
    weight = jax.random.normal(jax.random.key(8), q.shape, q.dtype)
    loss_weight = jax.random.normal(jax.random.key(9), q.shape[:2], inputs[3].query.dtype)

    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2, 3), has_aux=True)
    def run(q, k, v, index):
        o, statistics = function(q, k, v, index, segments, jnp.asarray(running, index.query.dtype), selection)
        return jnp.sum(o * weight) + jnp.sum(statistics.indexer_loss * loss_weight), (o, statistics)

    (_, results), gradients = jax.jit(run)(*inputs)
    return results, gradients


def assert_near(actual, expected, bound):
    """The largest error of each array is within `bound` of its largest entry; counts and sets are equal."""
    paths = jax.tree.leaves_with_path(expected)
    assert len(jax.tree.leaves(actual)) == len(paths)
    for a, (path, e) in zip(jax.tree.leaves(actual), paths, strict=True):
        assert a.dtype == e.dtype, path
        exact = not jnp.issubdtype(e.dtype, jnp.floating)
        error = np.abs(np.asarray(a, np.float64) - np.asarray(e, np.float64))
        assert np.max(error) <= (0 if exact else bound * np.max(np.abs(np.asarray(e, np.float64)))), path


CASES = [
    # name, float64, chunk, segments, shape and selection
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
    ("everything", False, 8, "documents", {}, {"k_rule": "fixed", "k_base": 29}),
]


@pytest.mark.parametrize(
    ("x64", "chunk", "segments", "shape", "fields"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_streamed_is_the_oracle(x64, chunk, segments, shape, fields):
    with jax.enable_x64(x64):
        inputs = make_inputs(dtype=jnp.float64 if x64 else jnp.float32, **shape)
        segments, selection = make_segments(segments, *inputs[0].shape[:2]), make_selection(**fields)
        expected = value_and_gradients(reference.sparse_attention, inputs, segments, selection)
        function = functools.partial(streamed.sparse_attention, chunk=chunk)
        actual = value_and_gradients(function, inputs, segments, selection)
        assert_near(actual, expected, 1e-10 if x64 else 1e-5)


def test_bfloat16_is_near_the_oracle():
    """The scores are float32 in both, so the sets are equal. What is left are the roundings of bfloat16, each a
    relative 2^-9: weights and outputs forward, weights, logit gradients and results backward. A weighted mean
    of rounded terms is no further off than its terms, so 2 · 2^-9 of the largest value bounds the output; the
    gradients take in o through delta, so 8 · 2^-9 bounds those. The loss sees float32 probabilities alone."""
    inputs = make_inputs(dtype=jnp.bfloat16)
    segments, selection = make_segments("documents", 2, 29), make_selection()
    expected = value_and_gradients(reference.sparse_attention, inputs, segments, selection)
    function = functools.partial(streamed.sparse_attention, chunk=8)
    actual = value_and_gradients(function, inputs, segments, selection)
    assert_near(actual[0][0], expected[0][0], 2**-8)
    assert_near(actual[0][1], expected[0][1], 1e-5)
    assert_near(actual[1][:3], expected[1][:3], 2**-6)
    assert_near(actual[1][3], expected[1][3], 1e-5)


@pytest.mark.parametrize("segments", ["documents", "padded"])
def test_dense_is_the_oracle(segments):
    q, k, v, _ = make_inputs()
    segments = make_segments(segments, 2, 29)

    def expected(q, k, v):
        o, p = reference.attend(q, k, v, reference.visible_mask(segments))
        return o, reference.first_token_probability(p, segments)

    def with_gradients(function):
        def loss(*inputs):
            o, first = function(*inputs)
            return jnp.sum(jnp.sin(o)) + jnp.sum(first), (o, first)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    actual = with_gradients(functools.partial(streamed.attend, segments_BT=segments, chunk=5))
    assert_near(actual, with_gradients(expected), 1e-5)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_everything_selected_is_dot_product_attention(kind):
    q, k, v, index = make_inputs()
    segments, selection = make_segments("one", 2, 29), make_selection(k_rule="fixed", k_base=40)
    if kind == "dense":
        o, _ = streamed.attend(q, k, v, segments, chunk=8)
    else:
        o, _ = streamed.sparse_attention(q, k, v, index, segments, jnp.zeros(()), selection, chunk=8)
    np.testing.assert_allclose(o, jax.nn.dot_product_attention(q, k, v, is_causal=True), rtol=2e-5, atol=2e-6)


@functools.partial(jax.jit, static_argnames=("selection", "chunk"))
def forward(inputs, segments, selection, chunk):
    results = streamed.sparse_attention(*inputs, segments, jnp.float32(0.01), selection, chunk=chunk)
    return results, streamed.attend(*inputs[:3], segments, chunk=chunk)


def splice(inputs, others, length):
    """The first tokens of `inputs`, then the later ones of `others`."""

    def join(a, b):
        return jnp.concatenate([a[:, :length], b[:, length:]], axis=1)

    index = IndexInputs(*map(join, inputs[3][:3], others[3][:3]), inputs[3].bias)
    return (*map(join, inputs[:3], others[:3]), index)


def test_no_query_depends_on_later_tokens():
    inputs, others = make_inputs(seed=1), make_inputs(seed=2)
    segments, selection = make_segments("documents", 2, 29), make_selection()
    expected = forward(inputs, segments, selection, 4)
    assert len(np.unique(expected[0][1].selected)) > 5
    for t in range(1, 29):
        changed = forward(splice(inputs, others, t), segments, selection, 4)
        for a, e in zip(jax.tree.leaves(changed), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a[:, :t], e[:, :t])


def test_batch_and_padding_change_nothing():
    inputs, segments, selection = make_inputs(), make_segments("documents", 2, 29), make_selection()
    expected = forward(inputs, segments, selection, 4)
    alone = forward(jax.tree.map(lambda a: a[1:] if a.ndim > 1 else a, inputs), segments[1:], selection, 4)
    assert_near(alone, jax.tree.map(lambda a: a[1:], expected), 1e-6)
    padded = jnp.pad(segments, ((0, 0), (0, 9)), constant_values=-1)
    longer = forward(splice(inputs, make_inputs(seed=1, T=38), 29), padded, selection, 4)
    assert_near(jax.tree.map(lambda a: a[:, :29], longer), expected, 1e-6)


def test_indexer_gradient_is_that_of_the_divergence():
    with jax.enable_x64(True):
        q, k, v, index = make_inputs(dtype=jnp.float64)
        segments = make_segments("documents", 2, 29)

        @jax.jit
        def loss(index):
            arguments = q, k, v, index, segments, jnp.float64(0.01), make_selection()
            return jnp.sum(streamed.sparse_attention(*arguments, chunk=8)[1].indexer_loss)

        gradient = jax.jit(jax.grad(loss))(index)
        direction = jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.ndim), a.shape, a.dtype), index)
        slope = sum(jnp.sum(g * d) for g, d in zip(gradient, direction, strict=True))
        moved = [jax.tree.map(lambda a, d, h=h: a + h * d, index, direction) for h in (1e-6, -1e-6)]
        assert all(jnp.max(jnp.abs(g)) > 1e-4 for g in gradient)
        np.testing.assert_allclose(slope, (loss(moved[0]) - loss(moved[1])) / 2e-6, rtol=1e-6)


def test_output_and_divergence_train_different_inputs():
    inputs, segments = make_inputs(), make_segments("documents", 2, 29)

    @jax.jit
    def gradients(cotangent):
        def run(*inputs):
            o, statistics = streamed.sparse_attention(*inputs, segments, jnp.float32(0.01), make_selection(), chunk=8)
            others = statistics.variance + jnp.sum(statistics.first_token, axis=-1)
            return jnp.sum(o**2), jnp.sum(statistics.indexer_loss), jnp.sum(others)

        return jax.vjp(run, *inputs)[1](tuple(cotangent))

    by_output, by_loss, by_others = (gradients(jnp.eye(3)[i]) for i in range(3))
    assert all(jnp.any(g != 0) for g in by_output[:3]) and all(jnp.all(g == 0) for g in by_output[3])
    assert all(jnp.all(g == 0) for g in by_loss[:3]) and all(jnp.any(g != 0) for g in by_loss[3])
    assert all(jnp.all(g == 0) for g in jax.tree.leaves(by_others))


def compile_training_step(T):
    def spec(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((1, *shape), dtype)

    index = (spec(T, 2, 8, dtype=jnp.float32), spec(T, 8, dtype=jnp.float32), spec(T, 2, dtype=jnp.float32))
    index = IndexInputs(*index, jax.ShapeDtypeStruct((2,), jnp.float32))
    selection = make_selection(k_base=512, k_min=64, k_max=1024)

    def loss(q, k, v, index, segments):
        arguments = q, k, v, index, segments, jnp.float32(0.01), selection
        o, statistics = streamed.sparse_attention(*arguments, chunk=32)
        return jnp.sum(o.astype(jnp.float32) ** 2) + jnp.sum(statistics.indexer_loss)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    inputs = spec(T, 4, 16), spec(T, 2, 16), spec(T, 2, 16), index, spec(T, dtype=jnp.int32)
    return step.lower(*inputs).compile()


def test_memory_of_training_is_linear():
    """Bytes at T = 4K, 8K, 16K lie on a line through about zero, and no array has two axes of length T."""
    steps = {T: compile_training_step(T) for T in (4096, 8192, 16384)}
    size = {T: step.memory_analysis().temp_size_in_bytes for T, step in steps.items()}
    assert size[16384] < 2.05 * size[8192] < 4.2 * size[4096]
    shapes = re.findall(r"\[([0-9,]+)\]", steps[8192].as_text())
    assert "1,8192,4,16" in shapes
    assert not [shape for shape in shapes if sum(int(n) >= 8192 for n in shape.split(",") if n) > 1]


def test_a_chunk_must_be_positive():
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        streamed.attend(*make_inputs()[:3], make_segments("one", 2, 29), chunk=0)
