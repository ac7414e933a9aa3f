"""Backward kernels: gradients of queries over the lists, and of keys over the inverted lists.

Both compute the probabilities again from the saved denominators. A block's keys are read by any number of tiles, from
one to all: pairs of block and tile are sorted by block, one pair a step, and what a block sums up stays on the chip
until its last tile. Nothing is added to memory by two steps at once, and the order of a sum is fixed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from models.attention.kernels import pieces
from models.attention.kernels.pieces import Array, Cotangents, How, Keys, Queries, Saved, Step

Tile = tuple[Queries, Saved, Cotangents]


class _OfQueries(NamedTuple):
    """Gradients: q [B, T, H·E], index [B, J, T, I], gate [B, J, T], and the bias at each query [B, J, T]."""

    q: Array
    index: Array
    gate: Array
    bias: Array


def of_queries(how: How, tile: Tile, keys: Keys, bias_J: jax.Array, lists_BPA: jax.Array) -> tuple[Queries, jax.Array]:
    """The gradients of the queries and of the bias."""
    shape = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tile[0])
    out = _OfQueries(shape.q, shape.index, shape.gate, shape.gate), (1, 2, 2, 2)
    scratch = (pltpu.VMEM((how.groups * how.width, how.ratio * how.block), jnp.float32),)
    found = pieces.over_lists(_query_gradients, how, lists_BPA, (tile, keys, bias_J), out, scratch)
    return Queries(found.q, found.index, found.gate, None, None), jnp.sum(found.bias, axis=(0, 2))


def _query_gradients(
    how: How, step: Step, tile: Tile, keys: tuple[Keys, ...], bias_J: Array, out: _OfQueries, dq_ME: Array
) -> None:
    @pl.when(step.opens)
    def open_tile() -> None:
        pieces.clear(dq_ME, out.index, out.gate, out.bias)

    @pl.when(step.entries[0] >= 0)
    def add_blocks() -> None:
        for entry, block in zip(step.entries, keys, strict=True):
            hidden_KC, p_GKN = pieces.hidden(how, tile[0], entry), []
            for g in range(how.groups):
                p_KN, ds_KN, *_ = _pair(how, g, tile, block, hidden_KC)
                lanes = pieces.lanes(how, g)
                dq_ME[lanes] += pieces.dot(block.k[:, lanes], ds_KN, 0, 0)
                p_GKN.append(p_KN)
            ddots, dgates = _index_pair(how, tile, block, bias_J, p_GKN, hidden_KC)
            for j, (ddot_KC, dgate_KC) in enumerate(zip(ddots, dgates, strict=True)):
                out.index[j] += pieces.dot(ddot_KC, block.index[...], 0, 0)
                out.gate[j : j + 1] += jnp.sum(dgate_KC, axis=0, keepdims=True)
                out.bias[j : j + 1] += jnp.sum(ddot_KC, axis=0, keepdims=True)

    @pl.when(step.closes)
    def close_tile() -> None:
        for g in range(how.groups):
            pieces.unstack(how, dq_ME[pieces.lanes(how, g)].T, g, out.q)


def _pair(
    how: How, g: int, tile: Tile, keys: Keys, hidden_KC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of a tile, a block and group g: probabilities and gradients of logits [K, N], queries and cotangents [N, E]."""
    queries, saved, cotangents = tile
    q_NE, do_NE = pieces.stack(how, queries.q, g), pieces.stack(how, cotangents.output, g)
    p_KN = pieces.probabilities(how, g, keys, q_NE, hidden_KC, saved)
    dp_KN = pieces.dot(keys.v[:, pieces.lanes(how, g)], do_NE, 1, 1)
    ds_KN = p_KN * (dp_KN - cotangents.delta[g : g + 1])
    return p_KN, ds_KN.astype(q_NE.dtype), q_NE, do_NE


