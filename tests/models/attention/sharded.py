"""Attention on eight devices against one: python -m tests.models.attention.sharded VARIANT…, in a process with eight.

Batches are split over `data`, key/value heads over `tensor`, and the sequence over `sequence`; kernels, which XLA
cannot split, have their own parts of the windows along `context`.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from models import ModelConfig, sharding
from models.attention import Attention, fused, kernels, oracle
from models.attention.kernels import listed
from models.layers import make_rotation
from tests.models.attention.inputs import assert_near, make_inputs, make_segments, make_selection, value_and_gradients

BASE = ModelConfig(
    d_model=16, heads=4, kv_heads=2, head_width=4, indexer_width=4, k_base=6, k_min=2, k_max=8, attention="gated_sparse"
)
VARIANTS = {
    "at once": {},
    "tiles": {"query_chunk": 4},
    "dense tiles": {"query_chunk": 4, "attention": "gated"},
    "blocks": {"selection": "block", "block": 4},
}
PARTS = 2
BLOCKS = functools.partial(kernels.attend, interpret=True)
KERNELS = {
    # Name, shape, selection, kernel by interpretation. Documents cross from one device to the next.
    "splash": (
        {"T": 256, "H": 2, "G": 1},
        None,
        lambda q, k, v, reads, _: fused.attend_splash(q, k, v, reads, interpret=True),
    ),
    "kernel": ({"T": 32}, make_selection(block=4, k_base=9, k_max=16), BLOCKS),
    "kernel, lists of one block": ({"T": 32}, make_selection(block=4, k_rule="fixed", k_base=1), BLOCKS),
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


def compare_kernel(shape, selection, attend):
    mesh = jax.make_mesh((PARTS,), ("context",), (AxisType.Auto,), devices=jax.devices()[:PARTS])
    inputs = make_inputs(**shape)
    segments = make_segments("documents", *inputs[0].shape[:2])

    def apart(q, k, v, reads, _):
        def part(q, k, v, reads):
            if reads.index is not None:
                reads = reads._replace(index=reads.index._replace(key=sharding.across(reads.index.key)))
            return attend(q, sharding.across(k), sharding.across(v), reads, selection)

        rows = P(None, "context")
        of_reads = jax.tree.map(lambda a: rows if a.ndim > 1 else P(), reads)
        specs = (rows, rows, rows, of_reads)
        return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=rows, check_vma=False)(q, k, v, reads)

    expected = value_and_gradients(oracle.attend, inputs, segments, selection)
    actual = value_and_gradients(apart, inputs, segments, selection)
    of = (lambda found: (found[0], found[1])) if selection else (lambda found: (found[0].output, found[1][:3]))
    assert_near(of(actual), of(expected), 1e-5)


def main():
    listed._TOGETHER = 8  # several steps a list
    jax.config.update("jax_enable_x64", True)
    mesh = jax.make_mesh((2, 2, 2), ("data", "sequence", "tensor"), axis_types=(AxisType.Auto,) * 3)
    for name in sys.argv[1:]:
        if name in VARIANTS:
            compare(mesh, dataclasses.replace(BASE, dtype="float64", **VARIANTS[name]))
        else:
            with jax.enable_x64(False):
                compare_kernel(*KERNELS[name])
        print("equal:", name)


if __name__ == "__main__":
    main()
