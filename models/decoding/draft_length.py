"""How many tokens to draft: from what was committed so far and from measured costs."""

import functools
import timeit
from collections.abc import Callable, Sequence

import jax
import numpy as np

from models.attention.cache import Cache
from models.decoding.language_model import LanguageModel, Params, Voice
from models.decoding.sampling import first_largest

LENGTHS = (0, 1, 2, 4, 8)  # to choose from; 0 is plain decoding
# Whose calls are timed. One draft may cost far more than none: products of matrices take another path.
MEASURED = (0, 1, 8)
_DEFAULT = 4
_ENOUGH = 8  # target calls before the acceptance is trusted
_STEPS = 4  # of a measurement


class DraftLength:
    """The draft length of the next rounds, `current`; 0 means that plain decoding is faster.

    Args:
      fixed: the length for all rounds, or None to choose.
      draft_cost, verify_costs: seconds of a drafted token, and of target calls with as many drafts as MEASURED says;
        calls between these are interpolated. Not read if the length is fixed.
    """

    def __init__(self, fixed: int | None, draft_cost: float = 0.0, verify_costs: Sequence[float] = (1.0, 1.0, 1.0)):
        self._fixed, self._draft_cost = fixed is not None, draft_cost
        self._verify_costs = np.interp(LENGTHS, MEASURED, verify_costs).tolist()
        self.current = _DEFAULT if fixed is None else fixed
        self._tokens = self._calls = 0.0

    def update(self, tokens: int, calls: int) -> None:
        """Takes in what rounds of the current length committed, and in how many calls of the target."""
        if self._fixed or not calls:
            return
        # Older rounds fade, because texts change.
        self._tokens, self._calls = self._tokens / 2 + tokens, self._calls / 2 + calls
        if self._calls >= _ENOUGH:
            rate = acceptance(self._tokens / self._calls, self.current)
            self.current = best_draft_length(rate, self._draft_cost, self._verify_costs, LENGTHS)


def acceptance(tokens_per_call: float, n_draft: int) -> float:
    """The acceptance of drafts that explains so many tokens a call: the inverse of `expected_tokens`.

    >>> acceptance(1.75, 2), acceptance(1.0, 4), acceptance(9.0, 4)
    (0.5, 0.0, 1.0)
    """
    rates = np.linspace(0, 1, 1025)
    return float(np.interp(tokens_per_call, expected_tokens(rates, n_draft), rates))


def expected_tokens(acceptance: float, n_draft: int) -> float:
    """Tokens committed by one verification if each draft is accepted with one probability: Σ_i acceptance^i, i = 0..n.

    Equation 1 of arXiv 2211.17192.

    >>> expected_tokens(0.5, 2), expected_tokens(1.0, 4)
    (1.75, 5.0)
    """
    return sum(acceptance**i for i in range(n_draft + 1))


def best_draft_length(
    acceptance: float, draft_cost: float, verify_costs: Sequence[float], lengths: Sequence[int]
) -> int:
    """Which of the compiled draft lengths commits the most tokens a second; of equal ones the earlier.

    Lossless as long as the acceptance comes from what earlier verifications committed.

    Args:
      acceptance: the rate at which drafts have been accepted, in [0, 1].
      draft_cost: seconds of one drafter step.
      verify_costs: seconds of a verification of each of `lengths`; length 0 is plain decoding.

    >>> best_draft_length(0.9, 1.0, [10.0, 11.0, 13.0], [0, 2, 8]), best_draft_length(0.1, 9.0, [10.0, 11.0], [0, 2])
    (8, 0)
    """

    costs = zip(lengths, verify_costs, strict=True)
    rates = [expected_tokens(acceptance, n) / (n * draft_cost + verify_cost) for n, verify_cost in costs]
    return lengths[rates.index(max(rates))]


def measure(voice: Voice, batch: int, capacity: int, tokens: int) -> float:
    """Seconds that a model takes to read so many tokens of every row and to choose the likeliest next ones.

    Within a compiled loop, as drafting and plain decoding are: a small model's step takes less than its start.
    Measured once for a model and a shape.
    """
    known, shape = _known(voice.model), (batch, capacity, tokens)
    if shape not in known:
        program = functools.partial(_steps(voice.model), voice.params, np.zeros((batch, tokens), np.int32), capacity)
        jax.block_until_ready(program())
        known[shape] = min(timeit.repeat(lambda: jax.block_until_ready(program()), number=1, repeat=3)) / _STEPS
    return known[shape]


@functools.lru_cache(maxsize=8)
def _known(model: LanguageModel) -> dict[tuple[int, int, int], float]:
    return {}


@functools.lru_cache(maxsize=8)
def _steps(model: LanguageModel) -> Callable[..., jax.Array]:
    """Compiles some steps that read tokens [B, C], with so many slots, and commit nothing; each waits for the choice of
    the one before."""

    def steps(params: Params, tokens_BC: jax.Array, capacity: int) -> jax.Array:
        def step(_, carry: tuple[jax.Array, Cache]) -> tuple[jax.Array, Cache]:
            logits_BCV, cache = model.extend(params, *carry)
            return first_largest(logits_BCV), cache

        cache = model.init_cache(params, tokens_BC.shape[0], capacity)
        return jax.lax.fori_loop(0, _STEPS, step, (tokens_BC, cache))[0]

    return jax.jit(steps, static_argnums=2)
