"""What attention probabilities show: sinks, and how much of dense attention a selection keeps. For evaluation alone.

Attention gives back no probabilities; they are computed again here, a few queries at a time.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models import sharding
from models.attention import oracle
from models.attention.indexer import head_mean, index_scores
from models.attention.keys import Reads, Selection, visible_keys
from models.attention.selection import listed_keys, select_blocks, select_tokens
from models.attention.tiles import at_once
from models.attention.topk import select_mask


class Measured(NamedTuple):
    """Per query, float32, without gradients.

    first_token [B, T, H]: the probability that each head gives to the first token of the query's document. With a
    selection also, each [B, T]:
    first_token_selected: 1 if that token is selected, else 0.
    recall: the share of dense attention, averaged over heads, that falls on the selected keys.
    overlap: the share of the selected keys that are among the equally many to which dense attention, averaged
      over heads, gives most; of equal probabilities the lower position counts as larger.
    """

    first_token: jax.Array
    first_token_selected: jax.Array | None = None
    recall: jax.Array | None = None
    overlap: jax.Array | None = None


def measure(
    q_BTHE: jax.Array,
    k_BSGE: jax.Array,
    reads: Reads,
    opening_BT: jax.Array,
    selection: Selection | None = None,
    softcap: float = 0.0,
) -> Measured:
    """What attention does to queries and keys of whole sequences; `opening` is where each query's document begins."""
    q_BTHE, k_BSGE, reads = jax.lax.stop_gradient((q_BTHE, k_BSGE, reads))
    B, T, H, _ = q_BTHE.shape
    S = k_BSGE.shape[1]
    in_blocks = selection is not None and selection.block
    lists_BPA = sharding.across(select_blocks(reads, selection)[0]) if in_blocks else None  # of all tiles of a row
    per_query = None if reads.index is None else (reads.index.query, reads.index.gate)

    def chosen(tile: Reads, of_index: Any) -> jax.Array:
        if selection.block:
            return listed_keys(lists_BPA, tile, S, selection.block)
        scores_B1S = index_scores(reads.index._replace(query=of_index[0], gate=of_index[1]), selection.scale)
        return select_tokens(scores_B1S, tile, selection)[0]

    def one(query: Any) -> Measured:
        q_B1HE, position_B1, first_B1, opening_B1, of_index = jax.tree.map(lambda a: a[:, None], query)
        tile = reads._replace(position=position_B1, first=first_B1)
        read_B1S = visible_keys(tile, jnp.arange(S)) if selection is None else chosen(tile, of_index)
        p_BH1S = oracle.attend_masked(q_B1HE, k_BSGE, k_BSGE, read_B1S, softcap)[1]
        first_BH = jnp.take_along_axis(p_BH1S[:, :, 0], opening_B1[..., None], axis=-1)[..., 0]
        if selection is None:
            return Measured(first_BH.astype(jnp.float32))
        visible_B1S = visible_keys(tile, jnp.arange(S))
        dense_B1S = head_mean(oracle.attend_masked(q_B1HE, k_BSGE, k_BSGE, visible_B1S)[1])
        count_B1 = jnp.sum(read_B1S, axis=-1, dtype=jnp.int32)
        shared_B1 = jnp.sum(read_B1S & select_mask(dense_B1S, count_B1, visible_B1S), axis=-1) / count_B1
        recall_B1 = jnp.sum(jnp.where(read_B1S, dense_B1S, 0), axis=-1)
        selected_B1 = jnp.take_along_axis(read_B1S[:, 0], opening_B1, axis=-1)
        of_query = first_BH, selected_B1[:, 0], recall_B1[:, 0], shared_B1[:, 0]
        return Measured(*(a.astype(jnp.float32) for a in of_query))

    queries = q_BTHE, reads.position, reads.first, opening_BT, per_query
    by_query = jax.tree.map(lambda a: a.swapaxes(0, 1), queries)
    measured = jax.lax.map(one, by_query, batch_size=min(T, at_once(B * H * S)))
    return jax.tree.map(lambda a: a.swapaxes(0, 1), measured)
