"""Levenberg–Marquardt over pytrees, and the arrow-shaped linear systems of a hierarchical fit."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Tree = Any


class Arrow(NamedTuple):
    """A symmetric matrix of Lt blocks of width p that touch each other only through q shared parameters."""

    blocks: jax.Array  # [Lt, p, p]
    border: jax.Array  # [Lt, p, q]
    corner: jax.Array  # [q, q]


class Coordinates(NamedTuple):
    """Parameters (or a gradient) of a hierarchical fit: Lt blocks of width p and q shared ones."""

    own: jax.Array  # [Lt, p]
    shared: jax.Array  # [q]


class Factor(NamedTuple):
    """What solving with an `Arrow` needs: Cholesky factors of the blocks and of the Schur complement."""

    blocks: jax.Array  # [Lt, p, p] lower
    coupling: jax.Array  # [Lt, p, q] blocks⁻¹ · border
    schur: jax.Array  # [q, q] lower

    def solve(self, matrix: Arrow, right: Coordinates) -> Coordinates:
        own = jax.scipy.linalg.cho_solve((self.blocks, True), right.own[..., None])[..., 0]
        shared = right.shared - jnp.einsum("tpq,tp->q", matrix.border, own)
        shared = jax.scipy.linalg.cho_solve((self.schur, True), shared)
        return Coordinates(own - self.coupling @ shared, shared)

    def log_determinant(self) -> jax.Array:
        diagonals = jnp.diagonal(self.blocks, axis1=-2, axis2=-1), jnp.diagonal(self.schur)
        return 2.0 * sum(jnp.sum(jnp.log(d)) for d in diagonals)


def factor(matrix: Arrow) -> Factor:
    """Batched Cholesky of the blocks, then of the Schur complement of the corner."""
    blocks = jnp.linalg.cholesky(matrix.blocks)
    coupling = jax.scipy.linalg.cho_solve((blocks, True), matrix.border)
    schur = matrix.corner - jnp.einsum("tpq,tpr->qr", matrix.border, coupling)
    return Factor(blocks, coupling, jnp.linalg.cholesky(schur))


def damped(matrix: Arrow, damping: jax.Array) -> Arrow:
    """Scales the diagonal by 1 + damping (Marquardt)."""
    blocks = matrix.blocks * (1.0 + damping * jnp.eye(matrix.blocks.shape[-1]))
    return Arrow(blocks, matrix.border, matrix.corner * (1.0 + damping * jnp.eye(len(matrix.corner))))


def inner(a: Tree, b: Tree) -> jax.Array:
    """Sum of products over the leaves of two trees."""
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


class Optimum(NamedTuple):
    """Where a descent ended.

    decrement is gᵀH⁻¹g at the last accepted point: twice the drop in the objective that a full Newton step
    promises.
    """

    x: Tree
    value: jax.Array
    decrement: jax.Array
    iterations: jax.Array


class _Descent(NamedTuple):
    x: Tree
    value: jax.Array
    gradient: Tree
    hessian: Tree
    damping: jax.Array
    decrement: jax.Array
    iterations: jax.Array


def levenberg_marquardt(
    evaluate: Callable[[Tree], tuple[jax.Array, Tree, Tree]],
    solve: Callable[[Tree, Tree, jax.Array], Tree],
    x: Tree,
    iterations: int,
    tolerance: float,
) -> Optimum:
    """Damped Newton descent: a step must lower the objective, and its damping follows its success.

    Args:
      evaluate: x -> (objective, gradient, positive model of the Hessian).
      solve: (hessian, gradient, damping) -> step to subtract from x.
      x: where to start.
      iterations: most evaluations.
      tolerance: stops once gᵀ·step with little damping is below it.

    A trial point whose objective is not finite counts as a failed step.
    """

    def open_(state: _Descent) -> jax.Array:
        settled = (state.decrement < tolerance) & (state.damping < 1e-2)
        return (state.iterations < iterations) & ~settled & (state.damping < 1e12)

    def advance(state: _Descent) -> _Descent:
        step = solve(state.hessian, state.gradient, state.damping)
        # The first pass steps nowhere: evaluating the start in the loop halves what has to be compiled.
        first = state.iterations == 0
        step = jax.tree.map(lambda s: jnp.where(first, 0.0, s), step)
        decrement = inner(state.gradient, step)
        x = jax.tree.map(jnp.subtract, state.x, step)
        value, gradient, hessian = evaluate(x)
        better = jnp.isfinite(value) & (value <= state.value)
        trial = (x, value, gradient, hessian)
        old = (state.x, state.value, state.gradient, state.hessian)
        kept = jax.tree.map(lambda new, past: jnp.where(better, new, past), trial, old)
        eased = jnp.where(first, state.damping, jnp.maximum(state.damping * 0.1, 1e-14))
        damping = jnp.where(better, eased, state.damping * 5.0)
        decrement = jnp.where(jnp.isfinite(decrement) & ~first, decrement, jnp.inf)
        return _Descent(*kept, damping, decrement, state.iterations + 1)

    value, gradient, hessian = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(evaluate, x))
    one = jnp.ones_like(value)
    start = _Descent(x, jnp.inf * one, gradient, hessian, 1e-3 * one, jnp.inf * one, jnp.int32(0))
    end = jax.lax.while_loop(open_, advance, start)
    return Optimum(end.x, end.value, end.decrement, end.iterations)
