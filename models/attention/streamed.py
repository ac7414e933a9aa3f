"""Attention and gated sparse attention of `reference`, in memory that grows with T and not with T².

Queries are worked on in tiles of `chunk` rows. A tile scores the keys up to its end, selects, and then attends
to the *union* of its queries' selected sets: neighbouring queries select much the same keys, so the union is
little larger than one set; its rows are gathered once for all queries and heads of the tile, and matrix products
do the rest. The loop over the union ends where the union ends, so any selection is exact, and none costs much
more than causal attention. Where every visible key is selected, keys are read in their order, and nothing is
searched or gathered: in `attend`, and in `sparse_attention` with k_rule="fixed" and k_base >= T, which is how
the dense warm-up of an indexer is asked for.

The backward pass keeps O(T) numbers: inputs and output, the selected sets as `Threshold`, and the denominators
of both softmaxes. It scores each tile again, but never selects again.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.attention import reference, tiles
from models.attention.reference import IndexInputs, Selection, SparseStatistics
from models.attention.selection import Threshold, select_threshold, selected_by
from models.attention.tiles import Keys, Tile


def attend(
    q_BTHE: jax.Array, k_BSGE: jax.Array, v_BSGE: jax.Array, segments_BT: jax.Array, *, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Dense causal attention within documents: `reference.attend` under its visible mask, in tiles of `chunk`.

    Returns:
      The output [B, T, H, E] in v's dtype, and what each head gives to the first token of the query's document,
      float32 [B, T, H], without a gradient.

    Raises:
      ValueError: chunk is not positive.
    """
    T = q_BTHE.shape[1]
    chunk = tiles.usable_chunk(chunk, T)
    q_BTHE, first_BT = tiles.pad((q_BTHE, reference.first_position(segments_BT)), chunk)
    k_BSGE, v_BSGE = tiles.pad((k_BSGE, v_BSGE), tiles.key_block(T, chunk))
    o_BTHE, statistics = _streamed(None, chunk, q_BTHE, k_BSGE, v_BSGE, None, first_BT, None)
    return o_BTHE[:, :T], statistics.first_token[:, :T]


def sparse_attention(
    q_BTHE: jax.Array,
    k_BSGE: jax.Array,
    v_BSGE: jax.Array,
    index: IndexInputs,
    segments_BT: jax.Array,
    running_variance: jax.Array,
    selection: Selection,
    *,
    chunk: int,
) -> tuple[jax.Array, SparseStatistics]:
    """`reference.sparse_attention` in tiles of `chunk` queries: the same results, statistics and gradients.

    Raises:
      ValueError: chunk is not positive.
    """
    T = q_BTHE.shape[1]
    chunk = tiles.usable_chunk(chunk, T)
    query_BTJI, key_BSI, gate_BTJ, bias_J = index
    first_BT = reference.first_position(segments_BT)
    q_BTHE, query_BTJI, gate_BTJ, first_BT = tiles.pad((q_BTHE, query_BTJI, gate_BTJ, first_BT), chunk)
    k_BSGE, v_BSGE, key_BSI = tiles.pad((k_BSGE, v_BSGE, key_BSI), tiles.key_block(T, chunk))
    index = IndexInputs(query_BTJI, key_BSI, gate_BTJ, bias_J)
    o_BTHE, statistics = _streamed(selection, chunk, q_BTHE, k_BSGE, v_BSGE, index, first_BT, running_variance)
    return o_BTHE[:, :T], jax.tree.map(lambda a: a[:, :T], statistics)


class TileScores(NamedTuple):
    """What a tile knows of its scores.

    logits [B, C, S], scores / temperature; chosen [B, C, S], the selected set; threshold, what defines it;
    normaliser and variance [B, C], of the logits over the set and of the scores.
    """

    logits: jax.Array
    chosen: jax.Array
    threshold: Threshold | None
    normaliser: jax.Array
    variance: jax.Array


class _Saved(NamedTuple):
    """Per query, for the backward pass: the selected set, and both logarithms of a softmax's denominator."""

    threshold: Threshold | None
    attention_BTH: jax.Array
    scores_BT: jax.Array | None


