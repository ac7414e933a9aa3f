"""The arrow-shaped linear systems of a hierarchical fit, whose blocks touch only through shared parameters."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Arrow(NamedTuple):
    """A symmetric matrix of Lt blocks of width p that touch each other only through q shared parameters."""

    blocks: jax.Array  # [Lt, p, p]
    border: jax.Array  # [Lt, p, q]
    corner: jax.Array  # [q, q]

    def dense(self) -> np.ndarray:
        """[Lt·p + q, Lt·p + q] written out in full, blocks first."""
        t, p, q = self.border.shape
        full = np.zeros((t * p + q, t * p + q))
        for i in range(t):
            block = slice(i * p, (i + 1) * p)
            full[block, block], full[block, t * p :] = self.blocks[i], self.border[i]
            full[t * p :, block] = self.border[i].T
        full[t * p :, t * p :] = self.corner
        return full


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
