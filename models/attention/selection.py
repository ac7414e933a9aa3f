"""Which of the keys that a query sees it selects: tokens (arXiv 2601.15305, section 3.4) or blocks of tokens.

Block selection is a labelled variant. Keys are cut into aligned blocks of W tokens, queries into tiles of the same
W. A tile has one list of blocks, shared by its queries and by all heads, so that its keys are gathered once and
enter plain matrix products. Where the paper selects single tokens for single queries:
  - A list rests on the scores of the tile's *first* query alone. Those of its later queries would tell the
    earlier ones about their future.
  - A block scores the largest score of its tokens that the first query sees; of equal blocks the lower wins.
  - The first query's k, rounded up to blocks, is the length of the list. The tile's own block is always in it
    and counts; so are the blocks that hold the first `keep_first` tokens of the first query's document or its
    latest `keep_local` tokens.
  - A query attends to every token that it sees in the listed blocks. A document that opens inside a tile lies
    in the tile's own block up to there, so that its queries miss nothing.
Tiles are aligned to the row, not to documents: packed elsewhere, a document may select other keys.

Lists are int32 [B, P, A], ascending, with -1 for "no block": what kernels for block-sparse attention take. Axes
beside the legend's: W tokens of a block, P blocks (and tiles) of a row, A entries of a list, X tiles at a time.
"""

import jax
import jax.numpy as jnp

from models.attention.indexer import index_scores, score_variance
from models.attention.keys import IndexInputs, Reads, Selection, kept_keys, visible_keys
from models.attention.tiles import at_once, pad, take_rows
from models.attention.topk import Threshold, select_mask, select_threshold, selected_by


def adaptive_k(variance_BT: jax.Array, running_variance: jax.Array, selection: Selection) -> jax.Array:
    """How many keys each query selects, int32 [B, T] (arXiv 2601.15305, Eq. 8).

    The paper contradicts itself: its equation selects more keys where the scores vary more, its prose and its
    authors' code select fewer. Hence a rule:
      "paper"    clamp(k_base · variance / running_variance, k_min, k_max), rounded down;
      "inverse"  clamp(k_base · running_variance / variance, k_min, k_max), rounded down;
    and "fixed", k_base, which asks for no variance.

    Args:
      variance_BT: `score_variance` of this step.
      running_variance: scalar mean variance of *earlier* steps, so that no query depends on the rest of its
        batch or on its future. Zero means that there was no earlier step: every query selects k_base.

    >>> rule = Selection(1.0, 1.0, "paper", k_base=64, k_min=8, k_max=128)
    >>> adaptive_k(jnp.array([0.5, 1.0, 9.0]), jnp.array(1.0), rule).tolist()
    [32, 64, 128]
    """
    over, under = variance_BT, running_variance
    if selection.k_rule == "inverse":
        over, under = under, over
    ratio_BT = over / jnp.maximum(under, jnp.finfo(variance_BT.dtype).tiny)
    k_BT = jnp.clip(selection.k_base * ratio_BT, selection.k_min, selection.k_max)
    return jnp.where(running_variance > 0, k_BT, selection.k_base).astype(jnp.int32)


def _variance(scores_BTS: jax.Array, visible_BTS: jax.Array, selection: Selection) -> jax.Array | None:
    """Of the scores, [B, T], if the rule asks for it."""
    return None if selection.k_rule == "fixed" else score_variance(scores_BTS, visible_BTS)


def _k_of(variance_BT: jax.Array | None, reads: Reads, selection: Selection) -> jax.Array:
    if variance_BT is None:
        return jnp.full(reads.position.shape, selection.k_base, jnp.int32)
    return adaptive_k(variance_BT, reads.running_variance, selection)


