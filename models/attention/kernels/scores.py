"""The lists of all tiles: index scores are reduced to the largest of each block as they arise, and never stored.

A list rests on its tile's first query: T/W queries are scored against S keys, and P² numbers are kept.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from models.attention.kernels import pieces
from models.attention.kernels.pieces import Array
from models.attention.keys import Reads, Selection
from models.attention.selection import choose_blocks, first_queries, list_length, of_tiles
from models.attention.tiles import pad

_FIRSTS = 128  # first queries at a time: the lanes of a TPU
_BLOCKS = 8  # blocks of keys at a time: what a TPU writes at once


class _Firsts(NamedTuple):
    """Of first queries, [B, J, X, I] scaled, [B, J, X], and int32 [B, 1, X] each."""

    query: Array
    gate: Array
    position: Array
    first: Array


class _Moments(NamedTuple):
    """Of the scores so far, float32 [1, X]: how many, their mean, and the sum of squares of differences from it."""

    count: Array
    mean: Array
    squares: Array


class _Scored(NamedTuple):
    """The largest score of every block [B, P, X], 0 where nothing is seen; the variance of all [B, 1, X]."""

    best: Array
    variance: Array


def select_blocks(reads: Reads, selection: Selection, interpret: bool = False) -> tuple[jax.Array, jax.Array | None]:
    """`selection.select_blocks` on rows, or whole tiles of them."""
    W, S = selection.block, reads.index.key.shape[1]
    firsts = first_queries(jax.lax.stop_gradient(reads), W)
    scored = _score(firsts, W, selection.scale, interpret)
    X = firsts.position.shape[1]
    variance_BX = None if selection.k_rule == "fixed" else scored.variance[:, 0, :X]
    best_BXP = scored.best[:, : -(-S // W), :X].swapaxes(1, 2)
    lists_BPA = choose_blocks(best_BXP, variance_BX, firsts, selection, list_length(selection, S))
    return lists_BPA, of_tiles(variance_BX, reads, W)


def _score(firsts: Reads, W: int, scale: float, interpret: bool) -> _Scored:
    index = firsts.index
    key_BSI = pad(index.key, _BLOCKS * W)
    query, gate, position, first = (pad(a, _FIRSTS) for a in (index.query * scale, index.gate, *firsts[:2]))
    arrays = _Firsts(query.transpose(0, 2, 1, 3), gate.transpose(0, 2, 1), position[:, None], first[:, None])
    (B, S, _), X = key_BSI.shape, position.shape[1]
    tiles, steps = X // _FIRSTS, S // (_BLOCKS * W)

    def at_firsts(b: Any, x: Any, i: Any) -> tuple[Any, Any]:
        return b, x

    def at_keys(b: Any, x: Any, i: Any) -> tuple[Any, Any]:
        return b, i

    shape = jax.ShapeDtypeStruct
    out = _Scored(shape((B, S // W, X), jnp.float32), shape((B, 1, X), jnp.float32))
    best = pl.BlockSpec((None, _BLOCKS, _FIRSTS), lambda b, x, i: (b, i, x))
    moments = _Moments(*(pltpu.VMEM((1, _FIRSTS), jnp.float32) for _ in range(3)))
    run = pieces.call(
        functools.partial(_add_scores, W),
        interpret,
        (out,),
        num_scalar_prefetch=0,
        grid=(B, tiles, steps),
        in_specs=(
            pieces.specs(arrays, tiles, at_firsts, (2, 2, 2, 2)),
            pieces.spec(key_BSI.shape, 1, steps, at_keys),
            pl.BlockSpec(memory_space=pltpu.SMEM),
        ),
        out_specs=(_Scored(best, pieces.spec(out.variance.shape, 2, tiles, at_firsts)),),
        scratch_shapes=(moments,),
    )
    return run(arrays, key_BSI, index.bias)[0]


def _add_scores(W: int, firsts: _Firsts, key_KI: Array, bias_J: Array, out: _Scored, moments: _Moments) -> None:
    i = pl.program_id(2)

    @pl.when(i == 0)
    def open_tile() -> None:
        pieces.clear(*moments)

    score_KX = pieces.gated(firsts.gate, pieces.opened(firsts.query, key_KI[...], bias_J))
    key_K1 = i * len(score_KX) + jax.lax.broadcasted_iota(jnp.int32, score_KX.shape, 0)
    visible_KX = (firsts.first[...] <= key_K1) & (key_K1 <= firsts.position[...])
    seen_KX = jnp.where(visible_KX, score_KX, 0.0)
    for n in range(_BLOCKS):
        out.best[n : n + 1] = jnp.max(seen_KX[n * W : (n + 1) * W], axis=0, keepdims=True)
    _add_moments(moments, seen_KX, visible_KX)
    out.variance[...] = moments.squares[...] / jnp.maximum(moments.count[...], 1.0)


def _add_moments(moments: _Moments, seen_KX: jax.Array, visible_KX: jax.Array) -> None:
    """Joins the moments of more scores (Chan, Golub and LeVeque, 1979)."""
    count_1X = jnp.sum(visible_KX.astype(jnp.float32), axis=0, keepdims=True)
    mean_1X = jnp.sum(seen_KX, axis=0, keepdims=True) / jnp.maximum(count_1X, 1.0)
    deviation_KX = jnp.where(visible_KX, seen_KX - mean_1X, 0.0)
    total_1X = jnp.maximum(moments.count[...] + count_1X, 1.0)
    difference_1X = mean_1X - moments.mean[...]
    among_1X = jnp.square(difference_1X) * moments.count[...] * count_1X / total_1X
    moments.squares[...] += jnp.sum(jnp.square(deviation_KX), axis=0, keepdims=True) + among_1X
    moments.mean[...] += difference_1X * count_1X / total_1X
    moments.count[...] += count_1X
