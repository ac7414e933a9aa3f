"""Forward kernels: attention over the lists, and then the divergence between it and the indexer; decoding.

New queries of a row are few and lie in one tile, or in two: each tile has all of them, and those that are the other's
see nothing of it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from models.attention.kernels import pieces
from models.attention.kernels.pieces import Array, How, Keys, Queries, Saved, Step

_LEAST = float(jnp.finfo(jnp.float32).min) / 2  # finite: a query may see no key in its first blocks


class Attention(NamedTuple):
    """Output [B, T, H·E] in v's dtype; the two of `Saved`; selected int32 [B, 1, T], the number of keys. In decoding
    the output alone."""

    output: Array
    normaliser: Array
    index_normaliser: Array
    selected: Array


class _Sums(NamedTuple):
    """Of a tile, over its list: products with values, transposed; of the softmaxes of the heads and of the indexer, if
    it is read, the largest logits and the sums of exponentials relative to them."""

    products_ME: Array
    largest_GN: Array
    total_GN: Array
    index_largest_1C: Array
    index_total_1C: Array


def attention(how: How, queries: Queries, keys: Keys, bias_J: jax.Array, lists_BPA: jax.Array) -> Attention:
    """Attention to the listed blocks, with an online softmax."""
    (B, T, M), N, G, C = queries.q.shape, how.ratio * how.block, how.groups, how.block
    shape, of_queries = jax.ShapeDtypeStruct, (B, 1, T)
    normalisers = shape((B, G, T * how.ratio), jnp.float32), shape(of_queries, jnp.float32)
    out = Attention(shape((B, T, M), keys.v.dtype), *normalisers, shape(of_queries, jnp.int32))
    shapes = ((G * how.width, N), (G, N), (G, N), (1, C), (1, C))
    scratch = _Sums(*(pltpu.VMEM(shape, jnp.float32) for shape in shapes))
    inputs = (queries,), keys, bias_J
    return pieces.over_lists(_attend, how, lists_BPA, inputs, (out, (1, 2, 2, 2)), (scratch,))


def extension(how: How, queries: Queries, keys: Keys, lists_RnA: jax.Array) -> jax.Array:
    """The output [R, C, H·E] of C queries each, against the listed blocks of a cache, where R is a multiple of B.

    Of a query that sees nothing of its list it is no number.
    """
    (R, C, M), N, G = queries.q.shape, how.ratio * queries.q.shape[1], how.groups
    out = Attention(jax.ShapeDtypeStruct((R, C, M), keys.v.dtype), None, None, None)
    scratch = [*(pltpu.VMEM(shape, jnp.float32) for shape in ((G * how.width, N), (G, N), (G, N))), None, None]
    inputs = (queries,), keys, jnp.zeros(1, jnp.float32)
    return pieces.over_lists(_attend, how, lists_RnA, inputs, (out, (1, 2, 2, 2)), (_Sums(*scratch),)).output


def _attend(
    how: How, step: Step, tile: tuple[Queries], keys: tuple[Keys, ...], bias_J: Array, out: Attention, sums: _Sums
) -> None:
    (queries,) = tile
    of_index = [] if queries.index is None else [sums.index_total_1C, out.selected]

    @pl.when(step.opens)
    def open_tile() -> None:
        pieces.clear(sums.products_ME, sums.total_GN, *of_index)
        for largest in (sums.largest_GN, *([sums.index_largest_1C] if of_index else [])):
            largest[...] = jnp.full(largest.shape, _LEAST, largest.dtype)

    # Lists are filled up at their ends.
    @pl.when(step.entries[0] >= 0)
    def add_blocks() -> None:
        hidden = [pieces.hidden(how, queries, entry) for entry in step.entries]
        blocks = list(zip(keys, hidden, strict=True))
        for g in range(how.groups):
            q_NE, of_group, row = pieces.stack(how, queries.q, g), pieces.lanes(how, g), slice(g, g + 1)
            logits = [pieces.logits(how, g, block, q_NE, hidden_KC) for block, hidden_KC in blocks]
            weights, shrink_1N = _add(sums.largest_GN, sums.total_GN, row, logits)
            product_EN = sums.products_ME[of_group] * shrink_1N
            for block, weight_KN in zip(keys, weights, strict=True):
                product_EN += pieces.dot(pieces.head(how, block.v, g), weight_KN.astype(block.v.dtype), 0, 0)
            sums.products_ME[of_group] = product_EN
        if not of_index:
            return
        logits = [_index_logits(how, queries, block, bias_J) + hidden_KC for block, hidden_KC in blocks]
        _add(sums.index_largest_1C, sums.index_total_1C, slice(0, 1), logits)
        for hidden_KC in hidden:
            out.selected[...] += jnp.sum((hidden_KC == 0).astype(jnp.int32), axis=0, keepdims=True)

    @pl.when(step.closes)
    def close_tile() -> None:
        for g in range(how.groups):
            o_EN = sums.products_ME[pieces.lanes(how, g)] / sums.total_GN[g : g + 1]
            pieces.unstack(how, o_EN.T, g, out.output)
        if not of_index:
            return
        out.normaliser[...] = sums.largest_GN[...] + jnp.log(sums.total_GN[...])
        out.index_normaliser[...] = sums.index_largest_1C[...] + jnp.log(sums.index_total_1C[...])


def _index_logits(how: How, queries: Queries, keys: Keys, bias_J: Array) -> jax.Array:
    return pieces.gated(queries.gate, pieces.opened(queries.index, keys.index[...], bias_J)) / how.temperature


def _add(largest: Array, total: Array, row: slice, logits: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """Adds logits [K, …] to a softmax over K; their exponentials, and the factor by which earlier ones shrink."""
    before = now = largest[row]
    for block in logits:
        now = jnp.maximum(now, jnp.max(block, axis=0, keepdims=True))
    weights, shrink = [jnp.exp(block - now) for block in logits], jnp.exp(before - now)
    largest[row] = now
    total[row] = total[row] * shrink + sum(jnp.sum(weight, axis=0, keepdims=True) for weight in weights)
    return weights, shrink


class _Loss(NamedTuple):
    loss: Array


def divergence(
    how: How, queries: Queries, keys: Keys, bias_J: jax.Array, lists_BPA: jax.Array, saved: Saved
) -> jax.Array:
    """The loss of the indexer, float32 [B, 1, T] (see `indexer.divergence`)."""
    B, T, _ = queries.q.shape
    out = _Loss(jax.ShapeDtypeStruct((B, 1, T), jnp.float32))
    inputs = (queries, saved), keys._replace(v=None), bias_J
    return pieces.over_lists(_diverge, how, lists_BPA, inputs, (out, (2,))).loss


def _diverge(
    how: How, step: Step, tile: tuple[Queries, Saved], keys: tuple[Keys, ...], bias_J: Array, out: _Loss
) -> None:
    queries, saved = tile

    @pl.when(step.opens)
    def open_tile() -> None:
        pieces.clear(out.loss)

    @pl.when(step.entries[0] >= 0)
    def add_blocks() -> None:
        q_GNE = [pieces.stack(how, queries.q, g) for g in range(how.groups)]
        for entry, block in zip(step.entries, keys, strict=True):
            hidden_KC = pieces.hidden(how, queries, entry)
            p_GKN = [pieces.probabilities(how, g, block, q_NE, hidden_KC, saved) for g, q_NE in enumerate(q_GNE)]
            target_KC = pieces.head_mean(how, p_GKN)
            logits_KC = _index_logits(how, queries, block, bias_J)
            log_ratio_KC = jnp.log(jnp.where(target_KC > 0, target_KC, 1)) - (logits_KC - saved.index_normaliser[...])
            out.loss[...] += jnp.sum(target_KC * log_ratio_KC, axis=0, keepdims=True)