def select_tokens(
    scores_BTS: jax.Array, reads: Reads, selection: Selection
) -> tuple[jax.Array, Threshold, jax.Array | None]:
    """The selected sets as a mask [B, T, S], the thresholds that define them, and the variance that k rests on.

    No gradient passes.

    Args:
      scores_BTS: of the keys at positions 0 to S-1.
    """
    scores_BTS = jax.lax.stop_gradient(scores_BTS)
    visible_BTS, keep_BTS = _masks(scores_BTS, reads, selection)
    variance_BT = _variance(scores_BTS, visible_BTS, selection)
    threshold = select_threshold(scores_BTS, _k_of(variance_BT, reads, selection), visible_BTS, keep_BTS)
    return selected_by(threshold, scores_BTS, visible_BTS, keep_BTS), threshold, variance_BT


def select_again(threshold: Threshold, scores_BTS: jax.Array, reads: Reads, selection: Selection) -> jax.Array:
    """The mask of `select_tokens` from its threshold, without a search."""
    return selected_by(threshold, scores_BTS, *_masks(scores_BTS, reads, selection))


def _masks(scores_BTS: jax.Array, reads: Reads, selection: Selection) -> tuple[jax.Array, jax.Array | None]:
    position_S = jnp.arange(scores_BTS.shape[2], dtype=jnp.int32)
    keep_BTS = kept_keys(reads, position_S, selection.keep_first, selection.keep_local)
    return visible_keys(reads, position_S), keep_BTS


