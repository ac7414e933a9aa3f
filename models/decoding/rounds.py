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
from flax import nnx

from models.attention.cache import Cache, write
from models.decoding import sampling, verification
from models.decoding.language_model import LanguageModel
from models.decoding.sampling import Settings


class Progress(NamedTuple):
    """A batch on its way.

    tokens [B, S] int32, of which `length` [B] are committed; limit [B], the length at which a row ends; done [B];
    the target's cache; and per row the counts of target calls, of drafted tokens and of those of them that were
    committed, int32 [B].
    """

    tokens: jax.Array
    length: jax.Array
    limit: jax.Array
    done: jax.Array
    cache: Cache | None
    calls: jax.Array
    drafted: jax.Array
    accepted: jax.Array

    def look(self) -> Progress:
        """A copy on the host of all but the cache: programs consume their progress."""
        return self._replace(cache=None, **{f: np.array(x) for f, x in self._asdict().items() if f != "cache"})


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
    target: LanguageModel, drafter: Drafter, verify: str, sampled: bool
) -> Callable[..., tuple[Progress, Any]]:
    """Compiles (target's params, given, progress, drafter's state, settings, n) -> progress and state, after n rounds
    or when all rows are done. Progress and state are consumed.

    Args:
      verify: of drafts with laws: "rejection" or "block".
      sampled: False if every row is greedy, which needs no noise.
    """

    def rounds(
        params: nnx.State, given: Any, progress: Progress, state: Any, settings: Settings, n: jax.Array
    ) -> tuple[Progress, Any]:
        def unfinished(carry: tuple[jax.Array, Progress, Any]) -> jax.Array:
            return (carry[0] < n) & ~jnp.all(carry[1].done)

        def once(carry: tuple[jax.Array, Progress, Any]) -> tuple[jax.Array, Progress, Any]:
            i, progress, state = carry

            def judge(drafts: Drafts) -> tuple[Progress, jax.Array, jax.Array]:
                last_B1 = jnp.take_along_axis(progress.tokens, progress.length[:, None] - 1, axis=1)
                block_BC = jnp.concatenate([last_B1, drafts.tokens], axis=1)
                logits_BCV, cache = target.extend(params, block_BC, progress.cache)
                n_B, next_B = _accept(logits_BCV, drafts, progress, settings, verify, sampled)
                return _commit(progress._replace(cache=cache), drafts, n_B, next_B, settings.stop), n_B, next_B

            return i + 1, *drafter(given, state, progress, settings, judge)

        return jax.lax.while_loop(unfinished, once, (0, progress, state))[1:]

    return jax.jit(rounds, donate_argnums=(2, 3))


def start(rows_BT: jax.Array, length_B: jax.Array, limit_B: jax.Array, cache: Cache) -> Progress:
    """Progress of right-padded prompts; `cache` holds all their tokens but the last."""
    # Programs consume their progress: no two of its arrays may be one.
    counts = (jnp.zeros_like(length_B) for _ in range(3))
    tokens_BS = jnp.zeros((rows_BT.shape[0], cache.capacity), jnp.int32)
    tokens_BS = jax.lax.dynamic_update_slice(tokens_BS, rows_BT, (0, 0))
    return Progress(tokens_BS, length_B, limit_B, length_B >= limit_B, cache, *counts)


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


def _commit(progress: Progress, drafts: Drafts, n_B: jax.Array, next_B: jax.Array, stop_X: jax.Array) -> Progress:
    """Appends the n accepted drafts and the next token to every row that is not done, up to its end.

    A row ends with the first stop token, which is committed, or at its limit: perhaps with an accepted draft.
    """
    new_BC = jnp.pad(drafts.tokens, ((0, 0), (0, 1)))
    place_C = jnp.arange(new_BC.shape[1])
    new_BC = jnp.where(place_C == n_B[:, None], next_B[:, None], new_BC)
    active_B, count_B = ~progress.done, jnp.minimum(n_B + 1, progress.limit - progress.length)
    stops_BC = jnp.any(new_BC[..., None] == stop_X, axis=-1) & (place_C < count_B[:, None])
    stopped_B = jnp.any(stops_BC, axis=1)
    count_B = jnp.where(stopped_B, jnp.argmax(stops_BC, axis=1).astype(jnp.int32) + 1, count_B)
    count_B = jnp.where(active_B, count_B, 0)
    length_B = progress.length + count_B
    return progress._replace(
        tokens=write(progress.tokens, new_BC, progress.length),
        length=length_B,
        done=progress.done | stopped_B | (length_B >= progress.limit),
        cache=progress.cache.advance(count_B),
        calls=progress.calls + active_B,
        drafted=progress.drafted + jnp.where(active_B, drafts.count, 0),
        accepted=progress.accepted + jnp.minimum(count_B, n_B),
    )
