"""Attention and gated sparse attention in their plain O(T²) form: the definition of correct.

Equations are those of Gated Sparse Attention (arXiv 2601.15305, sections 3.3 to 3.5), called GSA below. All
scores, softmaxes and statistics are float32 (float64 if the inputs are), whatever the dtype of queries, keys
and values.

Segments are int32 [B, T], constant within a document and changing between neighbours; a negative segment
marks padding, which is computed like any document but left out of every statistic and of the indexer's loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.attention.selection import select_mask


class IndexInputs(NamedTuple):
    """What the indexer scores with.

    query [B, T, J, I]; key [B, S, I], one for all indexer heads; gate [B, T, J], the head weights in (0, 1);
    bias [J].
    """

    query: jax.Array
    key: jax.Array
    gate: jax.Array
    bias: jax.Array


@dataclass(frozen=True)
class Selection:
    """How keys are selected; the fields are those of `ModelConfig`. `scale` is the resolved factor."""

    scale: float
    temperature: float
    k_rule: str
    k_base: int
    k_min: int
    k_max: int
    keep_first: int = 0
    keep_local: int = 0


class SparseStatistics(NamedTuple):
    """Statistics of every query, without gradients but for the loss.

    indexer_loss [B, T], in nats; selected [B, T], the number of selected keys; variance [B, T] of the scores;
    first_token [B, T, H], the probability that each head gives to the first token of the query's document;
    first_token_selected [B, T], whether that token is in the selected set (if not, its probability is 0).
    """

    indexer_loss: jax.Array
    selected: jax.Array
    variance: jax.Array
    first_token: jax.Array
    first_token_selected: jax.Array


def document_start(segments_BT: jax.Array) -> jax.Array:
    """True at the first token of every document; [B, T]."""
    changed_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    return jnp.pad(changed_BT, ((0, 0), (1, 0)), constant_values=True)


def first_position(segments_BT: jax.Array) -> jax.Array:
    """The position of the first token of every token's document, int32 [B, T].

    >>> first_position(jnp.array([[0, 0, 1, 1]])).tolist()
    [[0, 0, 2, 2]]
    """
    position_T = jnp.arange(segments_BT.shape[1], dtype=jnp.int32)
    return jax.lax.cummax(jnp.where(document_start(segments_BT), position_T, 0), axis=1)


def visible_keys(position_BT: jax.Array, first_BT: jax.Array, position_S: jax.Array) -> jax.Array:
    """True where a query may see a key: no later than itself, and in its document; [B, T, S].

    Args:
      position_BT: positions of the queries, [B or 1, T].
      first_BT: their `first_position`.
      position_S: positions of the keys, [S] or [B, S].
    """
    position_S = position_S[..., None, :]
    return (first_BT[:, :, None] <= position_S) & (position_S <= position_BT[:, :, None])


def visible_mask(segments_BT: jax.Array, window: jax.Array | int | None = None) -> jax.Array:
    """`visible_keys` of whole sequences, [B, T, S]; with a window, only the latest so many, the query included.

    >>> visible_mask(jnp.array([[0, 0, 1]])).astype(int).tolist()
    [[[1, 0, 0], [1, 1, 0], [0, 0, 1]]]
    """
    position_T = jnp.arange(segments_BT.shape[1])
    first_BT = first_position(segments_BT)
    if window is not None:
        first_BT = jnp.maximum(first_BT, position_T - window + 1)
    return visible_keys(position_T[None], first_BT, position_T)


def kept_keys(
    position_BT: jax.Array, first_BT: jax.Array, position_S: jax.Array, keep_first: int, keep_local: int
) -> jax.Array | None:
    """The always-selected keys, if visible: a document's first ones and a query's latest ones; [B, T, S].

    The arrays are those of `visible_keys`. None if nothing is kept.
    """
    if not keep_first and not keep_local:
        return None
    position_S = position_S[..., None, :]
    near_start = position_S - first_BT[:, :, None] < keep_first
    return near_start | (position_BT[:, :, None] - position_S < keep_local)


def attend(
    q_BTHE: jax.Array, k_BSGE: jax.Array, v_BSGE: jax.Array, mask_BTS: jax.Array, softcap: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention over the masked-in keys, scaled by 1/sqrt(E).

    Query head h reads key/value head h // (H/G). Every query must have a key in its mask. A softcap c bounds the
    logits x by c · tanh(x / c).

    Returns:
      The output [B, T, H, E] in v's dtype, and the probabilities [B, G, H/G, T, S] in float32.
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
    return o_BGRTE.transpose(0, 3, 1, 2, 4).reshape(B, T, H, E), weight_BGRTS / total_BGRT1


def first_token_probability(p_BGRTS: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """What each head of a query gives to the first token of its document, of `attend`'s probabilities; [B, T, H]."""
    B, G, R, T, _ = p_BGRTS.shape
    first_BT = first_position(segments_BT)[:, None, None, :, None]
    p_BGRT1 = jnp.take_along_axis(jax.lax.stop_gradient(p_BGRTS), first_BT, axis=-1)
    return p_BGRT1.reshape(B, G * R, T).transpose(0, 2, 1)


