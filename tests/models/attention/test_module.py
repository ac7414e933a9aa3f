import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.attention import Attention, RunningVariance, oracle
from models.attention.indexer import index_scores, score_variance
from models.attention.keys import in_documents, visible_keys
from models.config import ATTENTION_KINDS
from models.layers import linear, make_rotation, rotate

SEGMENTS = jnp.array([[0] * 16, [0] * 6 + [1] * 10])
VISIBLE = visible_keys(in_documents(SEGMENTS), jnp.arange(16))
ROTATION = make_rotation(jnp.arange(16)[None], 4, 10000.0)


def make_input(seed=0):
    return jax.random.normal(jax.random.key(seed), (2, 16, 16))


def build(config):
    return Attention(config, rngs=nnx.Rngs(0))


@functools.partial(jax.jit, static_argnames=("graphdef", "train", "measure"))
def apply(graphdef, state, x, segments, rotation, train, measure):
    module = nnx.merge(graphdef, state)
    return module(x, segments, rotation, train=train, measure=measure), nnx.state(module)


def run(module, x, segments=SEGMENTS, rotation=ROTATION, train=False, measure=False):
    """Calls the module under jit and puts the new state back."""
    result, state = apply(*nnx.split(module), x, segments, rotation, train, measure)
    nnx.update(module, state)
    return result


def gradients(module, loss):
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    gradient = jax.jit(jax.grad(lambda p: loss(nnx.merge(graphdef, p, rest))))(params)
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(gradient)}


@pytest.mark.parametrize("attention", ["sparse", "gated_sparse"])
def test_language_loss_and_indexer_loss_share_no_parameter(tiny, attention):
    module = build(tiny(attention=attention))
    by_output = gradients(module, lambda m: jnp.sum(m(make_input(), SEGMENTS, ROTATION)[0] ** 2))
    by_loss = gradients(module, lambda m: m(make_input(), SEGMENTS, ROTATION)[1]["indexer_loss"])
    for path in by_output:
        trained_by_loss = "indexer" in path
        assert jnp.any(by_loss[path] != 0) == trained_by_loss, path
        assert jnp.any(by_output[path] != 0) == (not trained_by_loss), path


def test_indexer_loss_does_not_reach_the_input(tiny):
    module = build(tiny(attention="gated_sparse"))
    gradient = jax.jit(jax.grad(lambda x: module(x, SEGMENTS, ROTATION)[1]["indexer_loss"]))(make_input())
    assert jnp.all(gradient == 0)


@pytest.mark.parametrize("attention", ["sparse", "gated_sparse"])
def test_everything_selected_equals_the_kind_without_indexer(tiny, attention):
    config = tiny(attention=attention, k_rule="fixed", k_base=16)
    plain = build(tiny(attention={"sparse": "dense", "gated_sparse": "gated"}[attention]))
    module = build(config)
    nnx.update(module, nnx.state(plain, nnx.Param))
    y, _ = run(module, make_input())
    expected, _ = run(plain, make_input())
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("output_gate", ["elementwise", "headwise", "none"])
@pytest.mark.parametrize("value_gate", ["elementwise", "none"])
def test_gates_by_hand(tiny, output_gate, value_gate):
    module = build(tiny(attention="gated", output_gate=output_gate, value_gate=value_gate))
    x = make_input()
    y, metrics = run(module, x)

    def gate(part, shape):
        if part is None:
            return jnp.ones(shape)
        assert jnp.all(part.bias[...] == 0.5)
        return jax.nn.sigmoid(jnp.einsum("btm,mhe->bthe", x, part.weight[...]) + 0.5)

    values = jnp.einsum("btm,mhe->bthe", x, module.value[...]) * gate(module.value_gate, (2, 16, 2, 4))
    p = attention_probabilities(module, x)
    o = jnp.einsum("bhts,bshe->bthe", p, jnp.repeat(values, 2, axis=2))
    o *= gate(module.output_gate, (2, 16, 4, 4))
    np.testing.assert_allclose(y, jnp.einsum("bthe,hem->btm", o, module.out[...]), rtol=1e-4, atol=1e-6)
    if output_gate != "none":
        np.testing.assert_allclose(metrics["output_gate"], jnp.mean(gate(module.output_gate, ())), rtol=1e-5)
    assert ("output_gate" in metrics, "value_gate" in metrics) == (output_gate != "none", value_gate != "none")


def attention_probabilities(module, x):
    q, k = (rotate(linear(x, w), ROTATION) for w in (module.query, module.key))
    return oracle.attend_masked(q, k, jnp.zeros_like(k), VISIBLE)[1]


@pytest.mark.parametrize("attention", ATTENTION_KINDS)
def test_first_token_attention(tiny, attention):
    """Zero queries spread attention evenly, so the first token's share is 1 over the number of keys."""
    module = build(tiny(attention=attention, k_rule="fixed", k_base=16))
    module.query[...] = jnp.zeros_like(module.query[...])
    _, metrics = run(module, make_input(), measure=True)
    shares = [1 / n for length in (16, 6, 10) for n in range(2, length + 1)]
    np.testing.assert_allclose(metrics["first_token_attention"], np.mean(shares), rtol=1e-5)
    assert all(m.dtype == jnp.float32 and m.shape == () for m in metrics.values())
    if "sparse" in attention:
        assert metrics["first_token_selected"] == 1
        np.testing.assert_allclose(metrics["mean_k"], (17 * 8 + 7 * 3 + 11 * 5) / 32)


