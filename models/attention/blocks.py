"""Block selection: a labelled variant of gated sparse attention that selects blocks of keys for tiles of queries.

Keys are cut into aligned blocks of W tokens, queries into tiles of the same W. A tile has one list of blocks,
shared by its queries and by all heads, so that its keys are gathered once and enter plain matrix products.
Where the paper selects single tokens for single queries:
  - A list rests on the scores of the tile's *first* query alone. Those of its later queries would tell the
    earlier ones about their future.
  - A block scores the largest score of its tokens that the first query sees; of equal blocks the lower wins.
  - The first query's k, rounded up to blocks, is the length of the list. The tile's own block is always in it
    and counts; so are the blocks that hold the first `keep_first` tokens of the first query's document or its
    latest `keep_local` tokens.
  - A query attends to every token that it sees in the listed blocks. A document that opens inside a tile lies
    in the tile's own block up to there, so that its queries miss nothing.
Tiles are aligned to the row, not to documents: packed elsewhere, a document may select other keys.

Lists are int32 [B, P, A], ascending, with -1 for "no block": what kernels for block-sparse attention take.
The indexer's loss is `reference.indexer_divergence` of every query on the tokens that it attends to.

Axes beside the legend's: W tokens of a block, P blocks (and tiles) of a row, A entries of a list, C tiles or
new tokens at a time, R = H/G heads of a group, N = R·W rows of a product. Public functions take batches, the
others single rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from models.attention import reference
from models.attention.block_tiles import (
    Blocks,
    Split,
    Tiles,
    attend_lists,
    cut,
    first_token,
    gather,
    pad,
    row_scores,
    softmax_attention,
    take,
    tiles_at_once,
)
from models.attention.reference import IndexInputs, Selection, SparseStatistics
from models.attention.selection import select_mask


def check_block(block: int, capacity: int | None = None) -> None:
    """Raises a ValueError if `block` is no block size, or does not divide a cache's capacity.

    >>> check_block(48, capacity=64)
    Traceback (most recent call last):
    ValueError: block=48 must divide the cache's capacity of 64
    """
    if not isinstance(block, int) or block < 1:
        raise ValueError(f"block={block!r} must be a positive integer")
    if capacity is not None and capacity % block:
        raise ValueError(f"block={block!r} must divide the cache's capacity of {capacity}")


def list_length(selection: Selection, length: int, *, block: int) -> int:
    """A, the most blocks that a tile selects in a row of `length` tokens, whatever the scores.

    >>> list_length(Selection(1.0, 1.0, "fixed", k_base=100, k_min=1, k_max=1), 4096, block=32)
    4
    """
    check_block(block)
    most_keys = selection.k_base if selection.k_rule == "fixed" else selection.k_max
    local = -(-max(selection.keep_local - 1, 0) // block)
    first = (selection.keep_first + block - 2) // block + 1 if selection.keep_first else 0
    return min(max(-(-most_keys // block), 1 + local + first), -(-length // block))


def select_blocks(
    index: IndexInputs, segments_BT: jax.Array, running_variance: jax.Array, selection: Selection, *, block: int
) -> tuple[jax.Array, jax.Array]:
    """The selected blocks of every tile, int32 [B, P, A], and the variance of its first query's scores, [B, P].

    P is T / block, rounded up. No gradient passes.

    Raises:
      ValueError: `block` is not a positive integer.
    """
    entries = list_length(selection, segments_BT.shape[1], block=block)
    rows = IndexInputs(index.query[:, ::block], pad(index.key, block), index.gate[:, ::block], index.bias)
    position_P = jnp.arange(0, segments_BT.shape[1], block, dtype=jnp.int32)
    split = Split(block, tiles_at_once(rows.key.shape[0] * rows.key.shape[1] * rows.bias.shape[0]))
    select = functools.partial(_select, selection=selection, entries=entries, split=split)
    over_rows = jax.vmap(select, in_axes=(IndexInputs(0, 0, 0, None), None, 0, None))
    return over_rows(rows, position_P, reference.first_position(segments_BT)[:, ::block], running_variance)


def extend_lists(
    lists_BPA: jax.Array,
    index: IndexInputs,
    position_BC: jax.Array,
    running_variance: jax.Array,
    selection: Selection,
    *,
    block: int,
) -> jax.Array:
    """A cache's lists, with those of the tiles whose first query is among C new tokens.

    A row of the cache is one document, from its slot 0 on.

    Args:
      lists_BPA: int32 lists of all S / block tiles, at first -1; A is `list_length` of S.
      index: query [B, C, J, I] and gate [B, C, J] of the new tokens; key [B, S, I] of the cache, with theirs.
      position_BC: consecutive positions of the new tokens.

    Raises:
      ValueError: `block` is not a positive integer that divides S.
    """
    B, S = index.key.shape[:2]
    check_block(block, S)
    split = Split(block, tiles_at_once(B * S * index.bias.shape[0]))

    def extend(lists_PA: jax.Array, index: IndexInputs, position_C: jax.Array) -> jax.Array:
        C, P = len(position_C), len(lists_PA)
        tile_X = -(-position_C[0] // block) + jnp.arange(-(-C // block), dtype=jnp.int32)
        slot_X = tile_X * block - position_C[0]
        rows = index._replace(query=take(index.query, slot_X), gate=take(index.gate, slot_X))
        new_XA, _ = _select(
            rows,
            tile_X * block,
            jnp.zeros_like(tile_X),
            running_variance,
            selection,
            entries=lists_PA.shape[1],
            split=split,
        )
        return lists_PA.at[jnp.where(slot_X < C, tile_X, P)].set(new_XA, mode="drop")

    return jax.vmap(extend, in_axes=(0, IndexInputs(0, 0, 0, None), 0))(lists_BPA, index, position_BC)


def block_attention(
    q_BTHE: jax.Array,
    k_BSGE: jax.Array,
    v_BSGE: jax.Array,
    index: IndexInputs,
    segments_BT: jax.Array,
    running_variance: jax.Array,
    selection: Selection,
    *,
    block: int,
) -> tuple[jax.Array, SparseStatistics]:
    """`oracle` in memory linear in T: a few tiles at a time gather their blocks and forget them.

    The backward pass keeps the lists and the log of every softmax's sum, and computes the rest again. Arguments,
    results and gradients are those of `oracle`; T need not be a multiple of `block`.

    Raises:
      ValueError: `block` is not a positive integer.
    """
    T = segments_BT.shape[1]
    lists_BPA, variance_BP = select_blocks(index, segments_BT, running_variance, selection, block=block)
    B, _, H, _ = q_BTHE.shape
    split = Split(block, tiles_at_once(B * H * block * block * lists_BPA.shape[2]))
    arrays = (q_BTHE, k_BSGE, v_BSGE, index, segments_BT)

    def row(q_THE, k_SGE, v_SGE, index, segment_T, lists_PA):
        o_THE, loss_T, lse_TH, seen_T = attend_lists(q_THE, k_SGE, v_SGE, index, segment_T, lists_PA, selection, split)
        p_TH, listed_T = first_token(*jax.lax.stop_gradient((q_THE, k_SGE, lse_TH)), segment_T, lists_PA, block)
        return o_THE, loss_T, seen_T, p_TH, listed_T

    in_axes = (0, 0, 0, IndexInputs(0, 0, 0, None), 0, 0)
    o_BTHE, loss_BT, seen_BT, first_BTH, listed_BT = jax.vmap(row, in_axes)(*arrays, lists_BPA)
    variance_BT = jnp.repeat(variance_BP, block, axis=1)[:, :T]
    return o_BTHE, SparseStatistics(loss_BT, seen_BT, variance_BT, first_BTH, listed_BT)


def counts_variance(segments_BT: jax.Array, *, block: int) -> jax.Array:
    """Whose variance the running variance averages, bool [B, T]: first queries of tiles that see two keys or more.

    >>> counts_variance(jnp.array([[0, 0, 0, 0, 1, 1, -1, -1]]), block=2).astype(int).tolist()
    [[0, 0, 1, 0, 0, 0, 0, 0]]
    """
    first_T = jnp.arange(segments_BT.shape[1]) % block == 0
    return first_T & (segments_BT >= 0) & ~reference.document_start(segments_BT)


def attend_cached(
    q_BCHE: jax.Array,
    k_BSGE: jax.Array,
    v_BSGE: jax.Array,
    lists_BPA: jax.Array,
    position_BC: jax.Array,
    *,
    block: int,
) -> jax.Array:
    """Attention of C new tokens a row over the blocks that a cache lists for their tiles; [B, C, H, E].

    Equal to `block_attention` on the row's whole text, however it is split into extensions.

    Args:
      k_BSGE, v_BSGE: the cache, with the new tokens.
      lists_BPA: its lists, with the new tokens' (see `extend_lists`).
      position_BC: consecutive positions of the new tokens.

    Raises:
      ValueError: `block` is not a positive integer that divides S.
    """
    B, C, H, _ = q_BCHE.shape
    check_block(block, k_BSGE.shape[1])
    width = min(C, block)
    at_once = tiles_at_once(B * H * width * block * lists_BPA.shape[2])

    def attend(q_CHE, k_SGE, v_SGE, lists_PA, position_C):
        tile_X = position_C[0] // block + jnp.arange((C + block - 2) // block + 1, dtype=jnp.int32)
        opening_X = jnp.maximum(tile_X * block - position_C[0], 0)
        slot_XW = opening_X[:, None] + jnp.arange(width, dtype=jnp.int32)
        position_XW = take(position_C, slot_XW)
        first_XW, lists_XA = jnp.zeros_like(position_XW), take(lists_PA, tile_X)
        tiles = Tiles(take(q_CHE, slot_XW), None, None, position_XW, first_XW, lists_XA)
        blocks = Blocks(cut(k_SGE, block), cut(v_SGE, block), None)

        def one(tile: Tiles) -> jax.Array:
            near, mask_WS = gather(blocks, tile)
            return softmax_attention(tile.q, near, mask_WS)[0]

        o_XWHE = jax.lax.map(one, tiles, batch_size=at_once)
        nth_C = position_C // block - tile_X[0]
        return o_XWHE[nth_C, jnp.arange(C) - opening_X[nth_C]]

    return jax.vmap(attend)(q_BCHE, k_BSGE, v_BSGE, lists_BPA, position_BC)


def oracle(
    q_BTHE: jax.Array,
    k_BSGE: jax.Array,
    v_BSGE: jax.Array,
    index: IndexInputs,
    segments_BT: jax.Array,
    running_variance: jax.Array,
    selection: Selection,
    *,
    block: int,
) -> tuple[jax.Array, SparseStatistics]:
    """Attention over selected blocks in its plain O(T²) form: the definition of correct.

    The output gives no gradient to `index`, the loss none to q, k and v. The statistics are those of
    `reference.sparse_attention`, but the variance is that of the scores of the tile's first query.

    Raises:
      ValueError: `block` is not a positive integer.
    """
    check_block(block)
    T = segments_BT.shape[1]
    scores_BTS = reference.index_scores(index, selection.scale)
    first_BPS = jax.lax.stop_gradient(pad(scores_BTS[:, ::block], block, axis=2))
    choose = functools.partial(_choose, running_variance=running_variance, selection=selection, block=block)
    position_P = jnp.arange(0, T, block, dtype=jnp.int32)
    opening_BP = reference.first_position(segments_BT)[:, ::block]
    listed_BPP, variance_BP = jax.vmap(choose, in_axes=(0, None, 0))(first_BPS, position_P, opening_BP)
    listed_BTS = jnp.repeat(jnp.repeat(listed_BPP, block, axis=1), block, axis=2)[:, :T, :T]
    selected_BTS = listed_BTS & reference.visible_mask(segments_BT)
    o_BTHE, p_BGRTS = reference.attend(q_BTHE, k_BSGE, v_BSGE, selected_BTS)
    target_BTS = jnp.mean(jax.lax.stop_gradient(p_BGRTS), axis=(1, 2))
    first_BT1 = reference.first_position(segments_BT)[..., None]
    return o_BTHE, SparseStatistics(
        indexer_loss=reference.indexer_divergence(scores_BTS, target_BTS, selected_BTS, selection.temperature),
        selected=jnp.sum(selected_BTS, axis=-1, dtype=jnp.int32),
        variance=jnp.repeat(variance_BP, block, axis=1)[:, :T],
        first_token=reference.first_token_probability(p_BGRTS, segments_BT),
        first_token_selected=jnp.take_along_axis(selected_BTS, first_BT1, axis=-1)[..., 0],
    )


def _select(
    rows: IndexInputs,
    position_X: jax.Array,
    first_X: jax.Array,
    running_variance: jax.Array,
    selection: Selection,
    entries: int,
    split: Split,
) -> tuple[jax.Array, jax.Array]:
    """Lists [X, A] and variances [X] for the first queries of X tiles, at `position` in documents from `first` on."""
    rows, running_variance = jax.lax.stop_gradient((rows, running_variance))
    P = rows.key.shape[0] // split.block

    def one(tile: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        query_JI, gate_J, position, first = tile
        scores_1S = row_scores(rows._replace(query=query_JI[None], gate=gate_J[None]), selection)
        listed_1P, variance_1 = _choose(
            scores_1S, position[None], first[None], running_variance, selection=selection, block=split.block
        )
        entry_P = jnp.sort(jnp.where(listed_1P[0], jnp.arange(P, dtype=jnp.int32), P))[:entries]
        return jnp.where(entry_P < P, entry_P, -1), variance_1[0]

    return jax.lax.map(one, (rows.query, rows.gate, position_X, first_X), batch_size=split.tiles)


def _choose(
    scores_CS: jax.Array,
    position_C: jax.Array,
    first_C: jax.Array,
    running_variance: jax.Array,
    *,
    selection: Selection,
    block: int,
) -> tuple[jax.Array, jax.Array]:
    """The blocks [C, P] that first queries select by their scores, and the scores' variance [C]."""
    C, S = scores_CS.shape
    places = position_C[None], first_C[None], jnp.arange(S, dtype=jnp.int32)
    visible_CS = reference.visible_keys(*places)[0]
    variance_C = reference.score_variance(scores_CS, visible_CS)
    count_C = -(-reference.choose_k(variance_C, running_variance, selection) // block)
    # A query always sees itself, so that its own place stands for its tile's own block.
    kept_CS = reference.kept_keys(*places, selection.keep_first, max(selection.keep_local, 1))[0]
    kept_CP = jnp.any((visible_CS & kept_CS).reshape(C, -1, block), axis=-1)
    seen_CP = jnp.any(visible_CS.reshape(C, -1, block), axis=-1)
    best_CP = jnp.max(jnp.where(visible_CS, scores_CS, 0).reshape(C, -1, block), axis=-1)
    return select_mask(best_CP, count_C, seen_CP, kept_CP), variance_C
