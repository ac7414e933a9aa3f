"""How much of dense attention the indexer's selection keeps."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.attention import reference, streamed, tiles
from models.attention.reference import IndexInputs, Selection
from models.attention.selection import select_mask
from models.attention.tiles import Tile


class Quality(NamedTuple):
    """Per query, float32 [B, T], both in [0, 1].

    recall: the share of dense attention, averaged over heads, that falls on the selected keys.
    overlap: the share of the selected keys that are among the equally many to which dense attention, averaged
      over heads, gives most; of equal probabilities the lower position counts as larger.
    """

    recall: jax.Array
    overlap: jax.Array


def selection_quality(
    q_BTHE: jax.Array,
    k_BSGE: jax.Array,
    index: IndexInputs,
    segments_BT: jax.Array,
    running_variance: jax.Array,
    selection: Selection,
    *,
    chunk: int,
) -> Quality:
    """The quality of the sets that `sparse_attention` selects from the same arguments, in tiles of `chunk` queries.

    No gradient passes. A query that sees at most k keys has a quality of 1.

    Raises:
      ValueError: chunk is not positive.
    """
    T, G = q_BTHE.shape[1], k_BSGE.shape[2]
    chunk = tiles.usable_chunk(chunk, T)
    q_BTHE, k_BSGE, index = jax.lax.stop_gradient((q_BTHE, k_BSGE, index))
    query_BTJI, key_BSI, gate_BTJ, bias_J = index
    first_BT = reference.first_position(segments_BT)
    q_BTHE, query_BTJI, gate_BTJ, first_BT = tiles.pad((q_BTHE, query_BTJI, gate_BTJ, first_BT), chunk)
    k_BSGE, key_BSI = tiles.pad((k_BSGE, key_BSI), tiles.key_block(T, chunk))
    index = IndexInputs(query_BTJI, key_BSI, gate_BTJ, bias_J)

    def step(_: None, start: jax.Array) -> tuple[None, Quality]:
        tile = tiles.make_tile(first_BT, start, chunk)
        chosen_BCS = streamed.score_and_select(index, start, tile, running_variance, selection).chosen
        dense_BCS = _dense_attention(tiles.scaled_queries(q_BTHE, start, chunk, G), k_BSGE, tile)
        return None, _compare(chosen_BCS, dense_BCS, tile)

    _, quality = tiles.over_tiles(step, None, q_BTHE.shape[1], chunk)
    return jax.tree.map(lambda a: a[:, :T], quality)


def _dense_attention(q_BGNE: jax.Array, k_BSGE: jax.Array, tile: Tile) -> jax.Array:
    """A tile's dense attention, mean over heads; [B, C, S]."""
    B, S = k_BSGE.shape[:2]
    keys = tiles.consecutive_keys(tile, S)
    _, normaliser_BGN1 = tiles.attend_tile(q_BGNE, k_BSGE, k_BSGE, keys, tile)

    def write(i: jax.Array, dense_BCS: jax.Array) -> jax.Array:
        p_BGNK = tiles.probabilities(q_BGNE, normaliser_BGN1, k_BSGE, keys, tile, i)
        block_BCK = tiles.head_mean(p_BGNK, tile.chunk)
        return jax.lax.dynamic_update_slice_in_dim(dense_BCS, block_BCK, i * keys.size, axis=2)

    empty_BCS = jnp.zeros((B, tile.chunk, S), normaliser_BGN1.dtype)
    return jax.lax.fori_loop(keys.begin, keys.end, write, empty_BCS)


def _compare(chosen_BCS: jax.Array, dense_BCS: jax.Array, tile: Tile) -> Quality:
    visible_BCS = reference.visible_keys(*tile, jnp.arange(chosen_BCS.shape[2]))
    selected_BC = jnp.sum(chosen_BCS, axis=-1, dtype=jnp.int32)
    best_BCS = select_mask(dense_BCS, selected_BC, visible_BCS)
    shared_BC = jnp.sum(chosen_BCS & best_BCS, axis=-1) / selected_BC
    recall_BC = jnp.sum(jnp.where(chosen_BCS, dense_BCS, 0), axis=-1)
    return Quality(recall_BC.astype(jnp.float32), shared_BC.astype(jnp.float32))