def test_padding_does_not_count(tiny):
    module = build(tiny(attention="gated_sparse"))
    x = make_input()
    padded = jnp.concatenate([x, 5 + make_input(1)], axis=1)
    segments = jnp.pad(SEGMENTS, ((0, 0), (0, 16)), constant_values=-1)
    rotation = make_rotation(jnp.arange(32)[None], 4, 10000.0)
    y, metrics = run(module, x, train=True)
    variance = module.variance()
    module.running_variance[...] = jnp.zeros(())
    y_padded, metrics_padded = run(module, padded, segments, rotation, train=True)
    np.testing.assert_allclose(y_padded[:, :16], y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(module.variance(), variance, rtol=1e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(metrics_padded[name], value, rtol=1e-5, err_msg=name)


def mean_variance(module, x):
    """Mean over the queries that see more than one key."""
    rows = score_variance(index_scores(module.indexer(x, ROTATION), module.selection.scale), VISIBLE)
    return jnp.mean(rows[jnp.sum(VISIBLE, axis=-1) > 1])


@pytest.mark.parametrize("width", [2, 4])
def test_the_indexer_rotates_a_part_of_its_width(tiny, width):
    """Its entries beyond the width stay as they are, and a score knows only how far apart query and key stand."""
    fields = {"attention": "sparse", "indexer_width": 6, "head_width": 8}
    plain, rotated = (build(tiny(**fields, indexer_rotary_width=w)).indexer for w in (0, width))
    near, far = (make_rotation(start + jnp.arange(16)[None], 8, 10000.0) for start in (0, 50))
    index, unrotated = rotated(make_input(), near), plain(make_input(), near)
    for a, b in ((index.query, unrotated.query), (index.key, unrotated.key)):
        np.testing.assert_array_equal(a[..., width:], b[..., width:])
        by_hand = rotate(b.reshape(2, 16, -1, 6)[..., :width], make_rotation(jnp.arange(16)[None], width, 10000.0))
        np.testing.assert_allclose(a.reshape(2, 16, -1, 6)[..., :width], by_hand, rtol=1e-5, atol=1e-6)
    scores, later = (index_scores(rotated(make_input(), r), 1.0) for r in (near, far))
    np.testing.assert_allclose(later, scores, rtol=1e-4)
    assert jnp.max(jnp.abs(scores - index_scores(unrotated, 1.0))) > 1e-2


def test_the_latest_keys_are_a_share_of_k(tiny):
    kept = {share: build(tiny(attention="sparse", local_share=share)).selection.keep_local for share in (0, 0.5, 1)}
    assert kept == {0: 0, 0.5: 2, 1: 4}


def test_running_variance_serves_the_next_step(tiny):
    module = build(tiny(attention="sparse", variance_decay=0.75))
    _, metrics = run(module, make_input(0), train=True)
    first = module.variance()
    np.testing.assert_allclose(first, mean_variance(module, make_input(0)), rtol=1e-5)
    # Without an earlier step every query took min(k_base, available).
    available = jnp.sum(VISIBLE, axis=-1)
    np.testing.assert_allclose(metrics["mean_k"], jnp.mean(jnp.minimum(available, 4.0)))
    run(module, make_input(0))
    assert module.variance() == first
    run(module, make_input(1), train=True)
    expected = 0.75 * first + 0.25 * mean_variance(module, make_input(1))
    np.testing.assert_allclose(module.variance(), expected, rtol=1e-5)


def test_a_batch_of_padding_leaves_the_variance(tiny):
    module = build(tiny(attention="sparse"))
    module.running_variance[...] = jnp.array(0.3)
    run(module, make_input(), jnp.full((2, 16), -1), train=True)
    assert module.variance() == jnp.float32(0.3)


def test_only_adaptive_rules_keep_a_variance(tiny):
    def variances(**fields):
        return jax.tree.leaves(nnx.state(build(tiny(**fields)), RunningVariance))

    assert len(variances(attention="sparse")) == 1
    assert not variances(attention="sparse", k_rule="fixed") and not variances(attention="gated")


@pytest.mark.parametrize("attention", ["gated", "gated_sparse"])
def test_tiles_of_queries_change_nothing(tiny, attention):
    whole, tiled = (build(tiny(attention=attention, query_chunk=chunk)) for chunk in (0, 4))
    expected, expected_metrics = run(whole, make_input(), train=True)
    actual, metrics = run(tiled, make_input(), train=True)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[name], rtol=1e-4, atol=1e-6, err_msg=name)
    by_output = [
        gradients(m, lambda m: sum(jnp.sum(x) for x in jax.tree.leaves(m(make_input(), SEGMENTS, ROTATION))))
        for m in (whole, tiled)
    ]
    for path, gradient in by_output[0].items():
        np.testing.assert_allclose(by_output[1][path], gradient, rtol=1e-3, atol=1e-5, err_msg=path)


def test_selecting_every_block_equals_selecting_every_token(tiny):
    everything = {"attention": "gated_sparse", "k_rule": "fixed", "k_base": 16}
    tokens, blocks = build(tiny(**everything)), build(tiny(**everything, selection="block", block=4))
    expected, actual = (run(module, make_input())[0] for module in (tokens, blocks))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"selection": "block", "block": 4}])
def test_measuring_adds_the_quality_of_the_selection(tiny, fields):
    for k, complete in [(16, True), (2, False)]:
        module = build(tiny(attention="sparse", k_rule="fixed", k_base=k, **fields))
        _, metrics = run(module, make_input(), measure=True)
        assert (metrics["selection_recall"] > 0.9999) == complete
        assert 0 < metrics["selection_overlap"] <= 1.0001
    measured = {"first_token_attention", "first_token_selected", "sink_rate", "selection_recall", "selection_overlap"}
    assert metrics.keys() - run(module, make_input())[1].keys() == measured
