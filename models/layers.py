"""Parts that every layer uses: parameters, RMSNorm, rotary positions, the gated feed-forward."""

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import Architecture, ModelConfig, RopeScaling
from models.sharding import whole

_UNSCALED = RopeScaling()


class Rotation(NamedTuple):
    """Rotary tables: cosine and sine of every position's angles [B or 1, T, E/2], float32 or wider."""

    cos: jax.Array
    sin: jax.Array


class View(NamedTuple):
    """How a layer sees the text: rotary tables and, if it has a window, how many latest keys, an int32 scalar."""

    rotation: Rotation
    window: jax.Array | None = None


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int, gain: float = 1.0) -> nnx.Param:
    """A float32 parameter of standard deviation gain / sqrt(fan_in), normal truncated at two deviations.

    `axes` names each dimension for the sharding rules and stays on the parameter as metadata. It is
    deliberately not flax's own sharding metadata, which would place the array as soon as it is made.
    """
    init = jax.nn.initializers.truncated_normal(stddev=1.0)
    # 0.8796 is the deviation of a standard normal truncated at two.
    scale = gain / (0.87962566 * fan_in**0.5)
    return nnx.Param(scale * init(rngs.params(), shape, jnp.float32), axes=axes)


def constant(shape: tuple[int, ...], axes: tuple[str, ...], value: float) -> nnx.Param:
    """A float32 parameter filled with `value`; `axes` as in `weight`."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


def linear(x: jax.Array, w: nnx.Param, inputs: int = 1, preferred_element_type: jnp.dtype | None = None) -> jax.Array:
    """Contracts the last `inputs` dimensions of x [B, T, ...] with the first of w, in x's dtype.

    It is one product of matrices, [B·T, in] by [in, out]: XLA's backward on CPUs is several times slower
    where a weight's gradient contracts two dimensions.
    """
    B, T = x.shape[:2]
    w_IO = whole(w, x.dtype)
    out_shape = w_IO.shape[inputs:]
    w_IO = w_IO.reshape(math.prod(w_IO.shape[:inputs]), math.prod(out_shape))
    y_NO = jnp.matmul(x.reshape(B * T, -1), w_IO, preferred_element_type=preferred_element_type)
    return y_NO.reshape(B, T, *out_shape)


def linears(x: jax.Array, *w: nnx.Param, preferred_element_type: jnp.dtype | None = None) -> list[jax.Array]:
    """`linear` by each of several weights, as one product: small ones take a CPU as long as large ones."""
    whole_IO = [whole(each, x.dtype).reshape(x.shape[-1], -1) for each in w]
    y_BTO = jnp.matmul(
        x.reshape(-1, x.shape[-1]), jnp.concatenate(whole_IO, axis=1), preferred_element_type=preferred_element_type
    )
    parts = jnp.split(y_BTO, list(itertools.accumulate(part.shape[1] for part in whole_IO))[:-1], axis=1)
    return [part.reshape(*x.shape[:-1], *each.shape[1:]) for part, each in zip(parts, w, strict=True)]


def rms_norm(x_BTM: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """x / rms(x) over the last axis, computed in float32 and returned in x's dtype (arXiv 1910.07467)."""
    x32_BTM = x_BTM.astype(jnp.promote_types(x_BTM.dtype, jnp.float32))
    mean_square = jnp.mean(jnp.square(x32_BTM), axis=-1, keepdims=True)
    return (x32_BTM * jax.lax.rsqrt(mean_square + epsilon)).astype(x_BTM.dtype)


def norm_scale(width: int, axis: str, architecture: Architecture) -> nnx.Param:
    """The scale [width] of a norm that changes nothing yet; `axis` as in `weight`."""
    return constant((width,), (axis,), 0.0 if architecture.fixed.gemma else 1.0)


def scaled_norm(x_BTM: jax.Array, scale: nnx.Param, architecture: Architecture) -> jax.Array:
    """RMSNorm over the last axis with its scale, in x's dtype.

    Families differ in what they round first: Gemma multiplies by 1 + scale in float32 and casts the product,
    the others cast the norm and the scale.
    """
    epsilon = architecture.norm_epsilon
    if not architecture.fixed.gemma:
        return rms_norm(x_BTM, epsilon) * scale[...].astype(x_BTM.dtype)
    wide = jnp.promote_types(x_BTM.dtype, jnp.float32)
    return (rms_norm(x_BTM.astype(wide), epsilon) * (1 + scale[...].astype(wide))).astype(x_BTM.dtype)


