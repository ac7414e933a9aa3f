import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import Decoder, ModelConfig, count_params
from models.config import Architecture
from models.pretrained import to_gated_sparse

LENGTH = 12


def make(family, dtype="float32", **architecture):
    config = ModelConfig(
        d_model=16, layers=2, heads=4, kv_heads=2, head_width=4, d_ff=24, vocab_size=32, dtype=dtype,
        architecture=Architecture(family=family, **architecture),
    )  # fmt: skip
    model = Decoder(config, rngs=nnx.Rngs(0))
    # Biases and norms as after training.
    params = nnx.state(model, nnx.Param)
    noisy = jax.tree.map(lambda p: p + 0.2 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    nnx.update(model, noisy)
    return model, config


def logits(model, tokens_BT):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda s: nnx.merge(graphdef, s)(tokens_BT)[0])(state)


@pytest.mark.parametrize(
    "family, dtype, bias, bound", [("qwen2", "float32", 0.5, 1e-5), ("qwen2", "float64", 8.0, 1e-6)]
)
def test_the_function_is_unchanged_while_every_key_is_selected(family, dtype, bias, bound):
    with jax.enable_x64(dtype == "float64"):
        model, config = make(family, dtype)
        sparse, sparse_config = to_gated_sparse(model, config, length=LENGTH, rngs=nnx.Rngs(1), gate_bias=bias)
        assert sparse_config.attention == "gated_sparse" and (sparse_config.k_rule, sparse_config.k_base) == (
            "fixed",
            LENGTH,
        )
        tokens_BT = jax.random.randint(jax.random.key(0), (2, 2 * LENGTH), 0, 32)
        expected, actual = logits(model, tokens_BT), logits(sparse, tokens_BT)
        scale = np.max(np.abs(expected))
        np.testing.assert_allclose(actual[:, :LENGTH], expected[:, :LENGTH], rtol=0, atol=bound * scale)
        # Longer texts leave keys out.
        assert np.max(np.abs(actual - expected)) > 1e-3 * scale
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(sparse, nnx.Param)))
    assert count_params(sparse_config)["total"] == total


def test_gates_and_indexer_learn():
    sparse, _ = to_gated_sparse(*make("qwen2"), length=LENGTH, rngs=nnx.Rngs(1), output_gate="headwise")
    graphdef, params, rest = nnx.split(sparse, nnx.Param, ...)

    def loss(params):
        output, metrics = nnx.merge(graphdef, params, rest)(jnp.arange(LENGTH)[None])
        return jnp.mean(jax.nn.logsumexp(output, -1) - output[..., 0]) + metrics["indexer_loss"]

    gradient = jax.jit(jax.grad(loss))(params)["layers"]["attention"]
    for part in ("output_gate", "value_gate", "indexer"):
        assert all(jnp.max(jnp.abs(leaf)) > 1e-5 for leaf in jax.tree.leaves(gradient[part])), part


def test_fields_are_the_callers_choice():
    sparse, config = to_gated_sparse(*make("llama"), length=LENGTH, rngs=nnx.Rngs(1), k_base=4, value_gate="none")
    assert config.k_base == 4 and sparse.layers.attention.value_gate is None


def test_what_cannot_be_converted_is_refused():
    model, config = make("mistral", window=4)
    with pytest.raises(ValueError, match=r"architecture\.window=4 must be 0 for attention='gated_sparse'"):
        to_gated_sparse(model, config, length=LENGTH, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="attention='gated' must be 'dense'"):
        to_gated_sparse(model, dataclasses.replace(config, attention="gated"), length=LENGTH, rngs=nnx.Rngs(1))
