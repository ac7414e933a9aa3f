"""One round of decoding: drafts, the target's verdict on them, and what of them is committed.

A row's committed tokens are its prompt and what was written. The cache always holds all of them but the last: a
round reads the last one together with the drafts, which gives the law of the token after every draft. Methods of
decoding differ in who drafts and in nothing else: plain decoding is a round without drafts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.attention.cache import Cache, write
from models.decoding import sampling, verification
from models.decoding.language_model import LanguageModel, Params
from models.decoding.sampling import Settings


class Progress(NamedTuple):
    """A batch on its way.

    last int32 [B], the latest committed token of every row, not read yet; limit [B], the length at which a row ends;
    done [B]; the target's cache, of all committed tokens but the last; seen bool [B, V], the tokens that a row has, or
    None where no penalty asks for them; and int32 [4, B], per row the target calls, the drafted tokens, those of them
    that were committed, and the calls whose logits were no finite numbers.
    """

    last: jax.Array
    limit: jax.Array
    done: jax.Array
    cache: Cache
    seen: jax.Array | None
    counts: jax.Array

    @property
    def length(self) -> jax.Array:
        """Committed tokens of every row, int32 [B]."""
        return self.cache.length + 1


class Report(NamedTuple):
    """What the host learns of some rounds, from one array: rows that are done [B], counts as in `Progress` [4, B], and
    the newly committed tokens of every row."""

    done: np.ndarray
    counts: np.ndarray
    tokens: list[list[int]]

    @classmethod
    def unpack(cls, packed_BX: jax.Array) -> Report:
        packed_BX = np.asarray(packed_BX)
        tokens = [row[:n].tolist() for n, row in zip(packed_BX[:, 0], packed_BX[:, 6:], strict=True)]
        return cls(packed_BX[:, 1] > 0, packed_BX[:, 2:6].T, tokens)


class Drafts(NamedTuple):
    """Proposals of one round: target tokens int32 [B, K], how many of them count [B], and the laws that they were
    drawn from, on target tokens [B, K, V]. Without laws they are compared with the target's own samples."""

    tokens: jax.Array
    count: jax.Array
    laws: jax.Array | None = None


Judge = Callable[[Drafts], tuple[Progress, jax.Array, jax.Array]]


# The part of a method that is compiled: hashable, and a new program for each that is not equal. From arrays that the
# rounds leave as they are (`given`), arrays of its own as the round before left them, progress, settings and a judge
# it makes the next progress and arrays. The judge verifies drafts; it returns the progress with what was committed,
# the number of accepted drafts and the target's token after them, int32 [B].
Drafter = Callable[[Any, Any, Progress, Settings, Judge], tuple[Progress, Any]]


def given_drafts(given: Drafts, state: Any, progress: Progress, settings: Settings, judge: Judge):
    """The `Drafter` of drafts that the host has made, and of none at all (K = 0)."""
    return judge(given)[0], state


@functools.lru_cache(maxsize=32)
def compile_rounds(
    target: LanguageModel, drafter: Drafter, width: int, verify: str, sampled: bool, most: int
) -> Callable[..., tuple[jax.Array, Progress, Any]]:
    """Compiles (target's params, given, progress, drafter's state, settings, ended [B], n) -> packed `Report`, progress
    and state, after n rounds or when all rows are done. Progress and state are consumed.

    Args:
      width: K, drafts of a round.
      verify: of drafts with laws: "rejection" or "block".
      sampled: False if every row is greedy, which needs no noise.
      most: the largest n.
    """

    def rounds(
        params: Params, given: Any, progress: Progress, state: Any, settings: Settings, ended_B: jax.Array, n: jax.Array
    ) -> tuple[jax.Array, Progress, Any]:
        def once(carry: tuple) -> tuple:
            i, progress, state, new_BW = carry
            committed: list[jax.Array] = []

            def judge(drafts: Drafts) -> tuple[Progress, jax.Array, jax.Array]:
                block_BC = jnp.concatenate([progress.last[:, None], drafts.tokens], axis=1)
                logits_BCV, cache = target.extend(params, block_BC, progress.cache)
                logits_BCV = _with_penalty(logits_BCV, block_BC, progress.seen, settings)
                n_B, next_B = _accept(logits_BCV, drafts, progress, settings, verify, sampled)
                after = progress._replace(cache=cache, counts=progress.counts.at[3].add(_broken(logits_BCV)))
                after, new_BC = _commit(after, drafts, n_B, next_B, settings.stop)
                committed.append(new_BC)
                return after, n_B, next_B

            after, state = drafter(given, state, progress, settings, judge)
            return i + 1, after, state, write(new_BW, committed[0], progress.length - start_B)

        progress, start_B = progress._replace(done=progress.done | ended_B), progress.length
        new_BW = jnp.zeros((len(start_B), most * (width + 1)), jnp.int32)
        unfinished = lambda carry: (carry[0] < n) & ~jnp.all(carry[1].done)  # noqa: E731
        _, progress, state, new_BW = jax.lax.while_loop(unfinished, once, (0, progress, state, new_BW))
        heading = jnp.stack([progress.length - start_B, progress.done.astype(jnp.int32), *progress.counts], axis=1)
        return jnp.concatenate([heading, new_BW], axis=1), progress, state

    return jax.jit(rounds, donate_argnums=(2, 3))