class _KeySums(NamedTuple):
    """Gradients that all tiles add to: of k, v and, with an indexer, of its keys and its bias."""

    k_BSGE: jax.Array
    v_BSGE: jax.Array
    index_BSI: jax.Array | None
    bias_J: jax.Array | None


def _selects_all(selection: Selection | None, S: int) -> bool:
    return selection is None or (selection.k_rule == "fixed" and selection.k_base >= S)


def _tile_index(index: IndexInputs, start: jax.Array, chunk: int, key_BXI: jax.Array) -> IndexInputs:
    query_BCJI, gate_BCJ = (tiles.rows(a, start, chunk) for a in (index.query, index.gate))
    return IndexInputs(query_BCJI, key_BXI, gate_BCJ, index.bias)


def _score(index: IndexInputs, start: jax.Array, chunk: int, extent: int, scale: float) -> jax.Array:
    """Scores [B, C, X] of the first X keys."""
    # The backward pass must find the very same bits: the barriers keep the compiler from fusing these scores
    # with their surroundings, which differ there.
    inputs = jax.lax.optimization_barrier(_tile_index(index, start, chunk, index.key[:, :extent]))
    return jax.lax.optimization_barrier(reference.index_scores(inputs, scale))


def _masks(tile: Tile, extent: int, selection: Selection) -> tuple[jax.Array, jax.Array | None]:
    """The visible and the always-kept ones of the first X keys, [B, C, X]."""
    position_X = jnp.arange(extent, dtype=jnp.int32)
    keep_BCX = reference.kept_keys(*tile, position_X, selection.keep_first, selection.keep_local)
    return reference.visible_keys(*tile, position_X), keep_BCX


def _widen(a_BCX: jax.Array, S: int) -> jax.Array:
    return jnp.pad(a_BCX, ((0, 0), (0, 0), (0, S - a_BCX.shape[2])))


def score_and_select(
    index: IndexInputs, start: jax.Array, tile: Tile, running_variance: jax.Array, selection: Selection
) -> TileScores:
    """Scores a tile whose first query is `start`, and selects, on padded arrays."""
    S = index.key.shape[1]

    def compute(extent: int) -> TileScores:
        scores_BCX = _score(index, start, tile.chunk, extent, selection.scale)
        visible_BCX, keep_BCX = _masks(tile, extent, selection)
        variance_BC = reference.score_variance(scores_BCX, visible_BCX)
        threshold, chosen_BCX = None, visible_BCX
        if not _selects_all(selection, S):
            k_BC = reference.choose_k(variance_BC, running_variance, selection)
            threshold = select_threshold(scores_BCX, k_BC, visible_BCX, keep_BCX)
            chosen_BCX = selected_by(threshold, scores_BCX, visible_BCX, keep_BCX)
        logits_BCX = scores_BCX / selection.temperature
        normaliser_BC = jax.nn.logsumexp(jnp.where(chosen_BCX, logits_BCX, -jnp.inf), axis=-1)
        return TileScores(_widen(logits_BCX, S), _widen(chosen_BCX, S), threshold, normaliser_BC, variance_BC)

    return tiles.at_extent(compute, tile, S)


def _reselect(
    index: IndexInputs, start: jax.Array, tile: Tile, threshold: Threshold, selection: Selection
) -> jax.Array:
    """The selected set [B, C, S] of a threshold from `score_and_select`."""
    S = index.key.shape[1]

    def compute(extent: int) -> jax.Array:
        scores_BCX = _score(index, start, tile.chunk, extent, selection.scale)
        return _widen(selected_by(threshold, scores_BCX, *_masks(tile, extent, selection)), S)

    return tiles.at_extent(compute, tile, S)


