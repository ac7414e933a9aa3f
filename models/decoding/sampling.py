"""How tokens are drawn: as a user says it, the law that this makes, and the one way to draw from a law.

A law is an array of probabilities over the last axis, float32 (float64 if the logits are). Target and drafter
share these functions, and "lossless" means: with respect to the target's law as `warp` returns it.

Drawing is always the Gumbel-max rule, argmax(log law + noise): a token of probability 0 is never drawn, and
noise that depends on the seed and the position alone makes the drawn text a function of the seed and the
target (arXiv 2408.07978).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.attention.topk import bisect, ordered_bits, select_mask

_SEEDS = 2**32


class Settings(NamedTuple):
    """How tokens are drawn: scalars as in `Sampling`, seeds uint32 [B], and the ids that end a row [X].

    The penalty is None where there is none, so that no program asks which tokens a text has.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    penalty: jax.Array | None
    seeds: jax.Array
    stop: jax.Array

    @property
    def keys(self) -> jax.Array:
        """Typed PRNG keys [B]."""
        return jax.vmap(jax.random.key)(self.seeds)

    def law(self, logits_BV: jax.Array) -> jax.Array:
        """The law of the next token, [..., V]."""
        return warp(logits_BV, self.temperature, self.top_k, self.top_p, self.min_p)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: what the law of the next token is, and the seed of the noise.

    temperature: at least 0; 0 is greedy. top_k: 0 keeps all. top_p: in (0, 1]. min_p: in [0, 1], drops tokens less
    probable than this share of the most probable one. repetition_penalty: above 0; the logits of tokens that the text
    has, prompt included, are divided by it where they are positive, and multiplied where they are negative
    (arXiv 1909.05858). seed: in [0, 2^32), of all rows or one a row.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | Sequence[int] = 0

    def __post_init__(self):
        require(0 <= self.temperature < math.inf, "temperature", self.temperature, "must be at least 0, and finite")
        require(self.top_k >= 0, "top_k", self.top_k, "must be at least 0 (0 keeps all)")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be above 0 and at most 1")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "must be from 0 (keeps all) to 1")
        penalty = self.repetition_penalty
        require(0 < penalty < math.inf, "repetition_penalty", penalty, "must be a number above 0 (1 penalises nothing)")
        for seed in np.ravel(self.seed).tolist():
            require(type(seed) is int and 0 <= seed < _SEEDS, "seed", seed, f"must be from 0 to {_SEEDS - 1}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    def seeds(self, batch: int) -> list[int]:
        """Every row's own."""
        known = np.ravel(self.seed)
        require(
            known.size in (1, batch), "seed", known.tolist(), f"must be one number, or one for each of {batch} rows"
        )
        return np.broadcast_to(known, (batch,)).tolist()

    def settings(self, batch: int, stop: Sequence[int]) -> Settings:
        """As arrays of a batch, with the ids that end a row."""
        penalty = None if self.repetition_penalty == 1 else jnp.asarray(self.repetition_penalty, float)
        return Settings(
            jnp.asarray(self.temperature, float),
            jnp.asarray(self.top_k, int),
            jnp.asarray(self.top_p, float),
            jnp.asarray(self.min_p, float),
            penalty,
            jnp.asarray(self.seeds(batch), jnp.uint32),
            # An id that no token has stands for "no stop".
            jnp.array(list(stop) or [-1], jnp.int32),
        )


def require(condition: bool, name: str, value: object, constraint: str) -> None:
    """Raises a ValueError of one line that names the argument, its value and the constraint."""
    if not condition:
        raise ValueError(f"{name}={value!r} {constraint}")


def penalise(logits_BCV: jax.Array, seen_BCV: jax.Array, penalty: jax.Array) -> jax.Array:
    """Logits with those of seen tokens divided by the penalty where positive, multiplied where negative.

    >>> penalise(jnp.array([2.0, -2.0, 2.0]), jnp.array([True, True, False]), 4.0).tolist()
    [0.5, -8.0, 2.0]
    """
    penalty = jnp.asarray(penalty, logits_BCV.dtype)
    return jnp.where(seen_BCV, jnp.where(logits_BCV > 0, logits_BCV / penalty, logits_BCV * penalty), logits_BCV)


def warp(
    logits_BV: jax.Array,
    temperature_B: jax.Array,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
    min_p_B: jax.Array | float = 0.0,
) -> jax.Array:
    """The law of the next token: temperature, then top-k, then top-p, then min-p; [..., V].

    Of equal probabilities the lower index goes first, everywhere. No setting is static: rows may differ, and
    a new value compiles nothing.

    Args:
      logits_BV: [..., V] of any float dtype; -inf excludes a token, and a row needs a finite logit.
      temperature_B: at least 0; 0 puts everything on the largest logit. Like the other settings, a scalar or
        an array that broadcasts to the logits' leading axes.
      top_k_B: int, keeps the k most probable tokens; 0 keeps all.
      top_p_B: in (0, 1], keeps the smallest set of the most probable tokens that holds at least this share
        of what top-k left; 1 keeps all.
      min_p_B: in [0, 1], keeps tokens of at least this share of the most probable one's probability; 0 keeps all.

    >>> logits = jnp.array([[1.0, 4.0, 4.0, 4.0]])
    >>> warp(logits, 1.0, 2, 1.0).tolist(), warp(logits, 0.0, 0, 1.0).tolist()
    ([[0.0, 0.5, 0.5, 0.0]], [[0.0, 1.0, 0.0, 0.0]])
    """
    logits_BV = logits_BV.astype(jnp.promote_types(logits_BV.dtype, jnp.float32))
    shape, dtype = logits_BV.shape[:-1], logits_BV.dtype
    temperature_B = jnp.broadcast_to(jnp.asarray(temperature_B, dtype), shape)
    top_k_B = jnp.broadcast_to(jnp.asarray(top_k_B, jnp.int32), shape)
    top_p_B = jnp.broadcast_to(jnp.asarray(top_p_B, dtype), shape)
    greedy_B = temperature_B == 0
    best_BV = jax.nn.one_hot(first_largest(logits_BV), logits_BV.shape[-1], dtype=dtype)
    shifted_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    weight_BV = jnp.exp(shifted_BV / jnp.where(greedy_B, 1, temperature_B)[..., None])
    keep = lambda weight_BV, _: weight_BV  # noqa: E731
    weight_BV = jax.lax.cond(jnp.any(top_k_B > 0), _cut_top_k, keep, weight_BV, top_k_B)
    weight_BV = jax.lax.cond(jnp.any(top_p_B < 1), _cut_top_p, keep, weight_BV, top_p_B)
    # The largest weight is 1.
    weight_BV = jnp.where(weight_BV >= jnp.asarray(min_p_B, dtype)[..., None], weight_BV, 0)
    law_BV = weight_BV / jnp.sum(weight_BV, axis=-1, keepdims=True)
    return jnp.where(greedy_B[..., None], best_BV, law_BV)


def gumbel(keys_B: jax.Array, positions_BC: jax.Array, vocab_size: int) -> jax.Array:
    """Standard Gumbel noise [B, C, V] of absolute positions: a function of a row's key and of the position.

    It does not depend on the other rows, on the other positions or on who drafts. Noise in the order of a
    drafter's vocabulary is a gather of this noise.

    Args:
      keys_B: typed PRNG keys [B], one a row.
      positions_BC: int32 [B, C].
    """

    def noise_V(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        # The default of 23 random bits cannot draw a probability below 1e-7.
        return jax.random.gumbel(jax.random.fold_in(*row), (vocab_size,), mode="high")

    # A few positions at a time: on a CPU, random bits of all at once leave the cache and take several times as long.
    rows = (jnp.repeat(keys_B, positions_BC.shape[1]), positions_BC.ravel())
    return jax.lax.map(noise_V, rows, batch_size=8).reshape(*positions_BC.shape, vocab_size)


def choose(law_BV: jax.Array, noise_BV: jax.Array) -> jax.Array:
    """argmax(log law + noise) over the last axis, int32: with standard Gumbel noise, a draw from the law.

    The law need not be normalised. A law of one token gives that token, whatever the noise.
    """
    return first_largest(jnp.log(law_BV) + noise_BV)


def first_largest(x_BV: jax.Array) -> jax.Array:
    """The lowest index of the largest value of the last axis, int32; the last index if there are NaNs.

    XLA's argmax does not vectorise on CPUs: it costs ten times as much.

    >>> first_largest(jnp.array([2.0, 3.0, 3.0])).item()
    1
    """
    V = x_BV.shape[-1]
    largest_BV = x_BV == jnp.max(x_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(largest_BV, jnp.arange(V, dtype=jnp.int32), V - 1), axis=-1)


def _cut_top_k(weight_BV: jax.Array, k_B: jax.Array) -> jax.Array:
    k_B = jnp.where(k_B > 0, k_B, weight_BV.shape[-1])
    return jnp.where(select_mask(weight_BV, k_B, jnp.ones(weight_BV.shape, bool)), weight_BV, 0)


def _cut_top_p(weight_BV: jax.Array, share_B: jax.Array) -> jax.Array:
    """Keeps a token where the tokens that go before it hold less than the share.

    The lightest weight kept is found by bisection on bit patterns, as in `models.attention.topk`: on a
    CPU a sort of a large vocabulary costs more than a small model.
    """
    bits_BV = ordered_bits(weight_BV, jnp.ones(weight_BV.shape, bool))
    need_B = share_B * jnp.sum(weight_BV, axis=-1)

    def held(bits_B: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(bits_BV >= bits_B[..., None], weight_BV, 0), axis=-1)

    def halve(middle: jax.Array, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
        enough = held(middle) >= need_B
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    top_B = jnp.max(bits_BV, axis=-1)
    lightest_B, _ = bisect(halve, jnp.zeros_like(top_B), top_B + 1)
    equal_BV = bits_BV == lightest_B[..., None]
    before_BV = held(lightest_B + 1)[..., None] + weight_BV * (jnp.cumsum(equal_BV, axis=-1) - 1)
    kept_BV = (bits_BV > lightest_B[..., None]) | (equal_BV & (before_BV < need_B[..., None]))
    kept_BV |= (share_B >= 1)[..., None]
    return jnp.where(kept_BV, weight_BV, 0)
