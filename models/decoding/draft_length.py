"""How many tokens to draft: from what was committed so far and from measured costs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.attention.cache import Cache
from models.decoding.language_model import LanguageModel, Voice
from models.decoding.sampling import first_largest
from models.decoding.verification import best_draft_length, expected_tokens

LENGTHS = (1, 2, 4, 8)
_DEFAULT = 4
_ENOUGH = 8  # target calls before the acceptance is trusted
_STEPS = 4  # of a measurement


class DraftLength:
    """The draft length of the next rounds, among those that are compiled.

    Args:
      fixed: the length for all rounds, or None to choose.
      draft_cost, verify_costs: seconds of a drafted token, and of a target call with 0 drafts, and with the
        shortest and the longest of LENGTHS; calls between these are interpolated. Not read if the length is fixed.
    """

    def __init__(
        self, fixed: int | None, draft_cost: float = 0.0, verify_costs: tuple[float, float, float] = (1.0, 1.0, 1.0)
    ):
        self.fixed, self.draft_cost = fixed, draft_cost
        # A call with one draft may cost far more than one without: products of matrices take another path.
        ends = (LENGTHS[0], LENGTHS[-1])
        self.verify_costs = [verify_costs[0], *np.interp(LENGTHS, ends, verify_costs[1:]).tolist()]
        self.current = fixed or _DEFAULT
        self.tokens = self.calls = 0.0

    def update(self, tokens: int, calls: int) -> int:
        """The length for the next rounds, after rounds of the current length committed so many tokens in so many
        calls of the target; 0 means that plain decoding is faster."""
        if self.fixed is None and calls:
            # Older rounds fade, because texts change.
            self.tokens, self.calls = self.tokens / 2 + tokens, self.calls / 2 + calls
            if self.calls >= _ENOUGH:
                rate = acceptance(self.tokens / self.calls, self.current)
                self.current = best_draft_length(rate, self.draft_cost, self.verify_costs, (0, *LENGTHS))
        return self.current


def acceptance(tokens_per_call: float, length: int) -> float:
    """The acceptance of a draft that explains so many tokens a call: the inverse of `expected_tokens`.

    >>> round(acceptance(1.75, 2), 6), acceptance(1.0, 4), acceptance(9.0, 4)
    (0.5, 0.0, 1.0)
    """
    low, high = 0.0, 1.0
    if tokens_per_call <= 1 or tokens_per_call >= length + 1:
        return high if tokens_per_call >= length + 1 else low
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, length) < tokens_per_call else (low, middle)
    return low


def measure(voice: Voice, batch: int, capacity: int, tokens: int) -> float:
    """Seconds that a model takes to read so many tokens of every row and to choose the likeliest next ones.

    Within a compiled loop, as drafting and plain decoding are: a small model's step takes less than its start.
    Measured once for a model and a shape.
    """
    known, cache = _known(voice.model), voice.model.init_cache(voice.params, batch, capacity)
    shape = (batch, cache.capacity, tokens)
    if shape not in known:
        program = functools.partial(_steps(voice.model), voice.params, jnp.zeros((batch, tokens), jnp.int32), cache)
        jax.block_until_ready(program())
        known[shape] = min(_seconds(program) for _ in range(3)) / _STEPS
    return known[shape]


def _seconds(program: Callable[[], object]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(program())
    return time.perf_counter() - began


@functools.lru_cache(maxsize=8)
def _known(model: LanguageModel) -> dict[tuple[int, int, int], float]:
    return {}


@functools.lru_cache(maxsize=8)
def _steps(model: LanguageModel) -> Callable[..., jax.Array]:
    """Compiles some steps that read tokens [B, C] and commit nothing; each waits for the choice of the one before."""

    def step(params: nnx.State, tokens_BC: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        logits_BCV, cache = model.extend(params, tokens_BC, cache)
        return first_largest(logits_BCV), cache

    def steps(params: nnx.State, tokens_BC: jax.Array, cache: Cache) -> jax.Array:
        return jax.lax.fori_loop(0, _STEPS, lambda _, carry: step(params, *carry), (tokens_BC, cache))[0]

    return jax.jit(steps)