def index_scores(index: IndexInputs, scale: float) -> jax.Array:
    """The gated lightning indexer's scores, float32 [B, T, S], each in (0, J) (GSA section 3.3).

    I[t, s] = Σ_j gate[t, j] · sigmoid(scale · query[t, j]·key[s] + bias[j]). The paper has no scale.
    """
    accumulate = jnp.promote_types(index.query.dtype, jnp.float32)
    dots_BJTS = jnp.einsum("btji,bsi->bjts", index.query * scale, index.key, preferred_element_type=accumulate)
    open_BJTS = jax.nn.sigmoid(dots_BJTS + index.bias[:, None, None])
    return jnp.einsum("btj,bjts->bts", index.gate.astype(accumulate), open_BJTS)


def score_variance(scores_BTS: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """Population variance of every query's scores over the positions it sees; [B, T]."""
    n_BT = jnp.maximum(jnp.sum(visible_BTS, axis=-1), 1)
    mean_BT = jnp.sum(jnp.where(visible_BTS, scores_BTS, 0), axis=-1) / n_BT
    deviation_BTS = jnp.where(visible_BTS, scores_BTS - mean_BT[..., None], 0)
    return jnp.sum(jnp.square(deviation_BTS), axis=-1) / n_BT


def adaptive_k(
    variance_BT: jax.Array, running_variance: jax.Array, rule: str, k_base: int, k_min: int, k_max: int
) -> jax.Array:
    """How many keys each query selects, int32 [B, T] (GSA section 3.4, Eq. 8).

    The paper contradicts itself: its equation selects more keys where the scores vary more, its prose and its
    authors' code select fewer. Hence a rule:
      "paper"    clamp(k_base · variance / running_variance, k_min, k_max), rounded down;
      "inverse"  clamp(k_base · running_variance / variance, k_min, k_max), rounded down;
      "fixed"    k_base.

    Args:
      variance_BT: `score_variance` of this step.
      running_variance: scalar mean variance of *earlier* steps, so that no query depends on the rest of its
        batch or on its future. Zero means that there was no earlier step: every query selects k_base.

    >>> adaptive_k(jnp.array([0.5, 1.0, 9.0]), jnp.array(1.0), "paper", 64, 8, 128).tolist()
    [32, 64, 128]
    """
    if rule == "fixed":
        return jnp.full(variance_BT.shape, k_base, jnp.int32)
    tiny = jnp.finfo(variance_BT.dtype).tiny
    variance_BT = jax.lax.stop_gradient(variance_BT)
    over, under = (variance_BT, running_variance) if rule == "paper" else (running_variance, variance_BT)
    k_BT = jnp.clip(k_base * (over / jnp.maximum(under, tiny)), k_min, k_max)
    return jnp.where(running_variance > 0, k_BT, k_base).astype(jnp.int32)


def choose_k(variance_BT: jax.Array, running_variance: jax.Array, selection: Selection) -> jax.Array:
    """`adaptive_k` by the rule of a selection."""
    return adaptive_k(
        variance_BT, running_variance, selection.k_rule, selection.k_base, selection.k_min, selection.k_max
    )


def indexer_divergence(
    scores_BTS: jax.Array, target_BTS: jax.Array, selected_BTS: jax.Array, temperature: float
) -> jax.Array:
    """KL(target ‖ softmax of scores / temperature over the selected set) of every query, nats [B, T].

    The recipe is that of DeepSeek-V3.2 (sparse stage), since GSA does not say how its indexer is trained; the
    temperature is an addition, because scores are bounded.

    Args:
      target_BTS: attention probabilities, zero outside the selected set; no gradient passes to them.
    """
    target_BTS = jax.lax.stop_gradient(target_BTS)
    logits_BTS = scores_BTS / temperature
    normaliser_BT = jax.nn.logsumexp(jnp.where(selected_BTS, logits_BTS, -jnp.inf), axis=-1)
    # Target and prediction are close, so each term is small; their two sums apart would be large.
    log_ratio_BTS = jnp.log(jnp.where(target_BTS > 0, target_BTS, 1)) - (logits_BTS - normaliser_BT[..., None])
    return jnp.sum(target_BTS * log_ratio_BTS, axis=-1)


def select_keys(
    index: IndexInputs, segments_BT: jax.Array, running_variance: jax.Array, selection: Selection
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The selected sets: their mask [B, T, S], the scores [B, T, S] and the scores' variance [B, T]."""
    visible_BTS = visible_mask(segments_BT)
    scores_BTS = index_scores(index, selection.scale)
    variance_BT = score_variance(jax.lax.stop_gradient(scores_BTS), visible_BTS)
    k_BT = choose_k(variance_BT, running_variance, selection)
    position_T = jnp.arange(segments_BT.shape[1])
    keep = selection.keep_first, selection.keep_local
    keep_BTS = kept_keys(position_T[None], first_position(segments_BT), position_T, *keep)
    return select_mask(scores_BTS, k_BT, visible_BTS, keep_BTS), scores_BTS, variance_BT


def sparse_attention(
    q_BTHE: jax.Array,
    k_BSGE: jax.Array,
    v_BSGE: jax.Array,
    index: IndexInputs,
    segments_BT: jax.Array,
    running_variance: jax.Array,
    selection: Selection,
) -> tuple[jax.Array, SparseStatistics]:
    """Attention over the indexer's selected keys, and the loss that trains the indexer (GSA section 3.5).

    The output gives no gradient to `index`, the loss none to q, k and v.

    Returns:
      The output [B, T, H, E] and the statistics.
    """
    selected_BTS, scores_BTS, variance_BT = select_keys(index, segments_BT, running_variance, selection)
    o_BTHE, p_BGRTS = attend(q_BTHE, k_BSGE, v_BSGE, selected_BTS)
    target_BTS = jnp.mean(jax.lax.stop_gradient(p_BGRTS), axis=(1, 2))
    first_BT1 = first_position(segments_BT)[..., None]
    statistics = SparseStatistics(
        indexer_loss=indexer_divergence(scores_BTS, target_BTS, selected_BTS, selection.temperature),
        selected=jnp.sum(selected_BTS, axis=-1, dtype=jnp.int32),
        variance=variance_BT,
        first_token=first_token_probability(p_BGRTS, segments_BT),
        first_token_selected=jnp.take_along_axis(selected_BTS, first_BT1, axis=-1)[..., 0],
    )
    return o_BTHE, statistics