def make_rotation(
    positions_BT: jax.Array, width: int, base: float, dtype: jnp.dtype = jnp.float32, scaling: RopeScaling = _UNSCALED
) -> Rotation:
    """Rotary tables (arXiv 2104.09864) of integer positions [B or 1, T] for heads of an even `width`."""
    frequency_E = _scale_frequency(base ** (-jnp.arange(0, width, 2, dtype=dtype) / width), base, scaling)
    angle_BTE = positions_BT.astype(dtype)[..., None] * frequency_E
    return Rotation(jnp.cos(angle_BTE) * scaling.attention_factor, jnp.sin(angle_BTE) * scaling.attention_factor)


def _scale_frequency(frequency_E: jax.Array, base: float, scaling: RopeScaling) -> jax.Array:
    if scaling.kind == "none":
        return frequency_E
    if scaling.kind == "linear":
        return frequency_E / scaling.factor
    if scaling.kind == "longrope":
        return frequency_E / jnp.array(scaling.factors, frequency_E.dtype)
    share_E = (_yarn_share if scaling.kind == "yarn" else _llama3_share)(frequency_E, base, scaling)
    return (1 - share_E) * frequency_E / scaling.factor + share_E * frequency_E


def _llama3_share(frequency_E: jax.Array, _: float, scaling: RopeScaling) -> jax.Array:
    """The share of the unscaled frequency, by how many wavelengths fit into the original context."""
    wavelengths_E = scaling.original_context * frequency_E / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    return jnp.clip((wavelengths_E - low) / (high - low), 0, 1)


def _yarn_share(frequency_E: jax.Array, base: float, scaling: RopeScaling) -> jax.Array:
    """The same by the number of a wavelength, from which it falls and to which it has fallen (section 3.2)."""
    width = 2 * len(frequency_E)

    def number(rotations: float) -> float:
        """Of the wavelength that fits so often into the original context."""
        return width * math.log(scaling.original_context / (2 * math.pi * rotations)) / (2 * math.log(base))

    low = max(math.floor(number(scaling.high_frequency_factor)), 0)
    high = min(math.ceil(number(scaling.low_frequency_factor)), width - 1)
    # The public code keeps the two apart by this much.
    steep = max(high - low, 1e-3)
    return 1 - jnp.clip((jnp.arange(len(frequency_E), dtype=frequency_E.dtype) - low) / steep, 0, 1)


def rotate(x_BTHE: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates the pairs (x[i], x[i + R/2]) of every head's first R numbers by their position's angles, where R/2 is the
    width of the tables; keeps x's dtype."""
    cos, sin = rotation.cos[:, :, None, :], rotation.sin[:, :, None, :]
    rotated, rest = jnp.split(x_BTHE, [2 * cos.shape[-1]], axis=-1)
    first, second = jnp.split(rotated.astype(jnp.promote_types(x_BTHE.dtype, jnp.float32)), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x_BTHE.dtype), rest], axis=-1)


class FeedForward(nnx.Module):
    """W_down (silu(W_gate x) · W_up x) (SwiGLU, arXiv 2002.05202), [B, T, M] to [B, T, M]; Gemma's has a GELU."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        M, F = config.d_model, config.d_ff
        self.gate = weight(rngs, (M, F), ("embed", "mlp"), fan_in=M)
        self.up = weight(rngs, (M, F), ("embed", "mlp"), fan_in=M)
        self.down = weight(rngs, (F, M), ("mlp", "embed"), fan_in=F, gain=residual_gain(config))
        self.gelu = config.architecture.fixed.gemma

    def __call__(self, x_BTM: jax.Array) -> jax.Array:
        activation = functools.partial(jax.nn.gelu, approximate=True) if self.gelu else jax.nn.silu
        inner_BTF = activation(linear(x_BTM, self.gate)) * linear(x_BTM, self.up)
        return linear(inner_BTF, self.down)


def residual_gain(config: ModelConfig) -> float:
    """Gain of the 2·L projections that write to the residual stream, which keeps its variance independent of L."""
    return (2 * config.layers) ** -0.5
