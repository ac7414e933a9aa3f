"""Attention of tiles of queries over listed blocks of keys, for single rows: what `blocks` is made of.

A few tiles at a time gather the tokens of their blocks and attend to them in plain matrix products. The backward
pass keeps the lists and the log of every softmax's sum, and computes the rest again.

Axes as in `blocks`: W tokens of a block, P blocks (and tiles) of a row, A entries of a list, C tiles at a time,
S = A·W gathered tokens, R = H/G heads of a group, N = R·W rows of a product.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.attention import reference
from models.attention.reference import IndexInputs, Selection

# Bounds the scores that exist at one time, over all rows.
_STEP_ELEMENTS = 2**22


class Tiles(NamedTuple):
    """Of the queries: q [P, W, H, E], query [P, W, J, I], gate [P, W, J], position [P, W], first [P, W], the
    position of the first token of the query's document, and lists [P, A]."""

    q: jax.Array
    query: jax.Array | None
    gate: jax.Array | None
    position: jax.Array
    first: jax.Array
    lists: jax.Array


class Blocks(NamedTuple):
    """Of the keys: k and v [P, W, G, E], index key [P, W, I]."""

    k: jax.Array
    v: jax.Array
    key: jax.Array | None


class _Flow(NamedTuple):
    """Of the outputs: gradient of o [P, W, H, E], its product with o [P, W, H], lse [P, W, H], gradient of the loss."""

    o: jax.Array
    delta: jax.Array
    lse: jax.Array
    loss: jax.Array


