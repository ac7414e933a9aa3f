"""Tiles of queries and blocks of keys, as pieces of arrays: what attention in linear memory is cut into.

A tile is `chunk` consecutive queries of a row; some are worked on `together`, as if they were rows of a larger batch
of Z = B · together. A tile reads its keys block by block. Axes beside the legend's: C queries of a tile, K keys of a
block.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.attention.keys import Reads, visible_keys

_STEP_ELEMENTS = 2**22  # bounds the scores that exist at one time, where tiles are worked on together
_KEYS_PER_QUERY = 4  # keys in a block, per query of the tile
_EXTENTS = 4  # a tile scores the keys up to the next of so many static extents: 5/8 of all pairs, not all of them
_TILES_PER_EXTENT = 4  # fewest that are worth compiling the scores once more
_UNION = 8  # times the keys of one query: about what a tile's queries choose together, of a short window all there is

Carry = Any


class Tiling(NamedTuple):
    """Queries of a tile, and tiles at a time: static."""

    chunk: int
    together: int = 1

    @property
    def rows(self) -> int:
        return self.chunk * self.together

    def cut(self, a_BTx: jax.Array, start: jax.Array) -> jax.Array:
        """The tiles from query `start` on, [Z, C, ...]."""
        part_BRx = rows(a_BTx, start, self.rows)
        return part_BRx.reshape(-1, self.chunk, *part_BRx.shape[2:])


class Keys(NamedTuple):
    """The keys that a tile reads: blocks `begin` to `end` - 1, each of `size` keys.

    Without `order` they are consecutive positions; otherwise order [Z, O] lists runs of `run` positions, by position /
    run and filled up with S / run. Each query attends to all of them that it sees, or, with chosen [Z, C, S], to those
    that it has chosen, by scores [Z, C, S] that are kept where no list is.
    """

    size: int
    begin: jax.Array | int
    end: jax.Array | int
    order: jax.Array | None = None
    chosen: jax.Array | None = None
    scores: jax.Array | None = None
    run: int = 1

    def runs(self, i: jax.Array) -> jax.Array:
        """What block i has of `order`, [Z, K / run]."""
        n = self.size // self.run
        return rows(self.order, i * n, n)

    def over_blocks(self, step: Callable[[jax.Array | int, Carry], Carry], carry: Carry) -> Carry:
        """Runs step(i, carry) over the blocks. A single one, known before the run, needs no loop and its copies."""
        if isinstance(self.end, int) and self.end == 1:
            return step(0, carry)
        return jax.lax.fori_loop(self.begin, self.end, step, carry)


def at_once(elements: int) -> int:
    """How many things of so many scores are worked on together."""
    return max(1, _STEP_ELEMENTS // elements)


def pad(a: jax.Array, multiple: int, mode: str = "constant", **options: int) -> jax.Array:
    """Pads axis 1 to a multiple, as jnp.pad does."""
    return jnp.pad(a, ((0, 0), (0, -a.shape[1] % multiple)) + ((0, 0),) * (a.ndim - 2), mode, **options)


def key_block(S: int, chunk: int) -> int:
    """Keys in a block of consecutive or chosen ones. Arrays over keys are padded to a multiple of it."""
    return min(_KEYS_PER_QUERY * chunk, S)


def over_tiles(
    step: Callable[[Carry, jax.Array], tuple[Carry, Any]], carry: Carry, T: int, tiling: Tiling
) -> tuple[Carry, Any]:
    """Runs step(carry, first query) over all tiles, and joins what it returns for each [Z, C, ...] to [B, T, ...].

    Results are written in place, since those of a scan would stand beside their transpose.
    """

    def join(a_ZCx: jax.Array) -> jax.Array:
        return _to_bits(a_ZCx.reshape(-1, tiling.rows, *a_ZCx.shape[2:]))

    shapes = jax.eval_shape(lambda c: step(c, jnp.int32(0))[1], carry)
    parts = jax.eval_shape(lambda tree: jax.tree.map(join, tree), shapes)
    out = jax.tree.map(lambda a: jnp.zeros((a.shape[0], T, *a.shape[2:]), a.dtype), parts)

    def body(i: jax.Array, state: tuple[Carry, Any]) -> tuple[Carry, Any]:
        carry, new = step(state[0], i * tiling.rows)
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * tiling.rows, axis=1)
        return carry, jax.tree.map(lambda a, tile: write(a, join(tile)), state[1], new)

    carry, out = jax.lax.fori_loop(0, T // tiling.rows, body, (carry, out))
    return carry, jax.tree.map(lambda a, shape: _from_bits(a, shape.dtype), out, shapes)


def at_extent(compute: Callable[[int], Any], tile: Reads, S: int) -> Any:
    """compute(X) for a static number X of keys that holds all that the tile sees."""
    count = max(1, min(_EXTENTS, S // (tile.position.shape[1] * _TILES_PER_EXTENT)))
    extents = [-(-S * (i + 1) // count) for i in range(count)]
    end = jnp.minimum(jnp.max(tile.position) + 1, S)
    branch = jnp.sum(end > jnp.array(extents), dtype=jnp.int32)
    return jax.lax.switch(branch, [functools.partial(compute, extent) for extent in extents])


def consecutive_keys(tile: Reads, S: int) -> Keys:
    """All keys from the earliest that the tile sees to its last query, or one block of all there are."""
    K = key_block(S, tile.position.shape[1])
    if K == S:
        return Keys(K, 0, 1)
    return Keys(K, jnp.min(tile.first) // K, jnp.minimum(jnp.max(tile.position), S - 1) // K + 1)


def chosen_keys(chosen_BCS: jax.Array, scores_BCS: jax.Array, tile: Reads, most: int) -> Keys:
    """The keys that any query of the tile chooses, or, where they are most of what there is, all that it sees.

    They are listed by the first query that chooses them, and by position among those of one query. So a
    query's keys stand where they stand whatever later queries choose, and blocks of them add up to the same
    bits: not even a rounding depends on the future.
    """
    _, C, S = chosen_BCS.shape
    if most * _UNION > S:
        return consecutive_keys(tile, S)._replace(chosen=chosen_BCS, scores=scores_BCS)
    row_1C1 = jnp.arange(C, dtype=jnp.int32)[None, :, None]
    first_row_BS = jnp.min(jnp.where(chosen_BCS, row_1C1, C), axis=1)
    place_BS = jnp.sort(first_row_BS * S + jnp.arange(S, dtype=jnp.int32), axis=1)
    order_BS = jnp.where(place_BS < C * S, place_BS % S, S)
    count = jnp.max(jnp.sum(first_row_BS < C, axis=1, dtype=jnp.int32))
    K = key_block(S, C)
    return Keys(K, 0, -(-count // K), order_BS, chosen_BCS)


def listed_blocks(list_ZA: jax.Array, block: int, S: int, together: int) -> Keys:
    """The keys of the listed blocks, of which a query attends to all that it sees; -1 lists none."""
    list_ZA = pad(list_ZA, together, constant_values=-1)
    end = 1
    if list_ZA.shape[1] > together:
        end = -(-jnp.max(jnp.sum(list_ZA >= 0, axis=1, dtype=jnp.int32)) // together)
    return Keys(together * block, 0, end, jnp.where(list_ZA < 0, S // block, list_ZA), run=block)


def _to_bits(a: jax.Array) -> jax.Array:
    """Half-precision floats as integers: on CPUs, XLA moves floats of half precision as copies in float32."""
    return jax.lax.bitcast_convert_type(a, jnp.uint16) if a.dtype.itemsize == 2 else a


def _from_bits(a: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.bitcast_convert_type(a, dtype) if a.dtype != dtype else a


def rows(a_BTx: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """a[:, start : start + size]."""
    return _from_bits(jax.lax.dynamic_slice_in_dim(_to_bits(a_BTx), start, size, axis=1), a_BTx.dtype)


def take_rows(a_BSx: jax.Array, at_BR: jax.Array) -> jax.Array:
    """a[b, at[b]] for every row b, [B, R, ...]; an index beyond the end gives some row."""
    taken = jax.vmap(lambda row, at: row.at[at].get(mode="clip"))(_to_bits(a_BSx), at_BR)
    return _from_bits(taken, a_BSx.dtype)


def block(keys: Keys, i: jax.Array, a_BSx: jax.Array) -> jax.Array:
    """The rows of block i, [Z, K, ...]; any rows where the list has ended."""
    if keys.order is None:
        return rows(a_BSx, i * keys.size, keys.size)
    at_ZR, (B, _, *x) = keys.runs(i), a_BSx.shape
    return take_rows(a_BSx.reshape(B, -1, keys.run, *x), at_ZR.reshape(B, -1)).reshape(len(at_ZR), keys.size, *x)


def add_block(keys: Keys, i: jax.Array, total_BSx: jax.Array, new_ZKx: jax.Array) -> jax.Array:
    """Adds to the rows of block i."""
    start = i * keys.size
    if keys.order is None:
        now_BKx = rows(total_BSx, start, keys.size) + new_ZKx
        return jax.lax.dynamic_update_slice_in_dim(total_BSx, now_BKx, start, axis=1)
    B, _, *x = total_BSx.shape
    at_BR, total_BPWx = keys.runs(i).reshape(B, -1), total_BSx.reshape(B, -1, keys.run, *x)
    new_BRWx = new_ZKx.reshape(*at_BR.shape, keys.run, *x)
    add = jax.vmap(lambda row, at, new: row.at[at].add(new, mode="drop"))
    return add(total_BPWx, at_BR, new_BRWx).reshape(total_BSx.shape)


def block_mask(keys: Keys, i: jax.Array, tile: Reads) -> jax.Array:
    """Which keys of block i each query attends to, [Z, C, K]."""
    if keys.order is None and keys.chosen is not None:
        return jax.lax.dynamic_slice_in_dim(keys.chosen, i * keys.size, keys.size, axis=2)
    if keys.order is None:
        return visible_keys(tile, i * keys.size + jnp.arange(keys.size, dtype=jnp.int32))
    run_ZRW = keys.runs(i)[..., None] * keys.run + jnp.arange(keys.run, dtype=jnp.int32)
    position_ZK = run_ZRW.reshape(-1, keys.size)
    if keys.chosen is None:
        return visible_keys(tile, position_ZK)
    take = jax.vmap(lambda a_CS, position: a_CS.at[:, position].get(mode="clip"))
    return take(keys.chosen, position_ZK) & (position_ZK < keys.chosen.shape[2])[:, None]


def group(x_ZCHE: jax.Array, G: int) -> jax.Array:
    """Queries of the heads of a group, one head under the other: [Z, G, N, E], N = H/G · C."""
    Z, C, H, E = x_ZCHE.shape
    return x_ZCHE.reshape(Z, C, G, H // G, E).transpose(0, 2, 3, 1, 4).reshape(Z, G, H // G * C, E)


def ungroup(x_ZGNE: jax.Array, C: int) -> jax.Array:
    """The inverse of `group`."""
    Z, G, N, E = x_ZGNE.shape
    return x_ZGNE.reshape(Z, G, N // C, C, E).transpose(0, 3, 1, 2, 4).reshape(Z, C, G * (N // C), E)
