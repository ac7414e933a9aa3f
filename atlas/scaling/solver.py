"""Levenberg–Marquardt over pytrees."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Tree = Any
_ROUNDING = 1e-14  # relative, of an objective
_NEGLIGIBLE = 1e-12  # relative to the objective: a decrement that rounding may keep from being gained
_LITTLE = 1e-2  # damping below which a step's decrement is Newton's
_PROMISE = 0.4  # of a gain, relative to what a quadratic model promises


def inner(a: Tree, b: Tree) -> Tree:
    """Sum of products over the leaves of two trees."""
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


class Optimum(NamedTuple):
    """Where a descent ended.

    decrement is gᵀH⁻¹g of the last step with little damping: twice the drop in the objective that a full Newton step
    promises. Where more and more damping was needed since, it is of the point before.
    """

    x: Tree
    value: jax.Array
    hessian: Tree
    decrement: jax.Array
    iterations: jax.Array


class _Descent(NamedTuple):
    x: Tree
    value: jax.Array
    gradient: Tree
    hessian: Tree
    damping: jax.Array
    decrement: jax.Array
    as_promised: jax.Array  # whether the last step gained what the quadratic model had promised
    iterations: jax.Array


def levenberg_marquardt(
    evaluate: Callable[[Tree], tuple[jax.Array, Tree, Tree]],
    solve: Callable[[Tree, Tree, jax.Array], Tree],
    x: Tree,
    iterations: int,
    tolerance: float,
    start: tuple[jax.Array, Tree, Tree] | None = None,
    damping: jax.Array | float = 1e-3,
) -> Optimum:
    """Damped Newton descent: a step must lower the objective, and its damping follows its success.

    Args:
      evaluate: x -> (objective, gradient, positive model of the Hessian and what else belongs to x).
      solve: (hessian, gradient, damping) -> step to subtract from x.
      x: where to start.
      iterations: most evaluations.
      tolerance: stops once gᵀ·step with little damping is below it, if that step gained what it promised.
      start: evaluate(x) where it is known.
      damping: of the first step.

    A trial point whose objective is not finite counts as a failed step.
    """

    def open_(state: _Descent) -> jax.Array:
        within = jnp.where(state.as_promised, tolerance, jnp.minimum(tolerance, _NEGLIGIBLE * jnp.abs(state.value)))
        settled = (state.decrement < within) & (state.damping < _LITTLE)
        return (state.iterations < iterations) & ~settled & (state.damping < 1e12)

    def advance(state: _Descent) -> _Descent:
        step = solve(state.hessian, state.gradient, state.damping)
        # The first pass steps nowhere: evaluating the start in the loop halves what has to be compiled.
        first = state.iterations == 0
        step = jax.tree.map(lambda s: jnp.where(first, 0.0, s), step)
        decrement = inner(state.gradient, step)
        x = jax.tree.map(jnp.subtract, state.x, step)
        value, gradient, hessian = evaluate(x)
        # Near the optimum the objective's rounding exceeds what a step gains, and must not forbid it.
        better = jnp.isfinite(value) & (value <= state.value + _ROUNDING * jnp.abs(state.value))
        trial = (x, value, gradient, hessian)
        old = (state.x, state.value, state.gradient, state.hessian)
        kept = jax.tree.map(lambda new, past: jnp.where(better, new, past), trial, old)
        # Eased as far as the step kept its promise, gᵀ·step / 2: else the next one would fail (Nielsen).
        gain = jnp.where(decrement > 0, 2.0 * (state.value - value) / decrement, 1.0)
        eased = state.damping * jnp.clip(1.0 - (2.0 * gain - 1.0) ** 3, 0.1, 2.0)
        eased = jnp.where(first, state.damping, jnp.maximum(eased, 1e-14))
        damping = jnp.where(better, eased, state.damping * 5.0)
        decrement = jnp.where(jnp.isfinite(decrement) & ~first, decrement, jnp.inf)
        # Under much damping it is small anywhere, and says nothing.
        decrement = jnp.where(first | (state.damping < _LITTLE), decrement, state.decrement)
        return _Descent(*kept, damping, decrement, jnp.abs(gain - 1.0) < _PROMISE, state.iterations + 1)

    known = start is not None
    evaluate = jax.jit(evaluate)  # traced once, for its shapes and for the loop
    if not known:
        start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(evaluate, x))
        start = (jnp.full_like(start[0], jnp.inf), *start[1:])
    one = jnp.ones_like(start[0])
    begin = _Descent(x, *start, damping * one, jnp.inf * one, one > 0, jnp.int32(known))
    end = jax.lax.while_loop(open_, advance, begin)
    return Optimum(end.x, end.value, end.hessian, end.decrement, end.iterations)
