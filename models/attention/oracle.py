"""Attention in its plain O(T²) form: the definition of correct, and the quickest way for a few hundred keys.

Softmaxes are float32 (float64 if the inputs are), whatever the dtype of queries, keys and values.
"""

import jax
import jax.numpy as jnp

from models.attention.indexer import divergence, head_mean, index_scores
from models.attention.keys import Attended, Reads, Selection, visible_keys
from models.attention.selection import listed_keys, select_blocks, select_tokens


def attend(
    q_BTHE: jax.Array,
    k_BSGE: jax.Array,
    v_BSGE: jax.Array,
    reads: Reads,
    selection: Selection | None = None,
    softcap: float = 0.0,
) -> Attended:
    """Attention to what the queries read, and with a selection the loss that trains the indexer (GSA section 3.5)."""
    if selection is None:
        visible_BTS = visible_keys(reads, jnp.arange(k_BSGE.shape[1]))
        return Attended(attend_masked(q_BTHE, k_BSGE, v_BSGE, visible_BTS, softcap)[0])
    scores_BTS = index_scores(reads.index, selection.scale)
    selected_BTS, variance_BT = selected_keys(scores_BTS, reads, selection)
    o_BTHE, p_BHTS = attend_masked(q_BTHE, k_BSGE, v_BSGE, selected_BTS)
    target_BTS = head_mean(jax.lax.stop_gradient(p_BHTS))
    logits_BTS = scores_BTS / selection.temperature
    normaliser_BT = jax.nn.logsumexp(jnp.where(selected_BTS, logits_BTS, -jnp.inf), axis=-1)
    loss_BT = divergence(target_BTS, logits_BTS, normaliser_BT)
    return Attended(o_BTHE, loss_BT, jnp.sum(selected_BTS, axis=-1, dtype=jnp.int32), variance_BT)


def selected_keys(scores_BTS: jax.Array, reads: Reads, selection: Selection) -> tuple[jax.Array, jax.Array | None]:
    """The selected keys of all queries of a row, [B, T, S], and the variance [B, T] that k rests on."""
    if not selection.block:
        selected_BTS, _, variance_BT = select_tokens(scores_BTS, reads, selection)
        return selected_BTS, variance_BT
    lists_BPA, variance_BT = select_blocks(reads, selection)
    return listed_keys(lists_BPA, reads, scores_BTS.shape[2], selection.block), variance_BT


def attend_masked(
    q_BTHE: jax.Array, k_BSGE: jax.Array, v_BSGE: jax.Array, mask_BTS: jax.Array, softcap: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention over the masked-in keys, scaled by 1/sqrt(E).

    Query head h reads key/value head h // (H/G). Every query must have a key in its mask. A softcap c bounds the
    logits x by c · tanh(x / c).

    Returns:
      The output [B, T, H, E] in v's dtype, and the probabilities [B, H, T, S] in float32.
    """
    B, T, H, E = q_BTHE.shape
    S, G = k_BSGE.shape[1:3]
    R = H // G
    accumulate = jnp.promote_types(q_BTHE.dtype, jnp.float32)
    # Plain matrix products over [R·T, E]: heads of a group share their keys, and XLA's backward on CPUs is
    # twice as fast as for the equivalent einsum.
    q_BGNE = (q_BTHE * E**-0.5).reshape(B, T, G, R, E).transpose(0, 2, 3, 1, 4).reshape(B, G, R * T, E)
    k_BGES, v_BGSE = k_BSGE.transpose(0, 2, 3, 1), v_BSGE.transpose(0, 2, 1, 3)
    logits_BGNS = jnp.matmul(q_BGNE, k_BGES, preferred_element_type=accumulate)
    if softcap:
        logits_BGNS = softcap * jnp.tanh(logits_BGNS / softcap)
    logits_BGRTS = jnp.where(mask_BTS[:, None, None], logits_BGNS.reshape(B, G, R, T, S), -jnp.inf)
    largest_BGRT1 = jax.lax.stop_gradient(jnp.max(logits_BGRTS, axis=-1, keepdims=True))
    weight_BGRTS = jnp.exp(logits_BGRTS - largest_BGRT1)
    total_BGRT1 = jnp.sum(weight_BGRTS, axis=-1, keepdims=True)
    weight_BGNS = weight_BGRTS.reshape(B, G, R * T, S).astype(v_BSGE.dtype)
    o_BGNE = jnp.matmul(weight_BGNS, v_BGSE, preferred_element_type=accumulate)
    o_BGRTE = (o_BGNE.reshape(B, G, R, T, E) / total_BGRT1).astype(v_BSGE.dtype)
    return o_BGRTE.transpose(0, 3, 1, 2, 4).reshape(B, T, H, E), (weight_BGRTS / total_BGRT1).reshape(B, H, T, S)
