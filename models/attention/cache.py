"""What decoding keeps of the tokens it has read, and attention against it.

A row of the cache is one document. Its committed tokens stand in slots 0 to length - 1; what stands behind them
is left over from extensions that were not committed, and is never read: a query sees the slots up to its own
position, and all of those are written before it reads. Rollback is therefore a shorter length. Layers with a
window keep all slots too and mask those before it: a ring of slots would overwrite what a rollback returns to.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.attention import fused, kernels, oracle
from models.attention.indexer import index_scores
from models.attention.keys import Reads, Selection, visible_keys
from models.attention.selection import extend_lists, listed_keys, select_tokens

# Gathering pays where it reads far fewer rows than there are slots; a gathered row costs about as much as this
# many rows that a matrix product reads in order.
_COST_OF_GATHERING = 4


class LayerCache(NamedTuple):
    """One layer's slots: rotated keys and gated values [B, S, G, E]; for sparse kinds index keys [B, S, I]; and for
    block selection the lists of every tile, int32 [B, P, A] (see `models.attention.selection`)."""

    key: jax.Array
    value: jax.Array
    index_key: jax.Array | None = None
    lists: jax.Array | None = None


class Cache(NamedTuple):
    """The slots of every layer, and the number of committed tokens of every row, int32 [B]."""

    layers: tuple[LayerCache, ...]
    length: jax.Array

    @property
    def capacity(self) -> int:
        """S, the slots of a row."""
        return self.layers[0].key.shape[1]

    def advance(self, count_B: jax.Array) -> Cache:
        """The cache with the first `count` tokens of the last extension committed, in every row."""
        return self._replace(length=self.length + count_B)

    def positions(self, C: int) -> jax.Array:
        """Positions of the next C tokens, int32 [B, C]."""
        return self.length[:, None] + jnp.arange(C, dtype=jnp.int32)


def write(slots_BSx: jax.Array, new_BCx: jax.Array, start_B: jax.Array) -> jax.Array:
    """Writes C entries of every row from its own start on."""
    new_BCx = new_BCx.astype(slots_BSx.dtype)
    if slots_BSx.shape[0] == 1:
        # One slice updates in place, where a scatter over rows need not.
        return jax.lax.dynamic_update_slice_in_dim(slots_BSx, new_BCx, start_B[0], axis=1)
    return jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice_in_dim(row, new, start, 0))(
        slots_BSx, new_BCx, start_B
    )


def attend(
    q_BCHE: jax.Array, layer: LayerCache, reads: Reads, selection: Selection | None = None, softcap: float = 0.0
) -> tuple[jax.Array, LayerCache]:
    """Attention of C new queries a row to the slots that they read, [B, C, H, E]; and the layer with their lists.

    Equal to `oracle.attend` on the row's whole text, however it is split into extensions, with a running variance
    that stands still.

    Args:
      layer: with the new tokens written.
      reads: of the new tokens, at consecutive positions; its index has the keys of the cache.
    """
    S = layer.key.shape[1]
    if selection is None:
        visible_BCS = visible_keys(reads, jnp.arange(S))
        return oracle.attend_masked(q_BCHE, layer.key, layer.value, visible_BCS, softcap)[0], layer
    if selection.block:
        layer = layer._replace(lists=extend_lists(layer.lists, reads, selection))
        if fused.decodes(q_BCHE, selection):
            return kernels.extend(q_BCHE, layer.key, layer.value, layer.lists, reads, selection.block), layer
        selected_BCS = listed_keys(layer.lists, reads, S, selection.block)
        most = layer.lists.shape[2] * selection.block
    else:
        selected_BCS, *_ = select_tokens(index_scores(reads.index, selection.scale), reads, selection)
        most = max(selection.most, selection.keep_first + selection.keep_local)
    # Few queries against many slots gather the selected rows, which all heads of a query share.
    if q_BCHE.shape[1] * most * _COST_OF_GATHERING <= S:
        return _attend_gathered(q_BCHE, layer, selected_BCS, most), layer
    return oracle.attend_masked(q_BCHE, layer.key, layer.value, selected_BCS)[0], layer


def _attend_gathered(q_BCHE: jax.Array, layer: LayerCache, selected_BCS: jax.Array, most: int) -> jax.Array:
    B, C, H, E = q_BCHE.shape
    rank_BCS = jnp.cumsum(selected_BCS, axis=-1, dtype=jnp.int32)
    order_K = jnp.arange(1, most + 1, dtype=jnp.int32)
    slot_NK = jax.vmap(lambda rank_S: jnp.searchsorted(rank_S, order_K))(rank_BCS.reshape(B * C, -1))
    present_NK = order_K <= rank_BCS[..., -1].reshape(B * C, 1)
    row_N = jnp.repeat(jnp.arange(B), C)[:, None]
    key_NKGE, value_NKGE = (a.at[row_N, slot_NK].get(mode="clip") for a in (layer.key, layer.value))
    o_N1HE, *_ = oracle.attend_masked(q_BCHE.reshape(B * C, 1, H, E), key_NKGE, value_NKGE, present_NK[:, None])
    return o_N1HE.reshape(B, C, H, E)