def _index_pair(
    how: How, tile: Tile, keys: Keys, bias_J: Array, p_GKN: list[jax.Array], hidden_KC: jax.Array
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Gradients of the indexer's products and of its gates at each key, [K, C] for each of its heads."""
    queries, saved, cotangents = tile
    open_JKC = pieces.opened(queries.index, keys.index[...], bias_J)
    logits_KC = pieces.gated(queries.gate, open_JKC) / how.temperature + hidden_KC
    difference_KC = jnp.exp(logits_KC - saved.index_normaliser[...]) - pieces.head_mean(how, p_GKN)
    dscore_KC = cotangents.loss[...] * difference_KC / how.temperature
    ddots = [dscore_KC * queries.gate[j : j + 1] * open_KC * (1 - open_KC) for j, open_KC in enumerate(open_JKC)]
    return ddots, [dscore_KC * open_KC for open_KC in open_JKC]


def of_keys(how: How, tile: Tile, keys: Keys, bias_J: jax.Array, lists_BPA: jax.Array) -> Keys:
    """The gradients of the keys."""
    B, P, A = lists_BPA.shape
    steps, blocks = P * A, keys.k.shape[1] // how.block
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), keys)

    def at_tile(b: Any, e: Any, blocks: Any, tiles: Any) -> tuple[Any, Any]:
        return b, jnp.maximum(tiles[b * steps + e], 0)

    def at_block(b: Any, e: Any, blocks: Any, tiles: Any) -> tuple[Any, Any]:
        return b, blocks[b * steps + e]

    def body(blocks: Any, tiles: Any, tile: Any, keys: Any, bias_J: Any, out: Any, sums: Any) -> None:
        e, row = pl.program_id(1), pl.program_id(0) * steps
        block, p = blocks[row + e], tiles[row + e]
        opens = (e == 0) | (blocks[row + jnp.maximum(e - 1, 0)] != block)
        closes = (e == steps - 1) | (blocks[row + jnp.minimum(e + 1, steps - 1)] != block)

        @pl.when(opens)
        def open_block() -> None:
            pieces.clear(*sums)

        @pl.when(p >= 0)
        def add_tile() -> None:
            _add_key_gradients(how, block, tile, keys, bias_J, sums)

        @pl.when(closes)
        def close_block() -> None:
            for ref, total in zip(out, sums, strict=True):
                ref[...] = total[...].astype(ref.dtype)

    of_tile, of_keys = tuple(pieces.specs(arrays, P, at_tile) for arrays in tile), pieces.specs(keys, blocks, at_block)
    grid = {"num_scalar_prefetch": 2, "grid": (B, steps), "out_specs": (of_keys,)}
    grid |= {"in_specs": (of_tile, of_keys, pl.BlockSpec(memory_space=pltpu.SMEM))}
    scratch = jax.tree.map(lambda a: pltpu.VMEM((how.block, a.shape[2]), jnp.float32), keys)
    blocks_Be, tiles_Be = inverted(lists_BPA, blocks)
    run = pieces.call(body, how.interpret, (shapes,), scratch_shapes=(scratch,), **grid)
    found = run(blocks_Be.reshape(-1), tiles_Be.reshape(-1), tile, keys, bias_J)[0]
    return found if blocks == P else _listed(found, blocks_Be, tiles_Be, blocks)


def _listed(found: Keys, blocks_Be: jax.Array, tiles_Be: jax.Array, blocks: int) -> Keys:
    """0 for blocks that no tile lists, which no step has written; where all tiles are here each lists its own."""
    at_Be = jnp.where(tiles_Be < 0, blocks, blocks_Be)
    listed_BK = jax.vmap(lambda at: jnp.zeros(blocks, bool).at[at].set(True, mode="drop"))(at_Be)

    def keep(a_BSM: jax.Array) -> jax.Array:
        a_BKWM = a_BSM.reshape(*listed_BK.shape, -1, a_BSM.shape[2])
        return jnp.where(listed_BK[..., None, None], a_BKWM, 0).reshape(a_BSM.shape)

    return jax.tree.map(keep, found)


def _add_key_gradients(how: How, block: jax.Array, tile: Tile, keys: Keys, bias_J: Array, sums: Keys) -> None:
    queries = tile[0]
    hidden_KC, p_GKN = pieces.hidden(how, queries, block), []
    for g in range(how.groups):
        p_KN, ds_KN, q_NE, do_NE = _pair(how, g, tile, keys, hidden_KC)
        lanes = pieces.lanes(how, g)
        sums.k[:, lanes] += pieces.dot(ds_KN, q_NE, 1, 0)
        sums.v[:, lanes] += pieces.dot(p_KN.astype(do_NE.dtype), do_NE, 1, 0)
        p_GKN.append(p_KN)
    ddots, _ = _index_pair(how, tile, keys, bias_J, p_GKN, hidden_KC)
    for j, ddot_KC in enumerate(ddots):
        sums.index[...] += pieces.dot(ddot_KC, queries.index[j], 1, 0)


def inverted(lists_BPA: jax.Array, blocks: int) -> tuple[jax.Array, jax.Array]:
    """The pairs of a block and a tile that lists it, by block and then by tile: two int32 [B, P·A].

    Behind them, of the last of so many blocks, the entries that list nothing, with -1 for a tile.

    >>> blocks, tiles = inverted(jnp.array([[[0, -1], [0, 1], [0, 2]]]), 3)
    >>> blocks.tolist(), tiles.tolist()
    ([[0, 0, 0, 1, 2, 2]], [[0, 1, 2, 1, 2, -1]])
    """
    B, P, _ = lists_BPA.shape
    pair_BPA = jnp.where(lists_BPA < 0, blocks * P, lists_BPA * P + jnp.arange(P, dtype=jnp.int32)[:, None])
    pair_Be = jnp.sort(pair_BPA.reshape(B, -1), axis=1)
    return jnp.minimum(pair_Be // P, blocks - 1), jnp.where(pair_Be < blocks * P, pair_Be % P, -1)