def _divergence(
    q_BGNE: jax.Array, normaliser_BGN1: jax.Array, k_BSGE: jax.Array, keys: Keys, tile: Tile, scores: TileScores
) -> jax.Array:
    """`reference.indexer_divergence` of a tile, [B, C]."""

    def step(i: jax.Array, sum_BC: jax.Array) -> jax.Array:
        p_BGNK = tiles.probabilities(q_BGNE, normaliser_BGN1, k_BSGE, keys, tile, i)
        target_BCK = tiles.head_mean(p_BGNK, tile.chunk)
        predicted_BCK = tiles.columns(keys, i, scores.logits) - scores.normaliser[..., None]
        log_ratio_BCK = jnp.log(jnp.where(target_BCK > 0, target_BCK, 1)) - predicted_BCK
        return sum_BC + jnp.sum(target_BCK * log_ratio_BCK, axis=-1)

    return jax.lax.fori_loop(keys.begin, keys.end, step, jnp.zeros_like(scores.normaliser))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _streamed(
    selection: Selection | None,
    chunk: int,
    q_BTHE: jax.Array,
    k_BSGE: jax.Array,
    v_BSGE: jax.Array,
    index: IndexInputs | None,
    first_BT: jax.Array,
    running_variance: jax.Array | None,
) -> tuple[jax.Array, SparseStatistics]:
    """Both public functions, on padded arrays. Without an indexer, `first_token` is the only statistic."""
    return _forward(selection, chunk, q_BTHE, k_BSGE, v_BSGE, index, first_BT, running_variance)[0]


def _forward(
    selection: Selection | None,
    chunk: int,
    q_BTHE: jax.Array,
    k_BSGE: jax.Array,
    v_BSGE: jax.Array,
    index: IndexInputs | None,
    first_BT: jax.Array,
    running_variance: jax.Array | None,
) -> tuple[tuple[jax.Array, SparseStatistics], Any]:
    T, S, G = q_BTHE.shape[1], *k_BSGE.shape[1:3]

    def step(_: None, start: jax.Array) -> tuple[None, Any]:
        tile = tiles.make_tile(first_BT, start, chunk)
        scores = None if index is None else score_and_select(index, start, tile, running_variance, selection)
        keys = tiles.consecutive_keys(tile, S) if _selects_all(selection, S) else tiles.union_keys(scores.chosen)
        q_BGNE = tiles.scaled_queries(q_BTHE, start, chunk, G)
        o_BGNE, normaliser_BGN1 = tiles.attend_tile(q_BGNE, k_BSGE, v_BSGE, keys, tile)
        first_BCH = tiles.first_token(q_BGNE, normaliser_BGN1, k_BSGE, tile)
        statistics = SparseStatistics(None, None, None, first_BCH, None)
        saved = _Saved(None, tiles.ungroup(normaliser_BGN1, chunk)[..., 0], None)
        if scores is not None:
            loss_BC = _divergence(q_BGNE, normaliser_BGN1, k_BSGE, keys, tile, scores)
            statistics = _tile_statistics(loss_BC, first_BCH, scores, tile)
            saved = saved._replace(threshold=scores.threshold, scores_BT=scores.normaliser)
        return None, (tiles.ungroup(o_BGNE, chunk), statistics, saved)

    _, (o_BTHE, statistics, saved) = tiles.over_tiles(step, None, T, chunk)
    return (o_BTHE, statistics), (q_BTHE, k_BSGE, v_BSGE, index, first_BT, o_BTHE, saved)


def _tile_statistics(loss_BC: jax.Array, first_BCH: jax.Array, scores: TileScores, tile: Tile) -> SparseStatistics:
    first_chosen_BC = jnp.take_along_axis(scores.chosen, tile.first_BC[..., None], axis=-1)[..., 0]
    return SparseStatistics(
        indexer_loss=loss_BC,
        selected=jnp.sum(scores.chosen, axis=-1, dtype=jnp.int32),
        variance=scores.variance,
        first_token=jnp.where(first_chosen_BC[..., None], first_BCH, 0),
        first_token_selected=first_chosen_BC,
    )


