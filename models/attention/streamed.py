"""`oracle.attend` in memory that grows with T and not with T²: an online softmax over tiles and blocks.

Where tokens are selected, a tile scores the keys up to its end, selects, and then attends to the *union* of its
queries' sets: neighbouring queries select much the same keys, so the union is little larger than one set; its rows
are gathered once for all queries and heads of the tile, and matrix products do the rest. The loop over the union ends
where the union ends, so any selection is exact, and none costs much more than causal attention. Where blocks are
selected, a tile reads the blocks of its list, and many tiles are worked on together. Without a selection keys are read
in their order, and nothing is searched or gathered.

The backward pass keeps O(T) numbers: inputs and output, the selected sets as thresholds or lists, and the
denominators of both softmaxes. It scores tokens again, but never selects again.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.attention import tiles
from models.attention.indexer import divergence, head_mean, index_scores
from models.attention.keys import Attended, IndexInputs, Reads, Selection
from models.attention.selection import select_again, select_blocks, select_tokens
from models.attention.tiles import Keys, Tiling, pad
from models.attention.topk import Threshold

_LISTED_KEYS = 512  # keys of a block where blocks are listed, if a list is so long


def attend(
    q_BTHE: jax.Array,
    k_BSGE: jax.Array,
    v_BSGE: jax.Array,
    reads: Reads,
    selection: Selection | None = None,
    *,
    chunk: int,
) -> Attended:
    """The results and gradients of `oracle.attend`, in tiles of `chunk` queries, or of a block."""
    B, T, H, _ = q_BTHE.shape
    S, index, lists_BPA = k_BSGE.shape[1], reads.index, None
    if selection is not None and (W := selection.block):
        lists_BPA, variance_BT = select_blocks(reads, selection)
        listed = min(lists_BPA.shape[2], max(1, _LISTED_KEYS // W))
        count = -(-T // W)
        steps = -(-count // tiles.at_once(W * B * H * listed * W))
        # The last step is about as full as the others.
        how, multiple = _How(selection, Tiling(W, -(-count // steps)), listed), W
    else:
        chunk = min(chunk, T)
        how, multiple = _How(selection, Tiling(chunk)), tiles.key_block(S, chunk)
    over_queries = functools.partial(pad, multiple=how.tiling.rows)
    if index is not None:
        key_BSI = pad(index.key, multiple)
        index = IndexInputs(over_queries(index.query), key_BSI, over_queries(index.gate), index.bias)
    position_BT, first_BT = (over_queries(a, mode="edge") for a in reads[:2])
    if lists_BPA is not None:
        lists_BPA = pad(lists_BPA, how.tiling.together, constant_values=-1)
    reads = Reads(position_BT, first_BT, None, reads.running_variance)
    inputs = _Inputs(over_queries(q_BTHE), pad(k_BSGE, multiple), pad(v_BSGE, multiple), index, reads, lists_BPA)
    attended = jax.tree.map(lambda a: a[:, :T], _attend(how, inputs))
    return attended if lists_BPA is None else attended._replace(variance=variance_BT)


class _How(NamedTuple):
    """What is static: the selection, the tiles, and of lists how many blocks at a time."""

    selection: Selection | None
    tiling: Tiling
    listed: int = 0


class _Inputs(NamedTuple):
    """All arrays, padded: queries to whole steps, keys to whole blocks."""

    q_BTHE: jax.Array
    k_BSGE: jax.Array
    v_BSGE: jax.Array
    index: IndexInputs | None
    reads: Reads
    lists_BPA: jax.Array | None


class _Saved(NamedTuple):
    """Per query, for the backward pass: both logarithms of a softmax's denominator, and the selected set."""

    normaliser_BTH: jax.Array
    index_normaliser_BT: jax.Array | None
    threshold: Threshold | None


