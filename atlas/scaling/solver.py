"""Levenberg–Marquardt over pytrees, and the arrow-shaped linear systems of a hierarchical fit."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Tree = Any
_ROUNDING = 1e-14  # relative, of an objective
_NEGLIGIBLE = 1e-12  # relative to the objective: a decrement that rounding may keep from being gained
_PROMISE = 0.4  # of a gain, relative to what a quadratic model promises


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
    """What solving with an `Arrow` needs, from Cholesky factors of the blocks and of the Schur complement."""

    inverse: jax.Array  # [Lt, p, p] of the blocks' lower factors C
    coupling: jax.Array  # [Lt, p, q] blocks⁻¹ · border
    schur: jax.Array  # [q, q] lower

    def solve(self, matrix: Arrow, right: Coordinates) -> Coordinates:
        own = self.solve_blocks(right.own[..., None])[..., 0]
        shared = right.shared - jnp.einsum("tpq,tp->q", matrix.border, own)
        shared = jax.scipy.linalg.cho_solve((self.schur, True), shared)
        return Coordinates(own - self.coupling @ shared, shared)

    def solve_blocks(self, right: jax.Array) -> jax.Array:
        """blocks⁻¹ · right, [Lt, p, m]."""
        return jnp.swapaxes(self.inverse, 1, 2) @ (self.inverse @ right)

    def log_determinant(self) -> jax.Array:
        of_blocks = jnp.sum(jnp.log(jnp.diagonal(self.inverse, axis1=-2, axis2=-1)))
        return 2.0 * (jnp.sum(jnp.log(jnp.diagonal(self.schur))) - of_blocks)


def factor(matrix: Arrow) -> Factor:
    """Cholesky of the blocks, then of the Schur complement of the corner."""

    def invert(block: jax.Array) -> jax.Array:
        return jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(block), jnp.eye(len(block)), lower=True)

    inverse = jax.lax.map(invert, matrix.blocks)  # one by one for the reason that `solve_each` states
    whitened = inverse @ matrix.border
    coupling = jnp.swapaxes(inverse, 1, 2) @ whitened
    schur = matrix.corner - jnp.einsum("tpq,tpr->qr", whitened, whitened)
    return Factor(inverse, coupling, jnp.linalg.cholesky(schur))


def solve_each(matrices: jax.Array, right: jax.Array) -> jax.Array:
    """matrices⁻¹ · right, [n, p, p] and [n, p, m], one by one.

    Batches of triangular solves can deadlock in the thread pool of jaxlib 0.10 on a CPU; 40 blocks of width 46 did.
    """
    return jax.lax.map(lambda pair: jnp.linalg.solve(*pair), (matrices, right))


def damped(matrix: Arrow, extra: Coordinates) -> Arrow:
    """With more on its diagonal."""
    return Arrow(matrix.blocks + jax.vmap(jnp.diag)(extra.own), matrix.border, matrix.corner + jnp.diag(extra.shared))


class Bordered(NamedTuple):
    """An arrow H, which need not be symmetric, beside m rows c and k columns b: what c·H⁻¹·b needs.

    Without its corner's last m rows and k columns it is H; leading axes are batches.
    """

    blocks: jax.Array  # [Lt, p, p]
    right: jax.Array  # [Lt, p, q + k] upper border of H, then b
    left: jax.Array  # [Lt, q + m, p] lower border of H, then c
    corner: jax.Array  # [q + m, q + k]

    def eliminated(self) -> jax.Array:
        """[Lt, q + m, q + k] what eliminating each block subtracts from the corner."""
        return self.left @ solve_each(self.blocks, self.right)

    def reduced(self) -> jax.Array:
        """[q + m, q + k] the corner once the blocks are eliminated."""
        return self.corner - jnp.sum(self.eliminated(), -3)

    def adjoint(self, q: int) -> Coordinates:
        """H⁻ᵀ·cᵀ: own [Lt, p, m] and shared [q, m]."""
        reduced = self.reduced()
        shared = jnp.linalg.solve(reduced[:q, :q].T, reduced[q:, :q].T)
        own = jnp.swapaxes(self.left[:, q:], 1, 2) - jnp.swapaxes(self.left[:, :q], 1, 2) @ shared
        return Coordinates(solve_each(jnp.swapaxes(self.blocks, 1, 2), own), shared)


def products(reduced: jax.Array, q: int) -> jax.Array:
    """c·H⁻¹·b [..., m, k] from `Bordered.reduced` [..., q + m, q + k]."""
    by_shared = reduced[..., q:, :q] @ jnp.linalg.solve(reduced[..., :q, :q], reduced[..., :q, q:])
    return by_shared - reduced[..., q:, q:]


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
        settled = (state.decrement < within) & (state.damping < 1e-2)
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
        return _Descent(*kept, damping, decrement, jnp.abs(gain - 1.0) < _PROMISE, state.iterations + 1)

    known = start is not None
    if not known:
        start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(evaluate, x))
        start = (jnp.full_like(start[0], jnp.inf), *start[1:])
    one = jnp.ones_like(start[0])
    begin = _Descent(x, *start, damping * one, jnp.inf * one, one > 0, jnp.int32(known))
    end = jax.lax.while_loop(open_, advance, begin)
    return Optimum(end.x, end.value, end.hessian, end.decrement, end.iterations)
