import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import RunningVariance, token_losses
from models.config import ATTENTION_KINDS
from tests.models.making import make_decoder, make_graphdef

SEPARATOR, PADDING = 30, 31
AXES = {"vocab", "embed", "heads", "kv_heads", "head", "mlp", "indexer"}


def build(config, seed=0):
    """graphdef, parameters and other state, with a running variance as after some steps."""
    graphdef, params, state = nnx.split(make_decoder(config, seed), nnx.Param, ...)
    return graphdef, params, jax.tree.map(lambda v: jnp.full_like(v, 1e-3), state)


@functools.partial(jax.jit, static_argnames=("graphdef", "train"))
def forward(graphdef, params, state, tokens_BT, segments_BT=None, train=False):
    return nnx.merge(graphdef, params, state)(tokens_BT, segments_BT, train=train)


@functools.partial(jax.jit, static_argnames="graphdef")
def train_step(graphdef, params, state, tokens_BS):
    """The step of a trainer without an optimiser: loss, gradient and new state, by pure functions."""

    def loss(params):
        model = nnx.merge(graphdef, params, state)
        nats_BT, weights_BT, metrics = token_losses(model, tokens_BS, SEPARATOR, PADDING, train=True)
        total = jnp.sum(nats_BT * weights_BT) / jnp.sum(weights_BT) + metrics["indexer_loss"]
        return total, (metrics, nnx.split(model, nnx.Param, ...)[2])

    (value, (metrics, new_state)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return value, gradient, new_state, metrics


def assert_trees_close(actual, expected, **tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, **tolerance)


@pytest.mark.parametrize(
    "attention, k_rule",
    [
        ("dense", "fixed"),
        ("gated", "fixed"),
        ("sparse", "paper"),
        ("gated_sparse", "paper"),
        ("gated_sparse", "inverse"),
    ],
)
def test_no_logit_depends_on_the_future_or_on_another_document(tiny, attention, k_rule):
    model = build(tiny(attention=attention, k_rule=k_rule))
    T = 12
    segments_BT = jnp.tile(jnp.array([0] * 7 + [1] * 5), (T + 1, 1))
    tokens_T = jax.random.randint(jax.random.key(0), (T,), 0, SEPARATOR)
    # Row t differs from the last row at token t alone.
    tokens_BT = jnp.tile(tokens_T, (T + 1, 1)).at[jnp.arange(T), jnp.arange(T)].add(1) % SEPARATOR
    logits, _ = forward(*model, tokens_BT, segments_BT)
    change_BT = np.max(np.abs(logits[:-1] - logits[-1]), axis=-1)
    same_document = np.asarray(segments_BT[0][:, None] == segments_BT[0])
    may_change = np.triu(np.ones((T, T), bool)) & same_document
    assert np.all(change_BT[~may_change] < 1e-5)
    assert np.all(np.diag(change_BT) > 1e-3)
    if attention in ("dense", "gated"):
        assert np.all(change_BT[may_change] > 1e-6)


@pytest.mark.parametrize("attention", ATTENTION_KINDS)
def test_a_row_does_not_depend_on_its_batch(tiny, tokens_BS, attention):
    model = build(tiny(attention=attention))
    together, _ = forward(*model, tokens_BS)
    alone, _ = forward(*model, tokens_BS[1:2])
    np.testing.assert_allclose(together[1:2], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "attention, fields",
    [
        ("dense", {"scan_layers": False}),
        pytest.param("gated_sparse", {"scan_layers": False}, marks=pytest.mark.thorough),
        pytest.param("gated_sparse", {"remat": "full"}, marks=pytest.mark.thorough),
        ("gated_sparse", {"remat": "dots"}),
        ("gated_sparse", {"remat": "full", "scan_layers": False}),
    ],
)
def test_scan_and_remat_change_no_number(tiny, tokens_BS, attention, fields):
    graphdef, params, state = build(tiny(attention=attention))
    expected = train_step(graphdef, params, state, tokens_BS)
    other = make_graphdef(tiny(attention=attention, **fields))
    assert_trees_close(train_step(other, params, state, tokens_BS), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["dense", "gated_sparse"])
def test_a_population_trains_like_single_models(tiny, tokens_BS, attention):
    config = tiny(attention=attention)
    graphdef = make_graphdef(config)
    singles = [build(config, seed)[1:] for seed in (0, 1)]
    params, state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *singles)
    tokens_RBS = jnp.stack([tokens_BS, tokens_BS[:, ::-1]])
    population = jax.jit(jax.vmap(functools.partial(train_step, graphdef)))(params, state, tokens_RBS)
    for i, single in enumerate(singles):
        one = jax.tree.map(lambda a, i=i: a[i], population)
        assert_trees_close(one, train_step(graphdef, *single, tokens_RBS[i]), rtol=2e-5, atol=1e-6)