def list_length(selection: Selection, length: int) -> int:
    """A, the most blocks that a tile selects in a row of `length` tokens, whatever the scores.

    >>> list_length(Selection(1.0, 1.0, "fixed", k_base=100, k_min=1, k_max=1, block=32), 4096)
    4
    """
    W = selection.block
    local = -(-max(selection.keep_local - 1, 0) // W)
    first = (selection.keep_first + W - 2) // W + 1 if selection.keep_first else 0
    return min(max(-(-selection.most // W), 1 + local + first), -(-length // W))


def select_blocks(reads: Reads, selection: Selection) -> tuple[jax.Array, jax.Array | None]:
    """The selected blocks of every tile, int32 [B, P, A], and for each query the variance [B, T] that its tile's k
    rests on.

    P is T / W, rounded up. No gradient passes.
    """
    entries = list_length(selection, reads.index.key.shape[1])
    lists_BPA, variance_BP = _lists(first_queries(reads, selection.block), selection, entries)
    return lists_BPA, of_tiles(variance_BP, reads, selection.block)


def first_queries(reads: Reads, W: int) -> Reads:
    """What the first queries of all tiles read."""
    firsts = reads.index._replace(query=reads.index.query[:, ::W], gate=reads.index.gate[:, ::W])
    return reads._replace(position=reads.position[:, ::W], first=reads.first[:, ::W], index=firsts)


def of_tiles(a_BP: jax.Array | None, reads: Reads, W: int) -> jax.Array | None:
    """For each query what its tile has, [B, T]."""
    return None if a_BP is None else jnp.repeat(a_BP, W, axis=1)[:, : reads.position.shape[1]]


def extend_lists(lists_BPA: jax.Array, reads: Reads, selection: Selection) -> jax.Array:
    """A cache's lists, with those of the tiles whose first query is among C new tokens.

    A row of the cache is one document, from its slot 0 on.

    Args:
      lists_BPA: int32 lists of all S / W tiles, at first -1; A is `list_length` of S.
      reads: of the new tokens, at consecutive positions; the index with the keys of the cache.
    """
    W, C = selection.block, reads.position.shape[1]
    tile_BX = -(-reads.position[:, :1] // W) + jnp.arange(-(-C // W), dtype=jnp.int32)
    slot_BX = tile_BX * W - reads.position[:, :1]
    query, key, gate, bias = reads.index
    firsts = IndexInputs(take_rows(query, slot_BX), key, take_rows(gate, slot_BX), bias)
    at_firsts = Reads(tile_BX * W, jnp.zeros_like(tile_BX), firsts, reads.running_variance)
    place_BX = jnp.where(slot_BX < C, tile_BX, lists_BPA.shape[1])

    def extended(lists_BPA: jax.Array) -> jax.Array:
        new_BXA, _ = _lists(at_firsts, selection, lists_BPA.shape[2])
        return jax.vmap(lambda lists, place, new: lists.at[place].set(new, mode="drop"))(lists_BPA, place_BX, new_BXA)

    # Most extensions open no tile: the index keys of the whole text need not be read for them.
    return jax.lax.cond(jnp.any(slot_BX < C), extended, lambda lists_BPA: lists_BPA, lists_BPA)


def listed_keys(lists_BPA: jax.Array, reads: Reads, S: int, block: int) -> jax.Array:
    """True where a query sees a key that lies in a block which its tile lists; [B, T, S]."""
    listed_BPP = jnp.any(lists_BPA[..., None] == jnp.arange(-(-S // block)), axis=2)
    listed_BTS = jnp.repeat(take_rows(listed_BPP, reads.position // block), block, axis=2)[..., :S]
    return listed_BTS & visible_keys(reads, jnp.arange(S))


def _lists(reads: Reads, selection: Selection, entries: int) -> tuple[jax.Array, jax.Array | None]:
    """Lists [B, X, A] and variances [B, X] of the tiles whose first queries `reads` holds, a few tiles at a time."""
    index = jax.lax.stop_gradient(reads.index)
    key_BSI = pad(index.key, selection.block)
    B, S = key_BSI.shape[:2]

    def one(tile: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array | None]:
        query, gate, position, first = (a[:, None] for a in tile)
        at_tile = Reads(position, first, None, reads.running_variance)
        scores_B1S = index_scores(IndexInputs(query, key_BSI, gate, index.bias), selection.scale)
        visible_B1S = visible_keys(at_tile, jnp.arange(S, dtype=jnp.int32))
        variance_B1 = _variance(scores_B1S, visible_B1S, selection)
        seen_B1S = jnp.where(visible_B1S, scores_B1S, 0)
        best_B1P = jnp.max(seen_B1S.reshape(B, 1, -1, selection.block), axis=-1)
        lists_B1A = choose_blocks(best_B1P, variance_B1, at_tile, selection, entries)
        return lists_B1A[:, 0], None if variance_B1 is None else variance_B1[:, 0]

    tiles = jax.tree.map(lambda a: a.swapaxes(0, 1), (index.query, index.gate, reads.position, reads.first))
    batch_size = at_once(B * S * index.bias.shape[0])
    return jax.tree.map(lambda a: a.swapaxes(0, 1), jax.lax.map(one, tiles, batch_size=batch_size))


def choose_blocks(
    best_BXP: jax.Array, variance_BX: jax.Array | None, reads: Reads, selection: Selection, entries: int
) -> jax.Array:
    """The lists [B, X, A] of tiles from what their first queries score.

    Args:
      best_BXP: of every block the largest score among the tokens that the first query sees.
      variance_BX: of its scores, where the k rule asks for it.
      reads: of the first queries.
    """
    W, P, (position, first) = selection.block, best_BXP.shape[2], reads[:2]

    def holding(start_BX: jax.Array, end_BX: jax.Array) -> jax.Array:
        """The blocks that hold positions from start to end."""
        block_P = jnp.arange(P, dtype=jnp.int32)
        return (start_BX[..., None] // W <= block_P) & (block_P <= end_BX[..., None] // W)

    # A query always sees itself, so that its own place stands for its tile's own block.
    local = max(selection.keep_local, 1)
    kept_BXP = holding(jnp.maximum(first, position - local + 1), position)
    if selection.keep_first:
        kept_BXP |= holding(first, jnp.minimum(first + selection.keep_first - 1, position))
    k_BX = -(-_k_of(variance_BX, reads, selection) // W)
    listed_BXP = select_mask(best_BXP, k_BX, holding(first, position), kept_BXP)
    entry_BXA = jnp.sort(jnp.where(listed_BXP, jnp.arange(P, dtype=jnp.int32), P), axis=-1)[..., :entries]
    return jnp.where(entry_BXA < P, entry_BXA, -1)
