"""How arrays lie on devices: one table of axis names, and the few steps of a layer that cross devices.

A training step runs under `jax.shard_map` over the mesh axes run, data, fsdp and context: every device computes its own
windows, or along context its own part of them, and nothing else, whatever the kind of attention. What it needs of other
devices is said here. Of a matrix each holds 1 / (fsdp · context); it is gathered where it is used, one layer at a time,
and its gradient is summed and scattered back (Zhao et al., arXiv 2304.11277). Queries stay where they are, and keys,
values and index keys are gathered along context, as in Llama 3's training (arXiv 2407.21783, section 3.3.2). Outside of
such a step all of this does nothing. The axis tensor is left to XLA, which splits heads, feed-forward and vocabulary as
the parameters are split.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

BATCH_AXES = ("data", "fsdp")  # mesh axes that the windows of a batch are split over
_CONTEXT = "context"  # the mesh axis that the tokens of a window are split over
_MATRICES = ("fsdp", _CONTEXT)  # mesh axes that matrices are split over and gathered along

# Axis of a parameter → mesh axis; what is absent is replicated, and so are vectors along embed: they are small.
RULES = {"embed": _MATRICES, "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}


def mesh_axes(axes: tuple[str, ...]) -> tuple[str | tuple[str, ...] | None, ...]:
    """The mesh axis, or axes, of each dimension of a parameter.

    >>> mesh_axes(("embed", "heads", "head")), mesh_axes(("embed",))
    ((('fsdp', 'context'), 'tensor', None), (None,))
    """
    names = (RULES.get(axis) for axis in axes)
    return tuple(None if name == _MATRICES and len(axes) == 1 else name for name in names)


def whole(parameter: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    """A parameter as layers use it: in a dtype, and gathered over the devices that have its parts.

    It crosses devices in that dtype, and so does its gradient.
    """
    value = parameter[...].astype(dtype)
    if not (over := _of_matrices()) or _MATRICES not in (axes := mesh_axes(parameter.get_metadata("axes"))):
        return value
    return jax.lax.all_gather(value, over, axis=axes.index(_MATRICES), tiled=True)


def gathers() -> bool:
    """Whether matrices are split here, and so gathered where they are used."""
    return bool(_of_matrices())


def parts() -> int:
    """Into how many parts the windows are split here."""
    return jax.lax.axis_size(_CONTEXT) if _CONTEXT in _shared() else 1


def own(a_BTx: jax.Array) -> jax.Array:
    """This device's part of whole windows, which all devices have."""
    if (count := parts()) == 1:
        return a_BTx
    size = a_BTx.shape[1] // count
    return jax.lax.dynamic_slice_in_dim(a_BTx, jax.lax.axis_index(_CONTEXT) * size, size, axis=1)


def across(a_BTx: jax.Array) -> jax.Array:
    """Whole windows from the parts that the devices have; each part's gradient is summed over all of them."""
    return a_BTx if parts() == 1 else jax.lax.all_gather(a_BTx, _CONTEXT, axis=1, tiled=True)


def total(part: jax.Array) -> jax.Array:
    """The sum over the devices that share a batch; its gradient goes to each device's own part."""
    return _sum(part, axes) if (axes := _shared()) else part


def total_gradient(part: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The gradient of a parameter with these axes: `part` summed over the devices that `whole` has not summed over."""
    summed = _MATRICES if _MATRICES in mesh_axes(axes) else ()
    missing = tuple(axis for axis in _shared() if axis not in summed)
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
    return tuple(axis for axis in (*BATCH_AXES, _CONTEXT) if axis in mesh.manual_axes and mesh.shape[axis] > 1)


def _of_matrices() -> tuple[str, ...]:
    return tuple(axis for axis in _shared() if axis in _MATRICES)