def test_a_population_initialises_like_single_models(tiny):
    def params(seed):
        return nnx.state(make_decoder(tiny(attention="gated_sparse"), seed), nnx.Param)

    keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
    population = jax.jit(jax.vmap(params))(keys)
    assert_trees_close(jax.tree.map(lambda a: a[1], population), params(1), rtol=1e-6)


def test_training_moves_one_variance_a_layer_and_evaluation_none(tiny, tokens_BS):
    graphdef, params, state = build(tiny(attention="gated_sparse"))
    (before,) = jax.tree.leaves(state)
    (after,) = jax.tree.leaves(train_step(graphdef, params, state, tokens_BS)[2])
    assert before.shape == after.shape == (2,)
    assert np.all(before != after) and after[0] != after[1]
    model = nnx.merge(graphdef, params, state)
    model(tokens_BS)
    assert np.all(jax.tree.leaves(nnx.state(model, RunningVariance))[0] == before)
    model(tokens_BS, train=True)
    assert np.all(jax.tree.leaves(nnx.state(model, RunningVariance))[0] != before)


def test_a_checkpoint_is_a_nested_dict_of_arrays(tiny, tokens_BS):
    graphdef, params, state = build(tiny(attention="gated_sparse"))
    saved = [nnx.to_pure_dict(part) for part in (params, state)]
    assert saved[0]["layers"]["attention"]["query"].shape == (2, 16, 4, 4)
    assert saved[1]["layers"]["attention"]["running_variance"].shape == (2,)
    _, other, fresh = build(tiny(attention="gated_sparse"), seed=5)
    nnx.replace_by_pure_dict(other, saved[0])
    nnx.replace_by_pure_dict(fresh, saved[1])
    np.testing.assert_array_equal(
        forward(graphdef, other, fresh, tokens_BS)[0], forward(graphdef, params, state, tokens_BS)[0]
    )


@pytest.mark.parametrize("output_gate", ["elementwise", "headwise"])
def test_every_parameter_names_its_dimensions(tiny, output_gate):
    config = tiny(attention="gated_sparse", output_gate=output_gate)
    params = nnx.state(make_decoder(config), nnx.Param)
    variables = jax.tree.leaves_with_path(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    seen = set()
    for path, variable in variables:
        stacked = "layers" in jax.tree_util.keystr(path)
        axes = variable.get_metadata("axes")
        assert len(axes) == variable.ndim - stacked, path
        assert variable.dtype == jnp.float32, path
        seen |= set(axes)
    assert seen == AXES


def test_initial_logits_are_moderate_and_layers_differ(tiny, tokens_BS):
    config = tiny(d_model=64, d_ff=128, vocab_size=512, layers=4)
    graphdef, params, state = build(config)
    logits, _ = forward(graphdef, params, state, tokens_BS)
    assert 0.7 < jnp.std(logits) < 1.4
    query = params["layers"]["attention"]["query"]
    assert jnp.max(jnp.abs(query[0] - query[1])) > 0.01
    np.testing.assert_allclose(jnp.std(params["layers"]["feed_forward"]["down"][...]), (128 * 8) ** -0.5, rtol=0.05)


@pytest.mark.parametrize("attention", ["dense", "gated"])
def test_bfloat16_stays_near_float32(tiny, tokens_BS, attention):
    _, params, state = build(tiny(attention=attention))
    logits = {}
    for dtype in ("float32", "bfloat16"):
        graphdef = make_graphdef(tiny(attention=attention, dtype=dtype))
        logits[dtype], _ = forward(graphdef, params, state, tokens_BS)
        assert logits[dtype].dtype == jnp.float32
    error = jnp.abs(logits["bfloat16"] - logits["float32"])
    assert 0 < jnp.max(error) < 0.05 and jnp.mean(error) < 0.01


def test_bfloat16_selection_stays_near_float32(tiny, tokens_BS):
    """Rounded inputs may swap keys of nearly equal scores, so the mean is bounded, not the largest error."""
    attention = "gated_sparse"
    _, params, state = build(tiny(attention=attention))
    losses, gradients = {}, {}
    for dtype in ("float32", "bfloat16"):
        graphdef = make_graphdef(tiny(attention=attention, dtype=dtype))
        losses[dtype], gradients[dtype], _, metrics = train_step(graphdef, params, state, tokens_BS)
        assert all(m.dtype == jnp.float32 for m in metrics.values())
    assert abs(losses["bfloat16"] - losses["float32"]) < 0.02
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(gradients["bfloat16"]))


def test_segments_of_another_shape_are_refused(tiny, tokens_BS):
    model = nnx.merge(*build(tiny()))
    with pytest.raises(ValueError, match=r"segments of shape \(3, 16\) must be \(3, 17\) like tokens"):
        model(tokens_BS, tokens_BS[:, 1:])