def _backward(
    selection: Selection | None, chunk: int, residuals: Any, cotangents: tuple[jax.Array, SparseStatistics]
) -> tuple[Any, ...]:
    q_BTHE, k_BSGE, v_BSGE, index, first_BT, o_BTHE, saved = residuals
    do_BTHE, dloss_BT = cotangents[0], cotangents[1].indexer_loss
    T, S, G = q_BTHE.shape[1], *k_BSGE.shape[1:3]
    accumulate = jnp.promote_types(q_BTHE.dtype, jnp.float32)

    def step(sums: _KeySums, start: jax.Array) -> tuple[_KeySums, Any]:
        rows = functools.partial(tiles.rows, start=start, size=chunk)
        tile = tiles.make_tile(first_BT, start, chunk)
        keys = tiles.consecutive_keys(tile, S)
        if not _selects_all(selection, S):
            threshold = jax.tree.map(rows, saved.threshold)
            keys = tiles.union_keys(_reselect(index, start, tile, threshold, selection))
        q_BGNE, do_BGNE = tiles.scaled_queries(q_BTHE, start, chunk, G), tiles.group(rows(do_BTHE), G)
        delta_BCH1 = jnp.sum(rows(do_BTHE).astype(accumulate) * rows(o_BTHE), axis=-1, keepdims=True)
        delta_BGN1, normaliser_BGN1 = tiles.group(delta_BCH1, G), tiles.group(rows(saved.attention_BTH)[..., None], G)

        def block_step(i: jax.Array, state: tuple[jax.Array, Any, _KeySums]) -> tuple[jax.Array, Any, _KeySums]:
            dq_BGNE, dindex, sums = state
            add = functools.partial(tiles.add_block, keys, i)
            p_BGNK = tiles.probabilities(q_BGNE, normaliser_BGN1, k_BSGE, keys, tile, i)
            k_BKGE, v_BKGE = (tiles.block(keys, i, a) for a in (k_BSGE, v_BSGE))
            dq, dk, dv = tiles.attention_gradients(p_BGNK, q_BGNE, do_BGNE, delta_BGN1, k_BKGE, v_BKGE)
            sums = sums._replace(k_BSGE=add(sums.k_BSGE, dk), v_BSGE=add(sums.v_BSGE, dv))
            if index is not None:
                block_index = _tile_index(index, start, chunk, tiles.block(keys, i, index.key))
                dlogits = functools.partial(
                    _logit_gradients,
                    tiles.head_mean(p_BGNK, chunk),
                    tiles.block_mask(keys, i, tile),
                    rows(saved.scores_BT),
                    rows(dloss_BT),
                )
                new = _index_gradients(block_index, dlogits, selection)
                dindex = dindex[0] + new.query, dindex[1] + new.gate
                sums = sums._replace(index_BSI=add(sums.index_BSI, new.key), bias_J=sums.bias_J + new.bias)
            return dq_BGNE + dq, dindex, sums

        dindex = None if index is None else tuple(jnp.zeros_like(rows(a)) for a in (index.query, index.gate))
        state = jnp.zeros(q_BGNE.shape, accumulate), dindex, sums
        dq_BGNE, dindex, sums = jax.lax.fori_loop(keys.begin, keys.end, block_step, state)
        dq_BCHE = tiles.ungroup(dq_BGNE, chunk) * q_BTHE.shape[-1] ** -0.5
        return sums, (dq_BCHE.astype(q_BTHE.dtype), dindex)

    zero = functools.partial(jnp.zeros_like, dtype=accumulate)
    zero_index = (None, None) if index is None else (jnp.zeros_like(index.key), jnp.zeros_like(index.bias))
    sums, (dq_BTHE, dindex) = tiles.over_tiles(step, _KeySums(zero(k_BSGE), zero(v_BSGE), *zero_index), T, chunk)
    if index is not None:
        dindex = IndexInputs(dindex[0], sums.index_BSI, dindex[1], sums.bias_J)
    return dq_BTHE, sums.k_BSGE.astype(k_BSGE.dtype), sums.v_BSGE.astype(v_BSGE.dtype), dindex, None, None


_streamed.defvjp(_forward, _backward)


def _logit_gradients(
    target_BCK: jax.Array, mask_BCK: jax.Array, normaliser_BC: jax.Array, dloss_BC: jax.Array, logits_BCK: jax.Array
) -> jax.Array:
    """Gradients of the divergence: softmax(logits) - target, times the loss's cotangent."""
    predicted_BCK = jnp.exp(logits_BCK - normaliser_BC[..., None])
    return dloss_BC[..., None] * jnp.where(mask_BCK, predicted_BCK - target_BCK, 0)


def _index_gradients(index: IndexInputs, logit_gradients: Any, selection: Selection) -> IndexInputs:
    scores_BCK, pull_back = jax.vjp(lambda inputs: reference.index_scores(inputs, selection.scale), index)
    return pull_back(logit_gradients(scores_BCK / selection.temperature) / selection.temperature)[0]
