"""Token-level intersection: a drafter over the tokens that two vocabularies share, wholly on the device.

Timor et al. (arXiv 2502.05202), Algorithm 4. The drafter draws from its law on the shared tokens, q', which is a
law over target tokens, so that any verification of `models.decoding.verification` applies. Where the target
writes a token that the drafter does not know, the drafter reads its spelling, from a table. With one vocabulary
all tokens are shared, and this is speculative sampling (arXiv 2211.17192).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.attention.cache import Cache
from models.decoding import sampling, verification
from models.decoding.language_model import LanguageModel, Voice, prefill
from models.decoding.progress import (
    Progress,
    accept,
    append,
    commit,
    place_noise,
    round_keys,
)
from models.decoding.settings import Settings
from models.decoding.vocabulary import VocabularyMap

Rounds = Callable[..., tuple[Progress, "Draft"]]


class Overlap(NamedTuple):
    """The arrays of a `VocabularyMap` that drafting needs.

    target_ids, draft_ids [X]; pieces [V, M], what the drafter reads for every target token, and their number,
    at least 1, [V].
    """

    target_ids: jax.Array
    draft_ids: jax.Array
    pieces: jax.Array
    lengths: jax.Array


class Draft(NamedTuple):
    """The drafter's side: its cache, and the tokens that it has not read yet, [B, P], of which `count` [B] count."""

    cache: Cache
    pending: jax.Array
    count: jax.Array


def make_overlap(vocabulary: VocabularyMap, fallback: int) -> Overlap:
    """The arrays of a map, on the device.

    The drafter must read something for every target token, or it would have no new law to draw from. For those
    that it cannot spell within M tokens it reads `fallback`: a wrong reading costs speed, never a wrong text.
    """
    pieces_VM, lengths_V = vocabulary.pieces.copy(), vocabulary.lengths.copy()
    unread_V = (lengths_V == 0) | (lengths_V > pieces_VM.shape[1])
    pieces_VM[unread_V, 0], lengths_V[unread_V] = fallback, 1
    arrays = (vocabulary.target_ids, vocabulary.draft_ids, np.maximum(pieces_VM, 0), lengths_V)
    return Overlap(*map(jnp.asarray, arrays))


def start_draft(drafter: Voice, rows: list[list[int]], overlap: Overlap, capacity: int) -> Draft:
    """The drafter with its own spelling of the prompts read, but for their last tokens."""
    pending_BP = np.zeros((len(rows), 1 + overlap.pieces.shape[1]), np.int32)
    pending_BP[:, 0] = [row[-1] for row in rows]
    cache = prefill(drafter, rows, capacity)
    return Draft(cache, jnp.asarray(pending_BP), jnp.ones(len(rows), jnp.int32))


@functools.lru_cache(maxsize=32)
def intersection_rounds(
    target: LanguageModel, drafter: LanguageModel, verify: str, length: int, sampled: bool
) -> Rounds:
    """Compiles rounds of drafting and verification.

    The program takes (target parameters, drafter parameters, progress, draft, overlap, settings, n) and gives
    progress and draft after at most n rounds.

    Args:
      verify: "rejection", "block" or "exact".
      length: K, drafts a round.
      sampled: False if every row is greedy.
    """

    def once(target_params, draft_params, progress: Progress, draft: Draft, overlap: Overlap, settings: Settings):
        noise_BKX = _draft_noise(target, progress, overlap, settings, verify, length, sampled)
        cache, chosen_BK, q_BKX = _draft(drafter, draft_params, draft, overlap, settings, noise_BKX, length, sampled)
        drafts_BK = overlap.target_ids[chosen_BK]
        block_BC = jnp.concatenate([progress.last(), drafts_BK], axis=1)
        logits_BCV, target_cache = target.extend(target_params, block_BC, progress.cache)
        q_BKV = None if verify == "exact" else verification.scatter(q_BKX, overlap.target_ids, target.vocab_size)
        n_draft_B = jnp.full_like(progress.length, length)
        n_B, next_B = accept(logits_BCV, drafts_BK, n_draft_B, q_BKV, progress, settings, verify, sampled)
        progress = progress._replace(cache=target_cache)
        progress = commit(progress, append(drafts_BK, n_B, next_B), n_B + 1, n_draft_B, settings.stop)
        # A row that is done must not run out of slots.
        read_B = jnp.where(progress.done, 0, jnp.minimum(n_B, length - 1))
        return progress, _follow(
            cache.advance(read_B), overlap.draft_ids[chosen_BK[:, -1:]], n_B == length, next_B, overlap
        )

    def rounds(
        target_params: nnx.State,
        draft_params: nnx.State,
        progress: Progress,
        draft: Draft,
        overlap: Overlap,
        settings: Settings,
        n: jax.Array,
    ) -> tuple[Progress, Draft]:
        def unfinished(carry):
            return (carry[0] < n) & ~jnp.all(carry[1].done)

        def step(carry):
            return carry[0] + 1, *once(target_params, draft_params, *carry[1:], overlap, settings)

        return jax.lax.while_loop(unfinished, step, (0, progress, draft))[1:]

    return jax.jit(rounds, donate_argnums=(2, 3))