def start(rows: list[list[int]], new: int, cache: Cache, vocab_size: int, settings: Settings) -> Progress:
    """Progress of prompts of which `cache` holds all tokens but the last; each gets `new` more."""
    B, length_B = len(rows), np.array(list(map(len, rows)), np.int32)
    last_B = np.array([row[-1] for row in rows], np.int32)
    seen_BV = None
    if settings.penalty is not None:
        seen_BV = np.zeros((B, vocab_size), bool)
        for seen_V, row in zip(seen_BV, rows, strict=True):
            seen_V[row] = True
    return Progress(last_B, length_B + new, np.zeros(B, bool), cache, seen_BV, np.zeros((4, B), np.int32))


def place_noise(length_B: jax.Array, shape_CV: tuple[int, int], settings: Settings) -> jax.Array:
    """The noise of the target's samples at C places from `length` on; [B, C, V].

    It depends on a row's key and the place alone: the samples are the same whoever drafts.
    """
    positions_BC = length_B[:, None] + jnp.arange(shape_CV[0], dtype=jnp.int32)
    return sampling.gumbel(settings.keys, positions_BC, shape_CV[1])


def round_keys(progress: Progress, settings: Settings) -> jax.Array:
    """Keys [B] of one round. Every round commits a token, so that no two rounds of a row have the same key."""
    # Apart from the keys of `place_noise`, whose places are small.
    return jax.vmap(lambda key, n: jax.random.fold_in(jax.random.fold_in(key, 2**32 - 1), n))(
        settings.keys, progress.length
    )


def _with_penalty(
    logits_BCV: jax.Array, block_BC: jax.Array, seen_BV: jax.Array | None, settings: Settings
) -> jax.Array:
    """Logits after every token of a block, of which the first was seen before, penalised by what was then seen."""
    if seen_BV is None:
        return logits_BCV
    written_BCV = jax.nn.one_hot(block_BC, logits_BCV.shape[-1], dtype=jnp.int32)
    return sampling.penalise(logits_BCV, seen_BV[:, None] | (jnp.cumsum(written_BCV, axis=1) > 0), settings.penalty)


def _broken(logits_BCV: jax.Array) -> jax.Array:
    """1 where the first logits of a row are no finite numbers, as those of damaged weights; int32 [B]."""
    return (~jnp.isfinite(jnp.max(logits_BCV[:, 0], axis=-1))).astype(jnp.int32)


def _accept(
    logits_BCV: jax.Array, drafts: Drafts, progress: Progress, settings: Settings, verify: str, sampled: bool
) -> tuple[jax.Array, jax.Array]:
    """The number of accepted drafts and the token after them, int32 [B].

    Args:
      logits_BCV: the target's, after the last committed token and after each of C - 1 = K drafts.
    """
    if drafts.laws is None:
        if sampled:
            noise_BCV = place_noise(progress.length, logits_BCV.shape[1:], settings)
            samples_BC = sampling.choose(settings.law(logits_BCV), noise_BCV)
        else:
            samples_BC = sampling.first_largest(logits_BCV)
        return verification.exact(samples_BC, drafts.tokens, drafts.count)
    p_BCV = settings.law(logits_BCV)
    verification_of = {"rejection": verification.rejection, "block": verification.block}[verify]
    outcome = verification_of(p_BCV, drafts.laws.astype(p_BCV.dtype), drafts.tokens, drafts.count)
    keys_B = jax.vmap(lambda key: jax.random.fold_in(key, 1))(round_keys(progress, settings))
    return verification.draw(keys_B, outcome)


def _commit(
    progress: Progress, drafts: Drafts, n_B: jax.Array, next_B: jax.Array, stop_X: jax.Array
) -> tuple[Progress, jax.Array]:
    """Appends the n accepted drafts and the next token to every row that is not done, up to its end.

    A row ends with the first stop token, which is committed, or at its limit: perhaps with an accepted draft. Also
    returns the tokens [B, K + 1] whose first are committed.
    """
    new_BC = jnp.pad(drafts.tokens, ((0, 0), (0, 1)))
    place_C = jnp.arange(new_BC.shape[1])
    new_BC = jnp.where(place_C == n_B[:, None], next_B[:, None], new_BC)
    active_B, count_B = ~progress.done, jnp.minimum(n_B + 1, progress.limit - progress.length)
    stops_BC = jnp.any(new_BC[..., None] == stop_X, axis=-1) & (place_C < count_B[:, None])
    stopped_B = jnp.any(stops_BC, axis=1)
    count_B = jnp.where(stopped_B, jnp.argmax(stops_BC, axis=1).astype(jnp.int32) + 1, count_B)
    count_B = jnp.where(active_B, count_B, 0)
    cache = progress.cache.advance(count_B)
    last_B = jnp.take_along_axis(new_BC, jnp.maximum(count_B - 1, 0)[:, None], axis=1)[:, 0]
    drafted_B, accepted_B = jnp.where(active_B, drafts.count, 0), jnp.minimum(count_B, n_B)
    calls_B = active_B.astype(jnp.int32)
    seen_BV = progress.seen
    if seen_BV is not None:
        # What is not committed is no token, and dropped.
        ids_BC = jnp.where(place_C < count_B[:, None], new_BC, seen_BV.shape[1])
        seen_BV = seen_BV.at[jnp.arange(len(n_B))[:, None], ids_BC].set(True, mode="drop")
    after = progress._replace(
        last=jnp.where(count_B > 0, last_B, progress.last),
        done=progress.done | stopped_B | (cache.length + 1 >= progress.limit),
        cache=cache,
        seen=seen_BV,
        counts=progress.counts + jnp.stack([calls_B, drafted_B, accepted_B, jnp.zeros_like(calls_B)]),
    )
    return after, new_BC
