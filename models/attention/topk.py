"""Exact top-k selection without a sort.

The k-th largest score of a row is found by bisection on bit patterns: those of non-negative floats, read as
integers, have the floats' own order. Each step is one comparison and one count over the row; a row is
finished as soon as exactly k scores reach its threshold, so that a few more than log2(S) steps do for most
inputs.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Threshold(NamedTuple):
    """What defines a selected set: bits above `bits`, and those equal to it at positions up to `cut`.

    Both are integers [..., T]; `cut` is -1 where no equal score is selected.
    """

    bits: jax.Array
    cut: jax.Array


def select_mask(
    scores_BTS: jax.Array, k_BT: jax.Array, visible_BTS: jax.Array, keep_BTS: jax.Array | None = None
) -> jax.Array:
    """The k highest-scored visible positions of every query, as a mask [B, T, S].

    Of equal scores the lower position wins. A query that sees at most k positions selects them all. Visible
    positions in `keep_BTS` are selected whatever their score and count towards k; where there are more of
    them than k, all of them are selected.

    Args:
      scores_BTS: non-negative float32 or float64 scores; no gradient passes.
      k_BT: int32, at least 1.
      visible_BTS: bool, what each query may select.
      keep_BTS: optional bool, what is always selected if visible.

    >>> scores = jnp.array([[[0.3, 0.9, 0.3, 0.1]]])
    >>> select_mask(scores, jnp.array([[2]]), jnp.ones((1, 1, 4), bool)).astype(int).tolist()
    [[[1, 1, 0, 0]]]
    """
    return selected_by(select_threshold(scores_BTS, k_BT, visible_BTS, keep_BTS), scores_BTS, visible_BTS, keep_BTS)


def select_threshold(
    scores_BTS: jax.Array, k_BT: jax.Array, visible_BTS: jax.Array, keep_BTS: jax.Array | None = None
) -> Threshold:
    """The set of `select_mask` in O(T) numbers, from which `selected_by` finds it again without a search."""
    candidate_BTS = visible_BTS
    if keep_BTS is not None:
        candidate_BTS = visible_BTS & ~keep_BTS
        k_BT = jnp.maximum(k_BT - _count(visible_BTS & keep_BTS), 0)
    bits_BTS = ordered_bits(scores_BTS, candidate_BTS)
    available_BT = _count(bits_BTS >= 0)
    k_BT = jnp.minimum(k_BT, available_BT)
    bits_BT = _bisect_bits(bits_BTS, k_BT, available_BT)
    need_BT = k_BT - _count(bits_BTS > bits_BT[..., None])
    return Threshold(bits_BT, _bisect_cut(bits_BTS == bits_BT[..., None], need_BT))


def selected_by(
    threshold: Threshold, scores_BTS: jax.Array, visible_BTS: jax.Array, keep_BTS: jax.Array | None = None
) -> jax.Array:
    """The mask [B, T, S] of a `select_threshold` of the same arguments."""
    bits_BTS = ordered_bits(scores_BTS, visible_BTS if keep_BTS is None else visible_BTS & ~keep_BTS)
    position_S = jnp.arange(bits_BTS.shape[-1], dtype=jnp.int32)
    equal_BTS = bits_BTS == threshold.bits[..., None]
    chosen_BTS = (bits_BTS > threshold.bits[..., None]) | (equal_BTS & (position_S <= threshold.cut[..., None]))
    return chosen_BTS if keep_BTS is None else chosen_BTS | (visible_BTS & keep_BTS)


def ordered_bits(scores: jax.Array, candidate: jax.Array) -> jax.Array:
    """Integers in the order of the non-negative `scores`; -1 where not a candidate."""
    integer = {4: jnp.int32, 8: jnp.int64}[scores.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(scores), integer)
    return jnp.where(candidate, bits, integer(-1))


def _count(mask: jax.Array) -> jax.Array:
    # Exact below 2^24 keys, and XLA sums floats on CPUs in half the time of integers.
    return jnp.sum(mask, axis=-1, dtype=jnp.float32).astype(jnp.int32)


def _bisect_bits(bits_BTS: jax.Array, k_BT: jax.Array, available_BT: jax.Array) -> jax.Array:
    """A largest value that at least k entries reach, or any that exactly k reach; [B, T]."""
    high_BT = jnp.max(bits_BTS, axis=-1) + 1
    largest = jnp.iinfo(bits_BTS.dtype).max
    low_BT = jnp.min(jnp.where(bits_BTS >= 0, bits_BTS, largest), axis=-1)
    # Rows that take everything, or have no candidate, are settled at once.
    low_BT = jnp.minimum(low_BT, jnp.maximum(high_BT - 1, 0))
    high_BT = jnp.where(k_BT == available_BT, low_BT + 1, high_BT)

    def halve(middle: jax.Array, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
        reached = _count(bits_BTS >= middle[..., None])
        exact = reached == k_BT
        return jnp.where(reached >= k_BT, middle, low), jnp.where(exact | (reached < k_BT), middle + exact, high)

    return bisect(halve, low_BT, high_BT)[0]


def _bisect_cut(equal_BTS: jax.Array, need_BT: jax.Array) -> jax.Array:
    """The last position of the first `need` true entries of every row; -1 where none is needed."""
    position_S = jnp.arange(equal_BTS.shape[-1], dtype=jnp.int32)
    none_BT = jnp.full_like(need_BT, -1)
    high_BT = jnp.where(need_BT > 0, equal_BTS.shape[-1] - 1, none_BT)
    low_BT = jnp.where(_count(equal_BTS) > need_BT, none_BT, high_BT - 1)

    def halve(middle: jax.Array, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
        enough = _count(equal_BTS & (position_S <= middle[..., None])) >= need_BT
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    return bisect(halve, low_BT, high_BT)[1]


def bisect(halve: Any, low_BT: jax.Array, high_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Integer bounds that differ by at most 1 everywhere: halve(middle, low, high) gives the next ones."""

    def unsettled(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(bounds[1] - bounds[0] > 1)

    def step(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        return halve(low + (high - low) // 2, low, high)

    return jax.lax.while_loop(unsettled, step, (low_BT, high_BT))