class Split(NamedTuple):
    """Tokens of a block, and tiles of one step: static."""

    block: int
    tiles: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def attend_lists(
    q_THE: jax.Array,
    k_SGE: jax.Array,
    v_SGE: jax.Array,
    index: IndexInputs,
    segment_T: jax.Array,
    lists_PA: jax.Array,
    selection: Selection,
    split: Split,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Output [T, H, E], indexer loss [T], log-sum-exp of the logits [T, H] and number of keys [T].

    Only the first two have gradients.
    """
    tiles, blocks = _cut_row(q_THE, k_SGE, v_SGE, index, segment_T, lists_PA, split.block)

    def one(tile: Tiles) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        near, mask_WS = gather(blocks, tile)
        o_WHE, p_GRWS, lse_WH = softmax_attention(tile.q, near, mask_WS)
        index_of_tile = IndexInputs(tile.query, near.key, tile.gate, index.bias)
        loss_W = _divergence(index_of_tile, jnp.mean(p_GRWS, axis=(0, 1)), mask_WS, selection)
        return o_WHE, loss_W, lse_WH, jnp.sum(mask_WS, axis=-1, dtype=jnp.int32)

    outputs = jax.lax.map(one, tiles, batch_size=split.tiles)
    return jax.tree.map(lambda a: _join(a, len(segment_T)), outputs)


def _attend_lists_forward(q, k, v, index, segment, lists, selection, split):
    outputs = attend_lists(q, k, v, index, segment, lists, selection, split)
    return outputs, (q, k, v, index, segment, lists, outputs[0], outputs[2])


def _attend_lists_backward(selection, split, residuals, cotangents):
    """Adds up the gradients of blocks over the tiles that list them, a few tiles at a time."""
    *inputs, o_THE, lse_TH = residuals
    do_THE, dloss_T = cotangents[:2]
    tiles, blocks = _cut_row(*inputs, split.block)
    bias_J, T = inputs[3].bias, len(o_THE)
    delta_TH = jnp.sum(do_THE.astype(lse_TH.dtype) * o_THE, axis=-1)
    flows = jax.tree.map(lambda a: cut(a, split.block), _Flow(do_THE, delta_TH, lse_TH, dloss_T))

    def step(totals: tuple[jax.Array, ...], part: tuple[Tiles, _Flow]):
        tiles, flows = part
        gradients = jax.vmap(lambda tile, flow: _tile_gradients(tile, flow, blocks, bias_J, selection))
        d_tiles, d_near, dbias_CJ = gradients(tiles, flows)
        at_CA = jnp.where(tiles.lists >= 0, tiles.lists, len(blocks.k))
        d_blocks = (total.at[at_CA].add(d, mode="drop") for total, d in zip(totals, d_near, strict=False))
        return (*d_blocks, totals[-1] + jnp.sum(dbias_CJ, axis=0)), d_tiles

    totals = tuple(jnp.zeros(a.shape, lse_TH.dtype) for a in (*blocks, bias_J))
    # Repeated tiles fill the last step: without a flow they have no gradient.
    parts = _in_steps(tiles, split.tiles, "edge"), _in_steps(flows, split.tiles, "constant")
    (*d_blocks, dbias_J), d_tiles = jax.lax.scan(step, totals, parts)
    dk_SGE, dv_SGE, dkey_SI = (_join(a, T) for a in d_blocks)
    dq_THE, dquery_TJI, dgate_TJ = (_join(a.reshape(-1, *a.shape[2:]), T) for a in d_tiles)
    gradients = (dq_THE, dk_SGE, dv_SGE, IndexInputs(dquery_TJI, dkey_SI, dgate_TJ, dbias_J))
    return *jax.tree.map(lambda d, a: d.astype(a.dtype), gradients, tuple(inputs[:4])), None, None


attend_lists.defvjp(_attend_lists_forward, _attend_lists_backward)


def _tile_gradients(
    tile: Tiles, flow: _Flow, blocks: Blocks, bias_J: jax.Array, selection: Selection
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...], jax.Array]:
    """Gradients of a tile's q, query and gate, of its blocks' k, v and key [A, W, ...], and of the bias [J]."""
    near, mask_WS = gather(blocks, tile)
    logits_GRWS, q_GNE = _logits(tile.q, near.k, mask_WS)
    G, R, W, S = logits_GRWS.shape
    p_GRWS = jnp.exp(logits_GRWS - flow.lse.T.reshape(G, R, W, 1))
    matmul = functools.partial(jnp.matmul, preferred_element_type=p_GRWS.dtype)
    do_GNE = _rows(flow.o, G)
    dp_GRWS = matmul(do_GNE, near.v.swapaxes(1, 2)).reshape(G, R, W, S)
    dlogits_GRWS = p_GRWS * (dp_GRWS - flow.delta.T.reshape(G, R, W, 1))
    p_GNS, dlogits_GNS = (a.reshape(G, R * W, S).astype(tile.q.dtype) for a in (p_GRWS, dlogits_GRWS))
    dq_WHE = _heads(matmul(dlogits_GNS, near.k), W) * tile.q.shape[-1] ** -0.5
    dk_GSE, dv_GSE = matmul(dlogits_GNS.swapaxes(1, 2), q_GNE), matmul(p_GNS.swapaxes(1, 2), do_GNE)
    target_WS = jnp.mean(p_GRWS, axis=(0, 1))
    index = IndexInputs(tile.query, near.key, tile.gate, bias_J)
    d_index = jax.vjp(lambda index: _divergence(index, target_WS, mask_WS, selection), index)[1](flow.loss)[0]
    dk_AWGE, dv_AWGE = (d.swapaxes(0, 1).reshape(-1, *blocks.k.shape[1:]) for d in (dk_GSE, dv_GSE))
    dkey_AWI = d_index.key.reshape(-1, *blocks.key.shape[1:])
    return (dq_WHE, d_index.query, d_index.gate), (dk_AWGE, dv_AWGE, dkey_AWI), d_index.bias


def softmax_attention(q_WHE: jax.Array, near: Blocks, mask_WS: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Output [W, H, E], probabilities [G, R, W, S] and log-sum-exp of the logits [W, H]; 0 where nothing is seen."""
    logits_GRWS, _ = _logits(q_WHE, near.k, mask_WS)
    G, R, W, S = logits_GRWS.shape
    largest_GRW1 = jnp.max(logits_GRWS, axis=-1, keepdims=True)
    largest_GRW1 = jnp.where(largest_GRW1 > -jnp.inf, largest_GRW1, 0)
    weight_GRWS = jnp.exp(logits_GRWS - largest_GRW1)
    total_GRW1 = jnp.maximum(jnp.sum(weight_GRWS, axis=-1, keepdims=True), jnp.finfo(weight_GRWS.dtype).tiny)
    weight_GNS = weight_GRWS.astype(near.v.dtype).reshape(G, R * W, S)
    o_GNE = jnp.matmul(weight_GNS, near.v, preferred_element_type=weight_GRWS.dtype)
    o_WHE = _heads(o_GNE / total_GRW1.reshape(G, R * W, 1), W).astype(near.v.dtype)
    lse_WH = (largest_GRW1 + jnp.log(total_GRW1)).reshape(G * R, W).T
    return o_WHE, weight_GRWS / total_GRW1, lse_WH


def _logits(q_WHE: jax.Array, k_GSE: jax.Array, mask_WS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits [G, R, W, S], -inf where masked out, and the scaled rows of q [G, N, E] behind them."""
    G, S, E = k_GSE.shape
    q_GNE = _rows(q_WHE * E**-0.5, G)
    accumulate = jnp.promote_types(q_WHE.dtype, jnp.float32)
    logits_GNS = jnp.matmul(q_GNE, k_GSE.swapaxes(1, 2), preferred_element_type=accumulate)
    return jnp.where(mask_WS, logits_GNS.reshape(G, -1, len(q_WHE), S), -jnp.inf), q_GNE


def _divergence(index: IndexInputs, target_WS: jax.Array, mask_WS: jax.Array, selection: Selection) -> jax.Array:
    return reference.indexer_divergence(row_scores(index, selection), target_WS, mask_WS, selection.temperature)


def row_scores(index: IndexInputs, selection: Selection) -> jax.Array:
    """`reference.index_scores` of one row: [W, S]."""
    query, key, gate, bias = index
    return reference.index_scores(IndexInputs(query[None], key[None], gate[None], bias), selection.scale)[0]


def first_token(
    q_THE: jax.Array, k_SGE: jax.Array, lse_TH: jax.Array, segment_T: jax.Array, lists_PA: jax.Array, block: int
) -> tuple[jax.Array, jax.Array]:
    """What each head gives to the first token of the query's document [T, H], and whether it is listed [T]."""
    first_T = reference.first_position(segment_T[None])[0]
    T, G, E = len(first_T), *k_SGE.shape[1:]
    q_TGRE, k_TGE = (q_THE * E**-0.5).reshape(T, G, -1, E), k_SGE[first_T]
    logits_TGR = jnp.einsum("tgre,tge->tgr", q_TGRE, k_TGE, preferred_element_type=lse_TH.dtype)
    lists_TA = lists_PA[jnp.arange(T) // block]
    listed_T = jnp.any(lists_TA == first_T[:, None] // block, axis=-1)
    return jnp.where(listed_T[:, None], jnp.exp(logits_TGR.reshape(T, -1) - lse_TH), 0), listed_T


def _cut_row(q_THE, k_SGE, v_SGE, index, segment_T, lists_PA, block) -> tuple[Tiles, Blocks]:
    first_PW = cut(reference.first_position(pad(segment_T[None], block, -1))[0], block)
    position_PW = jnp.arange(first_PW.size, dtype=jnp.int32).reshape(first_PW.shape)
    q_PWHE, query_PWJI, gate_PWJ = (cut(a, block) for a in (q_THE, index.query, index.gate))
    k_PWGE, v_PWGE, key_PWI = (cut(a, block) for a in (k_SGE, v_SGE, index.key))
    tiles = Tiles(q_PWHE, query_PWJI, gate_PWJ, position_PW, first_PW, lists_PA)
    return tiles, Blocks(k_PWGE, v_PWGE, key_PWI)


def gather(blocks: Blocks, tile: Tiles) -> tuple[Blocks, jax.Array]:
    """The tokens of a tile's blocks, k and v [G, S, E] and key [S, I] with S = A·W, and who sees which [W, S]."""
    block = blocks.k.shape[1]
    near = jax.tree.map(lambda a: _join(a[jnp.maximum(tile.lists, 0)]), blocks)
    position_S = (tile.lists[:, None] * block + jnp.arange(block)).reshape(-1)
    # Entries of -1 name positions before 0, which nobody sees.
    mask_WS = reference.visible_keys(tile.position[None], tile.first[None], position_S)[0]
    return near._replace(k=near.k.swapaxes(0, 1), v=near.v.swapaxes(0, 1)), mask_WS


def _rows(q_WHE: jax.Array, G: int) -> jax.Array:
    """[W, H, E] to [G, N, E]: the heads of a group read the same keys, so that they are rows of one product."""
    W, _, E = q_WHE.shape
    return q_WHE.reshape(W, G, -1, E).transpose(1, 2, 0, 3).reshape(G, -1, E)


def _heads(o_GNE: jax.Array, W: int) -> jax.Array:
    """The inverse of `_rows`."""
    G, _, E = o_GNE.shape
    return o_GNE.reshape(G, -1, W, E).transpose(2, 0, 1, 3).reshape(W, -1, E)


def tiles_at_once(elements: int) -> int:
    return max(1, _STEP_ELEMENTS // elements)


def _in_steps(tree, tiles: int, mode: str):
    """Arrays [P, ...] as steps [P / tiles, tiles, ...], the last one filled up as `mode` of jnp.pad says."""

    def split(a: jax.Array) -> jax.Array:
        C = min(tiles, len(a))
        filled = jnp.pad(a, ((0, -len(a) % C), *((0, 0),) * (a.ndim - 1)), mode)
        return filled.reshape(-1, C, *a.shape[1:])

    return jax.tree.map(split, tree)


def cut(a: jax.Array, block: int, fill: int = 0) -> jax.Array:
    """[T, ...] to blocks [P, W, ...]."""
    padded = pad(a[None], block, fill)[0]
    return padded.reshape(-1, block, *a.shape[1:])


def _join(a: jax.Array, length: int | None = None) -> jax.Array:
    """Blocks [P, W, ...] to their first `length` tokens."""
    return a.reshape(-1, *a.shape[2:])[:length]


def pad(a: jax.Array, block: int, fill: int = 0, axis: int = 1) -> jax.Array:
    extra = [(0, 0)] * a.ndim
    extra[axis] = (0, -a.shape[axis] % block)
    return jnp.pad(a, extra, constant_values=fill)


def take(a: jax.Array, index: jax.Array) -> jax.Array:
    """a[index] for an index that may lie beyond the end; those entries go unused."""
    return jnp.take(a, index, axis=0, mode="clip")
