import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas.training.step import Skeleton
from models import ModelConfig, become, can_become
from models.config import Architecture

LENGTH = 12
SHAPE = {"d_model": 16, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 4, "d_ff": 24, "vocab_size": 32}
EVERY_KEY = {"k_rule": "fixed", "k_base": LENGTH}


def converted(dtype="float32", family="qwen2", **fields):
    """A model with noise on every array, as after training, and what becomes of it; (skeleton, arrays) each."""
    architecture = Architecture(family=family)
    old = Skeleton(ModelConfig(**SHAPE, dtype=dtype, architecture=architecture))
    new = Skeleton(ModelConfig(**SHAPE, dtype=dtype, architecture=architecture, attention="gated_sparse", **fields))
    params = {
        n: p + 0.2 * jax.random.normal(jax.random.key(p.size), p.shape)
        for n, p in old.init(jax.random.key(0))[0].items()
    }
    fresh, buffers = new.init(jax.random.key(1))
    return (old, (params, {})), (new, (become(params, fresh), become({}, buffers)))


def logits(skeleton, arrays, tokens_BT):
    return jax.jit(lambda arrays: skeleton.merge(*arrays)(tokens_BT)[0])(arrays)


@pytest.mark.parametrize(
    "family, dtype, bias, bound",
    [("qwen2", "float32", 0.5, 1e-5), ("qwen2", "float64", 8.0, 1e-6), ("atlas", "float64", -1.0, 1e-6)],
)
def test_the_function_is_unchanged_while_every_key_is_selected(family, dtype, bias, bound):
    """Parameters are float32 whatever the dtype, so that dividing and multiplying by a gate rounds."""
    with jax.enable_x64(dtype == "float64"):
        dense, sparse = converted(dtype, family, gate_bias=bias, **EVERY_KEY)
        tokens_BT = jax.random.randint(jax.random.key(0), (2, 2 * LENGTH), 0, 32)
        expected, actual = logits(*dense, tokens_BT), logits(*sparse, tokens_BT)
    scale = np.max(np.abs(expected))
    np.testing.assert_allclose(actual[:, :LENGTH], expected[:, :LENGTH], rtol=0, atol=bound * scale)
    assert np.max(np.abs(actual - expected)) > 1e-3 * scale, "longer texts leave keys out"


def test_populations_are_converted_at_once():
    (_, (params, _)), (new, (arrays, _)) = converted()
    fresh, _ = new.init(jax.random.key(1))
    stacked = become(*(jax.tree.map(lambda a: jnp.stack([a, a]), tree) for tree in (params, fresh)))
    for name, value in arrays.items():
        np.testing.assert_array_equal(stacked[name][1], value, err_msg=name)


def test_gates_and_indexer_learn():
    _, (new, (params, buffers)) = converted(output_gate="headwise", **EVERY_KEY)

    def loss(params):
        output, metrics = new.merge(params, buffers)(jnp.arange(LENGTH)[None])
        return jnp.mean(jax.nn.logsumexp(output, -1) - output[..., 0]) + metrics["indexer_loss"]

    for name, gradient in jax.jit(jax.grad(loss))(params).items():
        if any(part in name for part in ("_gate.", "indexer.")):
            assert jnp.max(jnp.abs(gradient)) > 1e-5, name


@pytest.mark.parametrize("changes", [{"layers": 4}, {"d_ff": 8}, {"architecture": Architecture(family="qwen3")}])
def test_other_shapes_cannot_be_had(changes):
    assert not can_become(ModelConfig(), ModelConfig(**{"attention": "gated_sparse"} | changes))
