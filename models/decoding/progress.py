"""The state of a batch being written, and the parts that every method of decoding shares.

A row's committed tokens are its prompt and what was written. The cache always holds all of them but the last: a
step reads the last one together with the drafts, which gives the law of the token after every draft.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention.cache import Cache, write
from models.decoding import sampling, verification
from models.decoding.language_model import LanguageModel
from models.decoding.settings import Settings


class Progress(NamedTuple):
    """A batch on its way.

    tokens [B, S] int32, of which `length` [B] are committed; limit [B], the length at which a row ends; done [B];
    the target's cache; and per row the counts of target calls, of drafted and of accepted tokens, int32 [B].
    """

    tokens: jax.Array
    length: jax.Array
    limit: jax.Array
    done: jax.Array
    cache: Cache
    calls: jax.Array
    drafted: jax.Array
    accepted: jax.Array

    def last(self) -> jax.Array:
        """The last committed token of every row; [B, 1]."""
        return jnp.take_along_axis(self.tokens, self.length[:, None] - 1, axis=1)


def start(rows_BT: jax.Array, length_B: jax.Array, limit_B: jax.Array, cache: Cache) -> Progress:
    """Progress of right-padded prompts; `cache` holds all their tokens but the last."""
    # Programs consume their progress: no two of its arrays may be one.
    counts = (jnp.zeros_like(length_B) for _ in range(3))
    tokens_BS = jnp.zeros((rows_BT.shape[0], cache.capacity), jnp.int32)
    tokens_BS = jax.lax.dynamic_update_slice(tokens_BS, rows_BT, (0, 0))
    return Progress(tokens_BS, length_B, limit_B, length_B >= limit_B, cache, *counts)


def commit(
    progress: Progress, new_BC: jax.Array, count_B: jax.Array, n_draft_B: jax.Array, stop_X: jax.Array
) -> Progress:
    """Appends the first `count` of C new tokens to every row that is not done, up to its end.

    A row ends with the first stop token, which is committed, or at its limit. The last of the new tokens is the
    target's own, those before it are accepted drafts.
    """
    C = new_BC.shape[1]
    count_B = jnp.minimum(count_B, progress.limit - progress.length)
    stops_BC = jnp.any(new_BC[..., None] == stop_X, axis=-1) & (jnp.arange(C) < count_B[:, None])
    stopped_B = jnp.any(stops_BC, axis=1)
    count_B = jnp.where(stopped_B, jnp.argmax(stops_BC, axis=1).astype(jnp.int32) + 1, count_B)
    active_B = ~progress.done
    count_B = jnp.where(active_B, count_B, 0)
    length_B = progress.length + count_B
    return progress._replace(
        tokens=write(progress.tokens, new_BC, progress.length),
        length=length_B,
        done=progress.done | stopped_B | (length_B >= progress.limit),
        cache=progress.cache.advance(count_B),
        calls=progress.calls + active_B,
        drafted=progress.drafted + jnp.where(active_B, n_draft_B, 0),
        accepted=progress.accepted + jnp.maximum(count_B - 1, 0),
    )


def sample(logits_BCV: jax.Array, length_B: jax.Array, settings: Settings, sampled: bool) -> jax.Array:
    """The target's own tokens at C places from `length` on, int32 [B, C].

    Noise depends on a row's key and the place alone: the tokens are the same whoever drafts. Greedy decoding
    (`sampled` False) needs no noise.
    """
    if not sampled:
        return sampling.first_largest(logits_BCV)
    noise_BCV = place_noise(length_B, logits_BCV.shape[1:], settings)
    return sampling.choose(settings.law(logits_BCV), noise_BCV)


def place_noise(length_B: jax.Array, shape_CV: tuple[int, int], settings: Settings) -> jax.Array:
    """The noise of C places from `length` on; [B, C, V]."""
    positions_BC = length_B[:, None] + jnp.arange(shape_CV[0], dtype=jnp.int32)
    return sampling.gumbel(settings.keys, positions_BC, shape_CV[1])


def round_keys(progress: Progress, settings: Settings) -> jax.Array:
    """Keys [B] of one step. Every step commits a token, so that no two steps of a row have the same key."""
    # Apart from the keys of `place_noise`, whose places are small.
    return jax.vmap(lambda key, n: jax.random.fold_in(jax.random.fold_in(key, 2**32 - 1), n))(
        settings.keys, progress.length
    )


def accept(
    logits_BCV: jax.Array,
    drafts_BK: jax.Array,
    n_draft_B: jax.Array,
    q_BKV: jax.Array | None,
    progress: Progress,
    settings: Settings,
    verify: str,
    sampled: bool,
) -> tuple[jax.Array, jax.Array]:
    """The number of accepted drafts and the token after them, int32 [B].

    Args:
      logits_BCV: the target's, after the last committed token and after each of C - 1 = K drafts.
      q_BKV: the laws that the drafts were drawn from, on target tokens; not read if `verify` is "exact".
      verify: "rejection", "block" or "exact".
    """
    if verify == "exact":
        samples_BC = sample(logits_BCV, progress.length, settings, sampled)
        return verification.exact(samples_BC, drafts_BK, n_draft_B)
    p_BCV = settings.law(logits_BCV)
    outcome = getattr(verification, verify)(p_BCV, q_BKV.astype(p_BCV.dtype), drafts_BK, n_draft_B)
    keys_B = jax.vmap(lambda key: jax.random.fold_in(key, 1))(round_keys(progress, settings))
    return verification.draw(keys_B, outcome)


def append(drafts_BK: jax.Array, n_B: jax.Array, next_B: jax.Array) -> jax.Array:
    """Accepted drafts with the next token behind them; [B, K + 1]."""
    new_BC = jnp.pad(drafts_BK, ((0, 0), (0, 1)))
    return jnp.where(jnp.arange(new_BC.shape[1]) == n_B[:, None], next_B[:, None], new_BC)


@functools.lru_cache(maxsize=32)
def plain_rounds(target: LanguageModel, sampled: bool) -> Callable[..., Progress]:
    """Compiles plain decoding: (params, progress, settings, n) -> progress after at most n tokens a row."""

    def step(params: nnx.State, progress: Progress, settings: Settings) -> Progress:
        logits_B1V, cache = target.extend(params, progress.last(), progress.cache)
        token_B1 = sample(logits_B1V, progress.length, settings, sampled)
        none_B = jnp.zeros_like(progress.length)
        return commit(progress._replace(cache=cache), token_B1, none_B + 1, none_B, settings.stop)

    def rounds(params: nnx.State, progress: Progress, settings: Settings, n: jax.Array) -> Progress:
        def unfinished(carry: tuple[jax.Array, Progress]) -> jax.Array:
            return (carry[0] < n) & ~jnp.all(carry[1].done)

        def once(carry: tuple[jax.Array, Progress]) -> tuple[jax.Array, Progress]:
            return carry[0] + 1, step(params, carry[1], settings)

        return jax.lax.while_loop(unfinished, once, (0, progress))[1]

    return jax.jit(rounds, donate_argnums=1)


@functools.lru_cache(maxsize=32)
def verification_round(target: LanguageModel, verify: str, sampled: bool) -> Callable[..., Progress]:
    """Compiles one step with given drafts: (params, progress, settings, drafts, n_draft, q or None) -> progress."""

    def step(
        params: nnx.State,
        progress: Progress,
        settings: Settings,
        drafts_BK: jax.Array,
        n_draft_B: jax.Array,
        q_BKV: jax.Array | None,
    ) -> Progress:
        block_BC = jnp.concatenate([progress.last(), drafts_BK], axis=1)
        logits_BCV, cache = target.extend(params, block_BC, progress.cache)
        n_B, next_B = accept(logits_BCV, drafts_BK, n_draft_B, q_BKV, progress, settings, verify, sampled)
        new_BC = append(drafts_BK, n_B, next_B)
        return commit(progress._replace(cache=cache), new_BC, n_B + 1, n_draft_B, settings.stop)

    return jax.jit(step, donate_argnums=1)