class _Sums(NamedTuple):
    """Gradients that all tiles add to: of k, v and, with an indexer, of its keys and its bias."""

    k_BSGE: jax.Array
    v_BSGE: jax.Array
    index_BSI: jax.Array | None
    bias_J: jax.Array | None


@dataclass
class _Tile:
    """Tiles that are worked on together: their queries, and the blocks of keys that they read. Exists in tracing only.

    Logits of attention are [Z, G, N, K] (see `tiles.group`), those of the indexer [Z, C, K].
    """

    how: _How
    inputs: _Inputs
    start: jax.Array

    def __post_init__(self):
        reads, cut = self.inputs.reads, self.cut
        self.reads = reads._replace(position=cut(reads.position), first=cut(reads.first))
        # The scores are over sqrt(E).
        self.q_ZGNE = self.group(cut(self.inputs.q_BTHE) * self.inputs.q_BTHE.shape[-1] ** -0.5)

    def cut(self, a_BTx: jax.Array) -> jax.Array:
        return self.how.tiling.cut(a_BTx, self.start)

    def group(self, x_ZCHE: jax.Array) -> jax.Array:
        return tiles.group(x_ZCHE, self.inputs.k_BSGE.shape[2])

    def ungroup(self, x_ZGNE: jax.Array) -> jax.Array:
        return tiles.ungroup(x_ZGNE, self.how.tiling.chunk)

    def select(self, threshold: Threshold | None = None) -> tuple[Keys, Threshold | None, jax.Array | None]:
        """The keys to read, what finds them again, and the variance of the scores; given the first, only the keys."""
        selection, S = self.how.selection, self.inputs.k_BSGE.shape[1]
        if self.inputs.lists_BPA is not None:
            list_BnA = tiles.rows(self.inputs.lists_BPA, self.start // self.how.tiling.chunk, self.how.tiling.together)
            list_ZA = list_BnA.reshape(-1, list_BnA.shape[2])
            return tiles.listed_blocks(list_ZA, selection.block, S, self.how.listed), None, None
        if selection is None:
            return tiles.consecutive_keys(self.reads, S), None, None

        def chosen(extent: int) -> tuple[jax.Array, jax.Array, Threshold | None, jax.Array | None]:
            scores_BCX, found = self._score(extent), (threshold, None)
            if threshold is None:
                chosen_BCX, *found = select_tokens(scores_BCX, self.reads, selection)
            else:
                chosen_BCX = select_again(threshold, scores_BCX, self.reads, selection)
            beyond = ((0, 0), (0, 0), (0, S - extent))
            return jnp.pad(chosen_BCX, beyond), jnp.pad(scores_BCX, beyond), *found

        chosen_BCS, scores_BCS, *found = tiles.at_extent(chosen, self.reads, S)
        return tiles.chosen_keys(chosen_BCS, scores_BCS, self.reads, selection.most), *found

    def _score(self, extent: int) -> jax.Array:
        """Scores [B, C, X] of the first X keys."""
        # The backward pass must find the very same bits: the barriers keep the compiler from fusing these scores
        # with their surroundings, which differ there.
        index = jax.lax.optimization_barrier(self.index(self.inputs.index.key[:, :extent]))
        return jax.lax.optimization_barrier(index_scores(index, self.how.selection.scale))

    def index(self, key_ZKI: jax.Array) -> IndexInputs:
        query_BTJI, _, gate_BTJ, bias_J = self.inputs.index
        return IndexInputs(self.cut(query_BTJI), key_ZKI, self.cut(gate_BTJ), bias_J)

    def logits(self, keys: Keys, i: jax.Array) -> jax.Array:
        """Of attention to block i; -inf where a query does not read a key."""
        logits_ZGNK = _matmul(self.q_ZGNE, tiles.block(keys, i, self.inputs.k_BSGE).transpose(0, 2, 3, 1))
        mask_ZCK = tiles.block_mask(keys, i, self.reads)
        Z, G, *_ = logits_ZGNK.shape
        logits_ZGRCK = logits_ZGNK.reshape(Z, G, -1, *mask_ZCK.shape[1:])
        return jnp.where(mask_ZCK[:, None, None], logits_ZGRCK, -jnp.inf).reshape(logits_ZGNK.shape)

    def head_mean(self, p_ZGNK: jax.Array) -> jax.Array:
        """Over all heads, [Z, C, K]."""
        return head_mean(p_ZGNK.reshape(len(p_ZGNK), -1, self.how.tiling.chunk, p_ZGNK.shape[-1]))

    def index_logits(self, keys: Keys, i: jax.Array) -> jax.Array:
        """Of the indexer on block i, wherever a query reads or not."""
        if keys.scores is not None:
            scores_ZCK = jax.lax.dynamic_slice_in_dim(keys.scores, i * keys.size, keys.size, axis=2)
            return scores_ZCK / self.how.selection.temperature
        index = self.index(tiles.block(keys, i, self.inputs.index.key))
        return index_scores(index, self.how.selection.scale) / self.how.selection.temperature


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


class _Softmax(NamedTuple):
    """Of the logits so far, over the last axis: the largest, and the sum of exponentials relative to it."""

    largest: jax.Array
    total: jax.Array

    @classmethod
    def empty(cls, shape: tuple[int, ...], dtype: jnp.dtype) -> _Softmax:
        # Finite, since a query may have no key in the first blocks, and infinities have no difference.
        return cls(jnp.full((*shape, 1), jnp.finfo(dtype).min / 2, dtype), jnp.zeros((*shape, 1), dtype))

    def add(self, logits: jax.Array) -> tuple[_Softmax, jax.Array, jax.Array]:
        """With more logits; their exponentials, and the factor by which earlier ones shrink."""
        largest = jnp.maximum(self.largest, jnp.max(logits, axis=-1, keepdims=True))
        weight, shrink = jnp.exp(logits - largest), jnp.exp(self.largest - largest)
        return _Softmax(largest, self.total * shrink + jnp.sum(weight, axis=-1, keepdims=True)), weight, shrink

    def denominator(self) -> jax.Array:
        """Of a query that reads nothing, as those that fill up a step, tiny instead of 0."""
        return jnp.maximum(self.total, jnp.finfo(self.total.dtype).tiny)

    def normaliser(self) -> jax.Array:
        return self.largest + jnp.log(self.denominator())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(how: _How, inputs: _Inputs) -> Attended:
    return _forward(how, inputs)[0]


def _forward(how: _How, inputs: _Inputs) -> tuple[Attended, Any]:
    def step(_: None, start: jax.Array) -> tuple[None, Any]:
        tile = _Tile(how, inputs, start)
        keys, threshold, variance_ZC = tile.select()
        o_ZGNE, normaliser_ZGN1 = _attention(tile, keys)
        attended = Attended(tile.ungroup(o_ZGNE), variance=variance_ZC)
        saved = _Saved(tile.ungroup(normaliser_ZGN1)[..., 0], None, threshold)
        if inputs.index is not None:
            loss_ZC, count_ZC, index_normaliser_ZC = _divergence(tile, keys, normaliser_ZGN1)
            attended = attended._replace(indexer_loss=loss_ZC, selected=count_ZC)
            saved = saved._replace(index_normaliser_BT=index_normaliser_ZC)
        return None, (attended, saved)

    _, (attended, saved) = tiles.over_tiles(step, None, inputs.q_BTHE.shape[1], how.tiling)
    return attended, (inputs, attended.output, saved)


def _attention(tile: _Tile, keys: Keys) -> tuple[jax.Array, jax.Array]:
    """The output [Z, G, N, E] in v's dtype, and the logarithm of the softmax's denominator, [Z, G, N, 1]."""
    v_BSGE, q_ZGNE = tile.inputs.v_BSGE, tile.q_ZGNE
    accumulate = jnp.promote_types(q_ZGNE.dtype, jnp.float32)

    def step(i: jax.Array, state: tuple[_Softmax, jax.Array]) -> tuple[_Softmax, jax.Array]:
        softmax, weight_ZGNK, shrink_ZGN1 = state[0].add(tile.logits(keys, i))
        v_ZGKE = tiles.block(keys, i, v_BSGE).transpose(0, 2, 1, 3)
        return softmax, state[1] * shrink_ZGN1 + _matmul(weight_ZGNK.astype(v_BSGE.dtype), v_ZGKE)

    state = _Softmax.empty(q_ZGNE.shape[:3], accumulate), jnp.zeros(q_ZGNE.shape, accumulate)
    softmax, o_ZGNE = keys.over_blocks(step, state)
    return (o_ZGNE / softmax.denominator()).astype(v_BSGE.dtype), softmax.normaliser()


def _divergence(tile: _Tile, keys: Keys, normaliser_ZGN1: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The indexer's loss, the number of keys, and the logarithm of the indexer's own denominator, each [Z, C]."""
    shape_ZC, dtype = tile.reads.position.shape, normaliser_ZGN1.dtype

    def add(i: jax.Array, state: tuple[_Softmax, jax.Array]) -> tuple[_Softmax, jax.Array]:
        mask_ZCK = tiles.block_mask(keys, i, tile.reads)
        softmax, *_ = state[0].add(jnp.where(mask_ZCK, tile.index_logits(keys, i), -jnp.inf))
        return softmax, state[1] + jnp.sum(mask_ZCK, axis=-1, dtype=jnp.int32)

    state = _Softmax.empty(shape_ZC, dtype), jnp.zeros(shape_ZC, jnp.int32)
    softmax, count_ZC = keys.over_blocks(add, state)
    index_normaliser_ZC = softmax.normaliser()[..., 0]

    def compare(i: jax.Array, sum_ZC: jax.Array) -> jax.Array:
        target_ZCK = tile.head_mean(jnp.exp(tile.logits(keys, i) - normaliser_ZGN1))
        return sum_ZC + divergence(target_ZCK, tile.index_logits(keys, i), index_normaliser_ZC)

    loss_ZC = keys.over_blocks(compare, jnp.zeros(shape_ZC, dtype))
    return loss_ZC, count_ZC, index_normaliser_ZC


def _backward(how: _How, residuals: tuple[_Inputs, jax.Array, _Saved], cotangents: Attended) -> tuple[_Inputs]:
    inputs, o_BTHE, saved = residuals
    q_BTHE, k_BSGE, v_BSGE, index, *_ = inputs
    accumulate = jnp.promote_types(q_BTHE.dtype, jnp.float32)

    def step(sums: _Sums, start: jax.Array) -> tuple[_Sums, Any]:
        tile = _Tile(how, inputs, start)
        keys, *_ = tile.select(jax.tree.map(tile.cut, saved.threshold))
        gradient = _gradient_of(tile, keys, o_BTHE, saved, cotangents)
        dindex = None if index is None else tuple(jnp.zeros_like(tile.cut(a)) for a in (index.query, index.gate))
        state = jnp.zeros(tile.q_ZGNE.shape, accumulate), dindex, sums
        dq_ZGNE, dindex, sums = keys.over_blocks(gradient, state)
        dq_ZCHE = tile.ungroup(dq_ZGNE) * q_BTHE.shape[-1] ** -0.5
        return sums, (dq_ZCHE.astype(q_BTHE.dtype), dindex)

    zero = functools.partial(jnp.zeros_like, dtype=accumulate)
    zero_index = (None, None) if index is None else (jnp.zeros_like(index.key), jnp.zeros_like(index.bias))
    sums = _Sums(zero(k_BSGE), zero(v_BSGE), *zero_index)
    sums, (dq_BTHE, dindex) = tiles.over_tiles(step, sums, q_BTHE.shape[1], how.tiling)
    if index is not None:
        dindex = IndexInputs(dindex[0], sums.index_BSI, dindex[1], sums.bias_J)
    return (_Inputs(dq_BTHE, sums.k_BSGE.astype(k_BSGE.dtype), sums.v_BSGE.astype(v_BSGE.dtype), dindex, None, None),)


def _gradient_of(tile: _Tile, keys: Keys, o_BTHE: jax.Array, saved: _Saved, cotangents: Attended) -> Any:
    """A step over block i that adds its gradients: of the tile's scaled queries, of its index, and of all keys."""
    k_BSGE, v_BSGE = tile.inputs.k_BSGE, tile.inputs.v_BSGE
    do_ZCHE, normaliser_ZGN1 = tile.cut(cotangents.output), tile.group(tile.cut(saved.normaliser_BTH)[..., None])
    delta_ZCH = jnp.sum(do_ZCHE.astype(normaliser_ZGN1.dtype) * tile.cut(o_BTHE), axis=-1)
    do_ZGNE, delta_ZGN1 = tile.group(do_ZCHE), tile.group(delta_ZCH[..., None])

    def step(i: jax.Array, state: tuple[jax.Array, Any, _Sums]) -> tuple[jax.Array, Any, _Sums]:
        dq_ZGNE, dindex, sums = state
        add = functools.partial(tiles.add_block, keys, i)
        k_ZKGE, v_ZKGE = (tiles.block(keys, i, a) for a in (k_BSGE, v_BSGE))
        p_ZGNK = jnp.exp(tile.logits(keys, i) - normaliser_ZGN1)
        dp_ZGNK = _matmul(do_ZGNE, v_ZKGE.transpose(0, 2, 3, 1))
        ds_ZGNK = (p_ZGNK * (dp_ZGNK - delta_ZGN1)).astype(tile.q_ZGNE.dtype)
        dq_ZGNE += _matmul(ds_ZGNK, k_ZKGE.transpose(0, 2, 1, 3))
        dk_ZGKE = _matmul(ds_ZGNK.swapaxes(2, 3), tile.q_ZGNE)
        dv_ZGKE = _matmul(p_ZGNK.astype(do_ZGNE.dtype).swapaxes(2, 3), do_ZGNE)
        dk_ZKGE, dv_ZKGE = (a.transpose(0, 2, 1, 3) for a in (dk_ZGKE, dv_ZGKE))
        sums = sums._replace(k_BSGE=add(sums.k_BSGE, dk_ZKGE), v_BSGE=add(sums.v_BSGE, dv_ZKGE))
        if dindex is not None:
            new = _index_gradient(tile, keys, i, p_ZGNK, saved, cotangents)
            dindex = dindex[0] + new.query, dindex[1] + new.gate
            sums = sums._replace(index_BSI=add(sums.index_BSI, new.key), bias_J=sums.bias_J + new.bias)
        return dq_ZGNE, dindex, sums

    return step


def _index_gradient(
    tile: _Tile, keys: Keys, i: jax.Array, p_ZGNK: jax.Array, saved: _Saved, cotangents: Attended
) -> IndexInputs:
    """Of the divergence on block i: (softmax of the logits - target) times the loss's cotangent, pulled back."""
    selection = tile.how.selection
    index = tile.index(tiles.block(keys, i, tile.inputs.index.key))
    scores_ZCK, pull_back = jax.vjp(lambda index: index_scores(index, selection.scale), index)
    predicted_ZCK = jnp.exp(scores_ZCK / selection.temperature - tile.cut(saved.index_normaliser_BT)[..., None])
    difference_ZCK = jnp.where(tiles.block_mask(keys, i, tile.reads), predicted_ZCK - tile.head_mean(p_ZGNK), 0)
    return pull_back(tile.cut(cotangents.indexer_loss)[..., None] * difference_ZCK / selection.temperature)[0]


_attend.defvjp(_forward, _backward)
