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

from models.attention import reference
from models.attention.selection import select_mask

# Gathering pays where it reads far fewer rows than there are slots; a gathered row costs about as much as this
# many rows that a matrix product reads in order.
_COST_OF_GATHERING = 4


class LayerCache(NamedTuple):
    """One layer's slots: rotated keys and gated values [B, S, G, E]; for sparse kinds index keys [B, S, I]; and for
    block selection the lists of every tile, int32 [B, P, A] (see `models.attention.blocks`)."""

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
    q_BCHE: jax.Array, layer: LayerCache, position_BC: jax.Array, window: jax.Array | None = None, softcap: float = 0.0
) -> jax.Array:
    """Attention of C queries a row over all slots up to their own, or the latest `window` of them; [B, C, H, E]."""
    visible_BCS = _visible(layer, position_BC)
    if window is not None:
        visible_BCS &= ~_visible(layer, position_BC - window)
    return reference.attend(q_BCHE, layer.key, layer.value, visible_BCS, softcap)[0]


def attend_selected(
    q_BCHE: jax.Array,
    layer: LayerCache,
    index: reference.IndexInputs,
    position_BC: jax.Array,
    running_variance: jax.Array,
    selection: reference.Selection,
) -> jax.Array:
    """Attention of C queries a row over the slots that the indexer selects; [B, C, H, E].

    Equal to `reference.sparse_attention` on the row's whole text, with a running variance that stands still.
    Few queries against many slots gather the selected rows, which all heads of a query share; many queries
    mask the product with all slots.

    Args:
      index: query, gate and bias of the C tokens, and the key of the cache.
    """
    visible_BCS = _visible(layer, position_BC)
    scores_BCS = reference.index_scores(index, selection.scale)
    variance_BC = reference.score_variance(scores_BCS, visible_BCS)
    rule = (selection.k_rule, selection.k_base, selection.k_min, selection.k_max)
    k_BC = reference.adaptive_k(variance_BC, running_variance, *rule)
    selected_BCS = select_mask(scores_BCS, k_BC, visible_BCS, _keep(layer, position_BC, selection))
    C, S, most = q_BCHE.shape[1], layer.key.shape[1], _most_selected(selection)
    if C * most * _COST_OF_GATHERING > S:
        return reference.attend(q_BCHE, layer.key, layer.value, selected_BCS)[0]
    return _attend_gathered(q_BCHE, layer, selected_BCS, most)


def _visible(layer: LayerCache, position_BC: jax.Array) -> jax.Array:
    slot_S = jnp.arange(layer.key.shape[1], dtype=jnp.int32)
    return slot_S <= position_BC[..., None]


def _keep(layer: LayerCache, position_BC: jax.Array, selection: reference.Selection) -> jax.Array | None:
    if not selection.keep_first and not selection.keep_local:
        return None
    slot_S = jnp.arange(layer.key.shape[1], dtype=jnp.int32)
    return (slot_S < selection.keep_first) | (position_BC[..., None] - slot_S < selection.keep_local)


def _most_selected(selection: reference.Selection) -> int:
    k = selection.k_base if selection.k_rule == "fixed" else selection.k_max
    return max(k, selection.keep_first + selection.keep_local)


def _attend_gathered(q_BCHE: jax.Array, layer: LayerCache, selected_BCS: jax.Array, most: int) -> jax.Array:
    B, C, H, E = q_BCHE.shape
    rank_BCS = jnp.cumsum(selected_BCS, axis=-1, dtype=jnp.int32)
    order_K = jnp.arange(1, most + 1, dtype=jnp.int32)
    slot_NK = jax.vmap(lambda rank_S: jnp.searchsorted(rank_S, order_K))(rank_BCS.reshape(B * C, -1))
    present_NK = order_K <= rank_BCS[..., -1].reshape(B * C, 1)
    row_N = jnp.repeat(jnp.arange(B), C)[:, None]
    key_NKGE, value_NKGE = (a.at[row_N, slot_NK].get(mode="clip") for a in (layer.key, layer.value))
    o_N1HE = reference.attend(q_BCHE.reshape(B * C, 1, H, E), key_NKGE, value_NKGE, present_NK[:, None])[0]
    return o_N1HE.reshape(B, C, H, E)
