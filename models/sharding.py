"""How arrays lie on devices: one table of axis names, and the few steps of a layer that cross devices.

A training step runs under `jax.shard_map` over the mesh axes run, data and fsdp: every device computes its own windows
and nothing else, whatever the kind of attention. What it needs of other devices is said here. Of a matrix each holds
1/fsdp; it is gathered where it is used, one layer at a time, and its gradient is summed and scattered back (Zhao et
al., arXiv 2304.11277). Outside of such a step all of this does nothing. The axis tensor is left to XLA, which splits
heads, feed-forward and vocabulary as the parameters are split.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

BATCH_AXES = ("data", "fsdp")  # mesh axes that the windows of a batch are split over

# Axis of a parameter → mesh axis; what is absent is replicated, and so are vectors along fsdp: they are small.
RULES = {"embed": "fsdp", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}


def mesh_axes(axes: tuple[str, ...]) -> tuple[str | None, ...]:
    """The mesh axis of each dimension of a parameter.

    >>> mesh_axes(("embed", "heads", "head")), mesh_axes(("embed",))
    (('fsdp', 'tensor', None), (None,))
    """
    names = (RULES.get(axis) for axis in axes)
    return tuple(None if name == "fsdp" and len(axes) == 1 else name for name in names)


def whole(parameter: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    """A parameter as layers use it: in a dtype, and gathered over fsdp.

    It crosses devices in that dtype, and so does its gradient.
    """
    value = parameter[...].astype(dtype)
    if not gathers() or "fsdp" not in (axes := mesh_axes(parameter.get_metadata("axes"))):
        return value
    return jax.lax.all_gather(value, "fsdp", axis=axes.index("fsdp"), tiled=True)


def gathers() -> bool:
    """Whether matrices are split here, and so gathered where they are used."""
    return "fsdp" in _shared()


def total(part: jax.Array) -> jax.Array:
    """The sum over the devices that share a batch; its gradient goes to each device's own part."""
    return _sum(part, axes) if (axes := _shared()) else part


def total_gradient(part: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The gradient of a parameter with these axes: `part` summed over the devices that `whole` has not summed over."""
    missing = tuple(axis for axis in _shared() if axis not in mesh_axes(axes))
    return jax.lax.psum(part, missing) if missing else part


def largest(part: jax.Array) -> jax.Array:
    """The largest over the devices that share a batch; without gradient."""
    return jax.lax.pmax(jax.lax.stop_gradient(part), axes) if (axes := _shared()) else part


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _sum(part: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(part, axes)


# Every device has the same cotangent of the sum, of which its own part is one term: summing them, as jax.lax.psum does
# where it does not track what is replicated, would count it once a device.
_sum.defvjp(lambda part, axes: (_sum(part, axes), None), lambda axes, _, cotangent: (cotangent,))


def _shared() -> tuple[str, ...]:
    """The axes of several devices that this computation shares its batch over: none outside of `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in BATCH_AXES if axis in mesh.manual_axes and mesh.shape[axis] > 1)
