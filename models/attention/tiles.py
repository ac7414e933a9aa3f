"""Tiles of queries and blocks of keys: what streamed attention is made of.

A tile is `chunk` consecutive queries. It attends to its keys block by block with an online softmax, for all
heads at once. Every loop over blocks ends with the tile's last key, at run time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.attention import reference

_KEYS_PER_QUERY = 4  # keys in a step of the online softmax, per query of the tile
_EXTENTS = 4  # a tile scores the keys up to the next of so many static extents: 5/8 of all pairs, not all of them
_TILES_PER_EXTENT = 16  # fewest that are worth compiling the scores once more

Carry = Any


class Tile(NamedTuple):
    """Positions [1, C] of the queries, and the first positions [B, C] of their documents."""

    position_1C: jax.Array
    first_BC: jax.Array

    @property
    def chunk(self) -> int:
        return self.position_1C.shape[1]


class Keys(NamedTuple):
    """The keys that a tile reads: blocks `begin` to `end` - 1, each of `size` keys.

    Without `order` they are consecutive positions, and each query attends to all that it sees. Otherwise
    order [B, S] lists positions, filled up with S, and chosen [B, C, S] is the selected set.
    """

    size: int
    begin: jax.Array | int
    end: jax.Array
    order_BS: jax.Array | None = None
    chosen_BCS: jax.Array | None = None


def usable_chunk(chunk: int, T: int) -> int:
    """The chunk for T queries, at most T.

    Raises:
      ValueError: chunk is not positive.
    """
    if chunk < 1:
        raise ValueError(f"chunk={chunk!r} must be at least 1")
    return min(chunk, T)


def pad(arrays: tuple[jax.Array, ...], multiple: int) -> tuple[jax.Array, ...]:
    """Pads axis 1 with zeros to a multiple. Padded keys come after all queries, and so are seen by none."""
    extra = -arrays[0].shape[1] % multiple
    return tuple(jnp.pad(a, ((0, 0), (0, extra)) + ((0, 0),) * (a.ndim - 2)) for a in arrays)


def key_block(S: int, chunk: int) -> int:
    """Keys in a block. Arrays over keys are padded to a multiple of it."""
    return min(_KEYS_PER_QUERY * chunk, S)


def over_tiles(
    step: Callable[[Carry, jax.Array], tuple[Carry, Any]], carry: Carry, T: int, chunk: int
) -> tuple[Carry, Any]:
    """Runs step(carry, first query) over all tiles, and joins what it returns along axis 1.

    Results are written in place, since those of a scan would stand beside their transpose.
    """
    shapes = jax.eval_shape(lambda c: step(c, jnp.int32(0))[1], carry)
    out = jax.tree.map(lambda a: _to_bits(jnp.zeros((a.shape[0], T, *a.shape[2:]), a.dtype)), shapes)

    def body(i: jax.Array, state: tuple[Carry, Any]) -> tuple[Carry, Any]:
        carry, out = state
        carry, new = step(carry, i * chunk)
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * chunk, axis=1)
        return carry, jax.tree.map(lambda a, tile: write(a, _to_bits(tile)), out, new)

    carry, out = jax.lax.fori_loop(0, T // chunk, body, (carry, out))
    return carry, jax.tree.map(lambda a, shape: _from_bits(a, shape.dtype), out, shapes)


def at_extent(compute: Callable[[int], Any], tile: Tile, S: int) -> Any:
    """compute(X) for a static number X of keys that holds all that the tile sees."""
    count = max(1, min(_EXTENTS, S // (tile.chunk * _TILES_PER_EXTENT)))
    extents = [-(-S * (i + 1) // count) for i in range(count)]
    end = jnp.minimum(tile.position_1C[0, -1] + 1, S)
    branch = jnp.sum(end > jnp.array(extents), dtype=jnp.int32)
    return jax.lax.switch(branch, [functools.partial(compute, extent) for extent in extents])


def make_tile(first_BT: jax.Array, start: jax.Array, chunk: int) -> Tile:
    return Tile((start + jnp.arange(chunk, dtype=jnp.int32))[None], rows(first_BT, start, chunk))


def consecutive_keys(tile: Tile, S: int) -> Keys:
    """All keys from the tile's earliest document to its last query."""
    K = key_block(S, tile.chunk)
    return Keys(K, jnp.min(tile.first_BC) // K, jnp.minimum(tile.position_1C[0, -1], S - 1) // K + 1)


def union_keys(chosen_BCS: jax.Array) -> Keys:
    """The keys that any query of the tile selects.

    They are listed by the first query that selects them, and by position among those of one query. So a
    query's keys stand where they stand whatever later queries select, and blocks of them add up to the same
    bits: not even a rounding depends on the future.
    """
    _, C, S = chosen_BCS.shape
    row_1C1 = jnp.arange(C, dtype=jnp.int32)[None, :, None]
    first_row_BS = jnp.min(jnp.where(chosen_BCS, row_1C1, C), axis=1)
    place_BS = jnp.sort(first_row_BS * S + jnp.arange(S, dtype=jnp.int32), axis=1)
    order_BS = jnp.where(place_BS < C * S, place_BS % S, S)
    count = jnp.max(jnp.sum(first_row_BS < C, axis=1, dtype=jnp.int32))
    K = key_block(S, C)
    return Keys(K, 0, -(-count // K), order_BS, chosen_BCS)


def _to_bits(a: jax.Array) -> jax.Array:
    """Half-precision floats as integers: on CPUs, XLA moves floats of half precision as copies in float32."""
    return jax.lax.bitcast_convert_type(a, jnp.uint16) if a.dtype.itemsize == 2 else a


def _from_bits(a: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.bitcast_convert_type(a, dtype) if a.dtype != dtype else a


def rows(a_BTx: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """a[:, start : start + size]."""
    return _from_bits(jax.lax.dynamic_slice_in_dim(_to_bits(a_BTx), start, size, axis=1), a_BTx.dtype)


def block(keys: Keys, i: jax.Array, a_BSx: jax.Array) -> jax.Array:
    """The rows of block i, [B, K, ...]; any rows where the list has ended."""
    if keys.order_BS is None:
        return rows(a_BSx, i * keys.size, keys.size)
    take = jax.vmap(lambda row, position: row.at[position].get(mode="clip"))
    position_BK = rows(keys.order_BS, i * keys.size, keys.size)
    return _from_bits(take(_to_bits(a_BSx), position_BK), a_BSx.dtype)


def add_block(keys: Keys, i: jax.Array, total_BSx: jax.Array, new_BKx: jax.Array) -> jax.Array:
    """Adds to the rows of block i."""
    start = i * keys.size
    if keys.order_BS is None:
        now_BKx = rows(total_BSx, start, keys.size) + new_BKx
        return jax.lax.dynamic_update_slice_in_dim(total_BSx, now_BKx, start, axis=1)
    add = jax.vmap(lambda row, position, new: row.at[position].add(new, mode="drop"))
    return add(total_BSx, rows(keys.order_BS, start, keys.size), new_BKx)


def columns(keys: Keys, i: jax.Array, a_BCS: jax.Array) -> jax.Array:
    """The columns of block i, [B, C, K]; any columns where the list has ended."""
    if keys.order_BS is None:
        return jax.lax.dynamic_slice_in_dim(a_BCS, i * keys.size, keys.size, axis=2)
    take = jax.vmap(lambda a_CS, position: a_CS.at[:, position].get(mode="clip"))
    return take(a_BCS, rows(keys.order_BS, i * keys.size, keys.size))


def block_mask(keys: Keys, i: jax.Array, tile: Tile) -> jax.Array:
    """Which keys of block i each query attends to, [B, C, K]."""
    if keys.order_BS is None:
        return reference.visible_keys(*tile, i * keys.size + jnp.arange(keys.size, dtype=jnp.int32))
    listed_BK = rows(keys.order_BS, i * keys.size, keys.size) < keys.order_BS.shape[1]
    return columns(keys, i, keys.chosen_BCS) & listed_BK[:, None]


def scaled_queries(q_BTHE: jax.Array, start: jax.Array, chunk: int, G: int) -> jax.Array:
    """A tile's queries over sqrt(E), grouped."""
    return group(rows(q_BTHE, start, chunk) * q_BTHE.shape[-1] ** -0.5, G)


def group(x_BCHE: jax.Array, G: int) -> jax.Array:
    """Queries of the heads of a group, one head under the other: [B, G, N, E], N = H/G · C."""
    B, C, H, E = x_BCHE.shape
    return x_BCHE.reshape(B, C, G, H // G, E).transpose(0, 2, 3, 1, 4).reshape(B, G, H // G * C, E)


def ungroup(x_BGNE: jax.Array, C: int) -> jax.Array:
    """The inverse of `group`."""
    B, G, N, E = x_BGNE.shape
    return x_BGNE.reshape(B, G, N // C, C, E).transpose(0, 3, 1, 2, 4).reshape(B, C, G * (N // C), E)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _mask_heads(keys: Keys, i: jax.Array, tile: Tile, N: int) -> jax.Array:
    """`block_mask` for the grouped queries, [B, 1, N, K]."""
    mask_BCK = block_mask(keys, i, tile)
    B, C, K = mask_BCK.shape
    return jnp.broadcast_to(mask_BCK[:, None, None], (B, 1, N // C, C, K)).reshape(B, 1, N, K)


def attend_tile(
    q_BGNE: jax.Array, k_BSGE: jax.Array, v_BSGE: jax.Array, keys: Keys, tile: Tile
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention of scaled queries.

    Returns:
      The output [B, G, N, E] in v's dtype, and the logarithm of the softmax's denominator, float32
      [B, G, N, 1].
    """
    accumulate = jnp.promote_types(q_BGNE.dtype, jnp.float32)

    def step(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest_BGN1, total_BGN1, o_BGNE = state
        logits_BGNK = _matmul(q_BGNE, block(keys, i, k_BSGE).transpose(0, 2, 3, 1))
        logits_BGNK = jnp.where(_mask_heads(keys, i, tile, q_BGNE.shape[2]), logits_BGNK, -jnp.inf)
        now_BGN1 = jnp.maximum(largest_BGN1, jnp.max(logits_BGNK, axis=-1, keepdims=True))
        weight_BGNK, shrink_BGN1 = jnp.exp(logits_BGNK - now_BGN1), jnp.exp(largest_BGN1 - now_BGN1)
        total_BGN1 = total_BGN1 * shrink_BGN1 + jnp.sum(weight_BGNK, axis=-1, keepdims=True)
        v_BGKE = block(keys, i, v_BSGE).transpose(0, 2, 1, 3)
        o_BGNE = o_BGNE * shrink_BGN1 + _matmul(weight_BGNK.astype(v_BSGE.dtype), v_BGKE)
        return now_BGN1, total_BGN1, o_BGNE

    # Finite, since a query may have no key in the first blocks, and infinities have no difference.
    lowest_BGN1 = jnp.full((*q_BGNE.shape[:3], 1), jnp.finfo(accumulate).min / 2, accumulate)
    state = lowest_BGN1, jnp.zeros_like(lowest_BGN1), jnp.zeros(q_BGNE.shape, accumulate)
    largest_BGN1, total_BGN1, o_BGNE = jax.lax.fori_loop(keys.begin, keys.end, step, state)
    return (o_BGNE / total_BGN1).astype(v_BSGE.dtype), largest_BGN1 + jnp.log(total_BGN1)


def probabilities(
    q_BGNE: jax.Array, normaliser_BGN1: jax.Array, k_BSGE: jax.Array, keys: Keys, tile: Tile, i: jax.Array
) -> jax.Array:
    """Attention to block i, given `attend_tile`'s normaliser; zero where not selected; [B, G, N, K]."""
    logits_BGNK = _matmul(q_BGNE, block(keys, i, k_BSGE).transpose(0, 2, 3, 1))
    mask_B1NK = _mask_heads(keys, i, tile, q_BGNE.shape[2])
    return jnp.where(mask_B1NK, jnp.exp(logits_BGNK - normaliser_BGN1), 0)


def head_mean(p_BGNK: jax.Array, C: int) -> jax.Array:
    """The mean over all heads, [B, C, K]."""
    B, G, N, K = p_BGNK.shape
    return jnp.mean(p_BGNK.reshape(B, G * (N // C), C, K), axis=1)


def first_token(q_BGNE: jax.Array, normaliser_BGN1: jax.Array, k_BSGE: jax.Array, tile: Tile) -> jax.Array:
    """The probability of the document's first token, if it is selected; [B, C, H]."""
    B, G, N, E = q_BGNE.shape
    k_BCGE = jax.vmap(lambda row, position: row[position])(k_BSGE, tile.first_BC)
    q_BGRCE = q_BGNE.reshape(B, G, N // tile.chunk, tile.chunk, E)
    dots_BGRC = jnp.einsum("bgrce,bcge->bgrc", q_BGRCE, k_BCGE, preferred_element_type=normaliser_BGN1.dtype)
    return ungroup(jnp.exp(dots_BGRC.reshape(B, G, N, 1) - normaliser_BGN1), tile.chunk)[..., 0]


def attention_gradients(
    p_BGNK: jax.Array,
    q_BGNE: jax.Array,
    do_BGNE: jax.Array,
    delta_BGN1: jax.Array,
    k_BKGE: jax.Array,
    v_BKGE: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A block's gradients of the scaled queries [B, G, N, E], of k and of v [B, K, G, E], all in float32.

    `do` is the cotangent of the output, and `delta` the sum of output · cotangent over E.
    """
    dv_BGKE = _matmul(p_BGNK.astype(do_BGNE.dtype).swapaxes(2, 3), do_BGNE)
    dp_BGNK = _matmul(do_BGNE, v_BKGE.transpose(0, 2, 3, 1))
    ds_BGNK = (p_BGNK * (dp_BGNK - delta_BGN1)).astype(q_BGNE.dtype)
    dq_BGNE = _matmul(ds_BGNK, k_BKGE.transpose(0, 2, 1, 3))
    dk_BGKE = _matmul(ds_BGNK.swapaxes(2, 3), q_BGNE)
    return dq_BGNE, dk_BGKE.transpose(0, 2, 1, 3), dv_BGKE.transpose(0, 2, 1, 3)