def _draft_noise(
    target: LanguageModel,
    progress: Progress,
    overlap: Overlap,
    settings: Settings,
    verify: str,
    length: int,
    sampled: bool,
) -> jax.Array | None:
    """Noise for K drafts [B, K, X].

    To be compared with samples of the target they use the samples' own noise, which makes agreement likely
    (arXiv 2408.07978). To be accepted or rejected they must not know the noise of the verification.
    """
    if not sampled:
        return None
    if verify == "exact":
        return place_noise(progress.length, (length, target.vocab_size), settings)[..., overlap.target_ids]
    keys_B = round_keys(progress, settings)
    steps_BK = jnp.broadcast_to(jnp.arange(2, 2 + length), (keys_B.shape[0], length))
    return sampling.gumbel(keys_B, steps_BK, overlap.target_ids.shape[0])


def _draft(
    drafter: LanguageModel,
    params: nnx.State,
    draft: Draft,
    overlap: Overlap,
    settings: Settings,
    noise_BKX: jax.Array | None,
    length: int,
    sampled: bool,
) -> tuple[Cache, jax.Array, jax.Array | None]:
    """Draws K shared tokens.

    Returns:
      The cache, with the pending tokens committed and the first K - 1 drafts behind them; the drafts [B, K] as
      places in the intersection; and the laws that they were drawn from [B, K, X] (None if greedy).
    """
    logits_BW, cache = _read_pending(drafter, params, draft)

    def choose(logits_BW: jax.Array, noise_BX: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        logits_BX = verification.project(logits_BW, overlap.draft_ids)
        if not sampled:
            return sampling.first_largest(logits_BX), None
        law_BX = sampling.warp(logits_BX, settings.temperature, settings.top_k, settings.top_p)
        return sampling.choose(law_BX, noise_BX), law_BX

    def step(carry: tuple[Cache, jax.Array], noise_BX: jax.Array | None):
        reading, chosen_B = carry
        logits_B1V, reading = drafter.extend(params, overlap.draft_ids[chosen_B][:, None], reading)
        chosen_B, law_BX = choose(logits_B1V[:, 0], noise_BX)
        return (reading.advance(jnp.ones_like(reading.length)), chosen_B), (chosen_B, law_BX)

    noise_KBX = None if noise_BKX is None else noise_BKX.swapaxes(0, 1)
    first_B, first_BX = choose(logits_BW, None if noise_KBX is None else noise_KBX[0])
    later = None if noise_KBX is None else noise_KBX[1:]
    (reading, _), (chosen_KB, law_KBX) = jax.lax.scan(step, (cache, first_B), later, length=length - 1)
    chosen_BK = jnp.concatenate([first_B[None], chosen_KB]).T
    cache = reading._replace(length=cache.length)
    if first_BX is None:
        return cache, chosen_BK, None
    return cache, chosen_BK, jnp.concatenate([first_BX[None], law_KBX]).swapaxes(0, 1)


def _read_pending(drafter: LanguageModel, params: nnx.State, draft: Draft) -> tuple[jax.Array, Cache]:
    """The logits after the pending tokens [B, W], and the cache with them committed."""

    def read(width: int):
        logits_BPW, cache = drafter.extend(params, draft.pending[:, :width], draft.cache)
        last_B11 = jnp.minimum(draft.count - 1, width - 1)[:, None, None]
        return jnp.take_along_axis(logits_BPW, last_B11, axis=1)[:, 0], cache.advance(draft.count)

    # Mostly one or two tokens are pending: the target's own, and the last draft where all were accepted.
    P = draft.pending.shape[1]
    widths = sorted({min(w, P) for w in (1, 2, P)})
    choice = jnp.searchsorted(jnp.array(widths), jnp.max(draft.count))
    return jax.lax.switch(choice, [functools.partial(read, width) for width in widths])


def _follow(cache: Cache, last_B1: jax.Array, all_B: jax.Array, next_B: jax.Array, overlap: Overlap) -> Draft:
    """The drafter's side after a verification.

    Pending is the spelling of the target's own token, behind the last draft where all were accepted: that one was
    drawn but not read.
    """
    pieces_BM, lengths_B = overlap.pieces[next_B], overlap.lengths[next_B]
    behind_BP = jnp.concatenate([last_B1, pieces_BM], axis=1)
    pending_BP = jnp.where(all_B[:, None], behind_BP, jnp.pad(pieces_BM, ((0, 0), (0, 1))))
    return Draft(cache, pending_BP, lengths_B + all_B)
