"""Attention on eight devices against one: python -m tests.models.attention.sharded VARIANT…, in a process with eight.

Batches are split over `data`, key/value heads over `tensor`, and the sequence over `sequence`.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from models import ModelConfig
from models.attention import Attention
from models.layers import make_rotation

BASE = ModelConfig(
    d_model=16, heads=4, kv_heads=2, head_width=4, indexer_width=4, k_base=6, k_min=2, k_max=8, attention="gated_sparse"
)
VARIANTS = {
    "at once": {},
    "tiles": {"query_chunk": 4},
    "dense tiles": {"query_chunk": 4, "attention": "gated"},
    "blocks": {"selection": "block", "block": 4},
}
AXES = {"heads": "tensor", "kv_heads": "tensor"}


def loss(graphdef, params, rest, x_BTM):
    module = nnx.merge(graphdef, params, rest)
    segments_BT = (jnp.arange(x_BTM.shape[1]) >= 9).astype(jnp.int32) + jnp.zeros(x_BTM.shape[:2], jnp.int32)
    rotation = make_rotation(jnp.arange(x_BTM.shape[1])[None], 4, 1e4, jnp.float64)
    y_BTM, metrics = module(x_BTM, segments_BT, rotation)
    return jnp.sum(jnp.sin(y_BTM)) + metrics["indexer_loss"]


def compare(mesh, config):
    graphdef, params, rest = nnx.split(Attention(config, rngs=nnx.Rngs(0)), nnx.Param, ...)
    rest = jax.tree.map(lambda a: jnp.full_like(a, 1e-3), rest)
    x_BTM = jax.random.normal(jax.random.key(1), (4, 24, 16), jnp.float64)
    gradients = jax.jit(jax.value_and_grad(loss, argnums=(1, 3)), static_argnums=0)
    expected = jax.device_get(gradients(graphdef, params, rest, x_BTM))
    place = lambda p: p.replace(  # noqa: E731
        jax.device_put(p[...], NamedSharding(mesh, P(*(AXES.get(name) for name in p.get_metadata("axes")))))
    )
    params = jax.tree.map(place, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    x_BTM = jax.device_put(x_BTM, NamedSharding(mesh, P("data", "sequence", None)))
    actual = jax.device_get(jax.block_until_ready(gradients(graphdef, params, rest, x_BTM)))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # Parameters, and so their gradients, are float32.
        tolerance = 1e-10 if a.dtype == np.float64 else 1e-6
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * max(np.max(np.abs(e)), 1))


def main():
    jax.config.update("jax_enable_x64", True)
    mesh = jax.make_mesh((2, 2, 2), ("data", "sequence", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    for name in sys.argv[1:]:
        compare(mesh, dataclasses.replace(BASE, dtype="float64", **VARIANTS[name]))
        print("equal:", name)


if __name__ == "__main__":
    main()
