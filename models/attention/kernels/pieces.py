"""What kernels compute of one tile of queries and one block of keys, and how arrays are cut into both."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_NOWHERE = 2**30  # where the keys of an entry that lists nothing lie: behind every query
_VMEM = 48 * 2**20  # bytes that a kernel may use; the least of v5e, v5p and v6e is 64 MiB a core

Array = Any  # an array; in a kernel the ref of the part that it sees
Place = Callable[..., tuple[jax.Array, jax.Array]]  # grid position → row of the batch, and part of the row


class How(NamedTuple):
    """What is static: W; H/G and G; E; the divisor of the indexer's logits; entries of a list at a time; whether to
    interpret."""

    block: int
    ratio: int
    groups: int
    width: int
    temperature: float
    together: int
    interpret: bool


class Queries(NamedTuple):
    """Of queries: q [B, T, H·E], over sqrt(E); index [B, J, T, I], scaled; gate [B, J, T]; position and first int32
    [B, 1, T]. In decoding index and gate are None, as are those of keys."""

    q: Array
    index: Array
    gate: Array
    position: Array
    first: Array


class Keys(NamedTuple):
    """Of keys: k and v [B, S, G·E], or [B, S, G, E] as a cache has them, which must not be copied; index [B, S, I]."""

    k: Array
    v: Array
    index: Array


class Saved(NamedTuple):
    """Of queries, logarithms of softmaxes' denominators: of the heads [B, G, P·N], of the indexer [B, 1, T]."""

    normaliser: Array
    index_normaliser: Array


class Cotangents(NamedTuple):
    """Of queries: output [B, T, H·E]; delta [B, G, P·N], its product with the output; loss [B, 1, T]."""

    output: Array
    delta: Array
    loss: Array


class Step(NamedTuple):
    """Where a sweep over lists is: the tile, its entries that are read now, and whether they are its first or last."""

    tile: jax.Array
    entries: list[jax.Array]
    opens: jax.Array
    closes: jax.Array


# The axis that is cut into tiles or blocks; axis 0 is B.
_AXES: dict[type, tuple[int, ...]] = {Queries: (1, 2, 2, 2, 2), Keys: (1, 1, 1), Saved: (2, 2), Cotangents: (1, 2, 2)}


def specs(arrays: Any, parts: int, at: Place, axes: tuple[int, ...] | None = None) -> Any:
    """Of a named tuple of arrays, each cut into so many parts, of which a grid position sees the one `at` it."""
    axes = axes or _AXES[type(arrays)]
    cut = ((a, axis) for a, axis in zip(arrays, axes, strict=True))
    return type(arrays)(*(None if a is None else spec(a.shape, axis, parts, at) for a, axis in cut))


def spec(shape: tuple[int, ...], axis: int, parts: int, at: Place) -> pl.BlockSpec:
    """Of one array, cut along an axis; axis 0 is B."""

    def index(*grid: Any) -> tuple[Any, ...]:
        row, part = at(*grid)
        return row, *(0,) * (axis - 1), part, *(0,) * (len(shape) - axis - 1)

    return pl.BlockSpec((None, *shape[1:axis], shape[axis] // parts, *shape[axis + 1 :]), index)


def call(kernel: Callable[..., None], interpret: bool, out_shape: Any, **grid: Any) -> Callable[..., Any]:
    """A Pallas call of a `PrefetchScalarGridSpec`, whose last axis adds up and whose others are independent."""
    order = ("parallel",) * (len(grid["grid"]) - 1) + ("arbitrary",)
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(**grid),
        compiler_params=pltpu.CompilerParams(dimension_semantics=order, vmem_limit_bytes=_VMEM),
        interpret=interpret,
    )


def over_lists(
    kernel: Callable[..., None],
    how: How,
    lists_BPA: jax.Array,
    inputs: tuple[tuple[Any, ...], Keys, jax.Array],
    out: tuple[Any, tuple[int, ...]],
    scratch: tuple[Any, ...] = (),
) -> Any:
    """Runs kernel(how, step, of the tile, of the keys, bias, out, scratch) over the lists of all tiles.

    Args:
      inputs: arrays of the queries as named tuples, of the keys, and the indexer's bias [J]. Several rows of lists may
        share a row of keys.
      out: shapes of what belongs to the queries, a named tuple, and the axis of each that is cut into tiles.
    """
    (B, P, A), n, (queries, keys, bias_J) = lists_BPA.shape, how.together, inputs
    sharing = B // keys.k.shape[0]

    def at_tile(b: Any, p: Any, i: Any, lists: Any) -> tuple[Any, Any]:
        return b, p

    def at_entry(j: int, b: Any, p: Any, i: Any, lists: Any) -> tuple[Any, Any]:
        entry = lists[(b * P + p) * A + i * n + j]
        # Of `//` Pallas lowers a sign as the chip does that JAX sees, which need not be the one it compiles for.
        return jax.lax.div(b, np.int32(sharing)), jnp.where(entry < 0, p, entry)

    def body(lists: Any, queries: Any, keys: Any, bias_J: Any, out: Any, *scratch: Any) -> None:
        b, p, i = (pl.program_id(axis) for axis in range(3))
        entries = [lists[(b * P + p) * A + i * n + j] for j in range(n)]
        kernel(how, Step(p, entries, i == 0, i == A // n - 1), queries, keys, bias_J, out, *scratch)

    of_keys = tuple(specs(keys, keys.k.shape[1] // how.block, functools.partial(at_entry, j)) for j in range(n))
    of_tile = tuple(specs(arrays, P, at_tile) for arrays in queries)
    grid = {"num_scalar_prefetch": 1, "grid": (B, P, A // n), "scratch_shapes": scratch}
    grid |= {"in_specs": (of_tile, of_keys, pl.BlockSpec(memory_space=pltpu.SMEM))}
    grid |= {"out_specs": (specs(out[0], P, at_tile, out[1]),)}
    return call(body, how.interpret, (out[0],), **grid)(lists_BPA.reshape(-1), queries, (keys,) * n, bias_J)[0]


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Contracts one axis of each of two matrices, into float32."""
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)


def clear(*refs: Array) -> None:
    """Sets to zero."""
    for ref in refs:
        ref[...] = jnp.zeros(ref.shape, ref.dtype)


def lanes(how: How, g: int) -> slice:
    """Where head g lies in what holds all heads side by side."""
    return slice(g * how.width, (g + 1) * how.width)


def head(how: How, keys: Array, g: int) -> jax.Array:
    """The keys or values of head g, [K, E]."""
    return keys[:, lanes(how, g)] if len(keys.shape) == 2 else keys[:, g]


def stack(how: How, x_CM: Array, g: int) -> jax.Array:
    """The heads of group g of what holds all query heads, below each other; [N, E]."""
    heads = range(g * how.ratio, (g + 1) * how.ratio)
    return jnp.concatenate([x_CM[:, lanes(how, h)] for h in heads], axis=0)


def unstack(how: How, x_NE: jax.Array, g: int, out_CM: Array) -> None:
    """Writes what `stack` reads."""
    C = out_CM.shape[0]
    for r in range(how.ratio):
        head_CE = x_NE[r * C : (r + 1) * C]
        out_CM[:, lanes(how, g * how.ratio + r)] = head_CE.astype(out_CM.dtype)


def head_mean(how: How, p_GKN: list[jax.Array]) -> jax.Array:
    """Over the heads of all groups, [K, C]."""
    heads = [p_KN[:, r * how.block : (r + 1) * how.block] for p_KN in p_GKN for r in range(how.ratio)]
    return functools.reduce(jnp.add, heads) / len(heads)


def hidden(how: How, queries: Queries, entry: jax.Array) -> jax.Array:
    """0 where a query sees a key of the block that the entry lists, else -inf; [K, C]."""
    shape = (how.block, queries.position.shape[1])
    key_KC = jnp.where(entry < 0, _NOWHERE, entry * how.block) + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return jnp.where((queries.first[...] <= key_KC) & (key_KC <= queries.position[...]), 0.0, -jnp.inf)


def logits(how: How, g: int, keys: Keys, q_NE: jax.Array, hidden_KC: jax.Array) -> jax.Array:
    """Of attention in group g, [K, N]."""
    return dot(head(how, keys.k, g), q_NE, 1, 1) + jnp.concatenate([hidden_KC] * how.ratio, axis=1)


def probabilities(how: How, g: int, keys: Keys, q_NE: jax.Array, hidden_KC: jax.Array, saved: Saved) -> jax.Array:
    """Of attention in group g, [K, N]."""
    return jnp.exp(logits(how, g, keys, q_NE, hidden_KC) - saved.normaliser[g : g + 1])


def opened(query_JCI: Array, key_KI: jax.Array, bias_J: Array) -> list[jax.Array]:
    """The sigmoids of the indexer (see `indexer.index_scores`), [K, C] for each of its heads."""
    heads = range(query_JCI.shape[0])
    return [jax.nn.sigmoid(dot(key_KI, query_JCI[j], 1, 1) + bias_J[j]) for j in heads]


def gated(gate_JC: Array, open_JKC: list[jax.Array]) -> jax.Array:
    """The scores of the indexer, [K, C], wherever a query sees or not."""
    return functools.reduce(jnp.add, [gate_JC[j : j + 1] * open_KC for j, open_KC in enumerate(open_JKC)])
