"""The noise of every fit: rows that correlate within their run, its restricted likelihood, and robust weights.

The rows of a group (one run, on one target) share part of their noise: their covariance is σ²·((1 − ρ)·I + ρ·11ᵀ),
whose inverse is (I − k·11ᵀ)/(σ²(1 − ρ)). A linearised fit therefore needs of its rows only sums over all of them and
sums over each group, once for every ρ. All functions are pure; arrays carry r rows, g groups and p parameters, behind
any leading axes (the joint fit has one per target, a fit of one law none).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Winsorising at 1.345σ is 95 % efficient under normal noise (Huber 1981).
HUBER = 1.345
HUBER_SLOPE = 0.8213  # P(|x| < HUBER) of a normal x, the mean slope of a winsorised residual
HUBER_VARIANCE = 1.0526  # of a winsorised residual over HUBER_SLOPE, in units of σ²: 1 / .95
_BISQUARE = 4.685  # corner of Tukey's bisquare, 95 % efficient under normal noise
_NORMAL = 1.4826  # σ of a normal over the median of its size

LEAST_VARIANCE = 1e-14  # of log losses: rounding must not pass for noise
_RANK = 1e-12  # of the largest eigenvalue: below it lies the rounding of a Hessian
_LEAST_FREEDOM = 0.01  # of the rows: where parameters are as many, hardly any are left over
_FIXED_POINTS = 4  # of σ² at one ρ; MacKay's count moves little after the second
# Of twice a log likelihood: without two rows in any group it is flat in ρ, and rounding must not choose.
_TOWARDS_ZERO = 0.1


class Groups(NamedTuple):
    """Which rows belong together, and how they count."""

    index: jax.Array  # [..., r] int, the row's group
    weight: jax.Array  # [..., r] 1, or 0 where padded
    size: jax.Array  # [..., g] rows of weight 1; 0 where padded
    trust: jax.Array  # [..., g] weight of the whole group

    @property
    def row_weight(self) -> jax.Array:
        """[..., r] of rows, with the trust in their group."""
        return self.weight * jnp.take_along_axis(self.trust, self.index, -1)


class Sums(NamedTuple):
    """Sufficient statistics of a linearised fit for any ρ: over rows, and per group of correlated rows."""

    square: jax.Array  # [...] Σ w r²
    gradient: jax.Array  # [..., p] Σ w r J
    hessian: jax.Array  # [..., p, p] Σ w J Jᵀ
    group_residual: jax.Array  # [..., g] Σ r
    group_jacobian: jax.Array  # [..., g, p] Σ J


class Solved(NamedTuple):
    """What a linear system answers at one noise: the optimum of whitened square / scale and a prior."""

    drop: jax.Array  # by how much the whitened square falls on the way there; 0 where a fit would rather stay
    penalty: jax.Array  # minus the log prior there, without its constants
    log_determinant: jax.Array  # of the posterior precision
    used: jax.Array  # effective number of parameters that the rows determine


class Estimated(NamedTuple):
    """Noise of highest restricted likelihood."""

    rho: jax.Array
    variance: jax.Array
    score: jax.Array  # −2 log likelihood, up to a constant


def by_group(values: jax.Array, groups: Groups) -> jax.Array:
    """Sums [..., g, *] of values [..., r, *] over the rows of every group; weights are not applied."""

    def add(values: jax.Array, index: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values, index, groups.size.shape[-1])

    for _ in groups.index.shape[:-1]:
        add = jax.vmap(add)
    return add(values, groups.index)


def shrinkage(size: jax.Array, rho: jax.Array) -> jax.Array:
    """k of the inverse (I − k·11ᵀ)/(1 − ρ) of the correlation (1 − ρ)·I + ρ·11ᵀ of `size` rows.

    >>> correlation = 0.5 * jnp.eye(3) + 0.5
    >>> inverse = (jnp.eye(3) - shrinkage(3, 0.5)) / (1 - 0.5)
    >>> bool(jnp.allclose(correlation @ inverse, jnp.eye(3), atol=1e-6))
    True
    """
    ratio = rho / (1.0 - rho)
    return ratio / (1.0 + ratio * size)


def log_determinant(groups: Groups, rho: jax.Array) -> jax.Array:
    """Of the correlations of all groups, weighted by the trust in them."""
    each = groups.size * jnp.log1p(-rho) + jnp.log1p(rho / (1.0 - rho) * groups.size)
    return jnp.sum(groups.trust * each)


def independent_rows(groups: Groups, rho: jax.Array) -> jax.Array:
    """How many uncorrelated rows would tell a mean as well: a run of m rows counts for m/(1 + (m − 1)ρ)."""
    rows = jnp.sum(groups.size)
    return rows**2 / jnp.sum((1.0 - rho) * groups.size + rho * groups.size**2)


def sums(residual: jax.Array, jacobian: jax.Array, groups: Groups) -> Sums:
    """Statistics of residuals [..., r] and of the law's derivatives [..., r, p] at the same point."""
    weighted = jacobian * groups.row_weight[..., None]
    return Sums(
        jnp.sum(groups.row_weight * residual**2, -1),
        jnp.einsum("...rp,...r->...p", weighted, residual),
        jnp.einsum("...rp,...rk->...pk", weighted, jacobian),
        by_group(groups.weight * residual, groups),
        by_group(groups.weight[..., None] * jacobian, groups),
    )


def whitened(sums: Sums, groups: Groups, rho: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Residual square [...], gradient [..., p] and Hessian [..., p, p] under correlation ρ, in units of σ²(1 − ρ)."""
    shrink = groups.trust * shrinkage(groups.size, rho)
    shrunk = sums.group_jacobian * shrink[..., None]
    square = sums.square - jnp.sum(shrink * sums.group_residual**2, -1)
    gradient = sums.gradient - jnp.einsum("...gp,...g->...p", shrunk, sums.group_residual)
    return square, gradient, sums.hessian - jnp.einsum("...gp,...gk->...pk", shrunk, sums.group_jacobian)


def estimate(
    sums: Sums,
    groups: Groups,
    solve: Callable[[jax.Array, jax.Array, jax.Array], Solved],
    grid: jax.Array,
    variance: jax.Array,
) -> Estimated:
    """ρ and σ² of highest restricted (Laplace marginal) likelihood, the law being linear in what `sums` were taken at.

    At every ρ, σ² is the fixed point (left-over square) / (rows − parameters used) of MacKay (1992), which without a
    prior is the restricted maximum itself. The prior must keep its absolute precision: expressed in units of the
    residual it would favour a large ρ.

    Args:
      sums: of pseudo-residuals, to which least squares applies.
      groups: the rows' groups.
      solve: (gradient [..., p], hessian [..., p, p], scale) -> the optimum of the whitened square over `scale`, which
        is σ²(1 − ρ), and of whatever prior the fit has. See `solve_freely`; fits with a prior bring
        their own.
      grid: [n] values of ρ to choose from.
      variance: σ² from which the fixed point starts.
    """
    rows, grid = jnp.sum(groups.row_weight), jnp.asarray(grid)

    def at(rho: jax.Array) -> tuple[jax.Array, jax.Array]:
        square, gradient, hessian = whitened(sums, groups, rho)

        def left(variance: jax.Array) -> tuple[jax.Array, Solved]:
            solved = solve(gradient, hessian, variance * (1.0 - rho))
            return (jnp.sum(square) - solved.drop) / (1.0 - rho), solved

        def rescale(_, variance: jax.Array) -> jax.Array:
            remaining, solved = left(variance)
            freedom = jnp.maximum(rows - solved.used, _LEAST_FREEDOM * rows)
            return jnp.maximum(remaining / freedom, LEAST_VARIANCE)

        fixed = jax.lax.fori_loop(0, _FIXED_POINTS, rescale, variance)
        remaining, solved = left(fixed)
        spread = rows * jnp.log(fixed) + log_determinant(groups, rho) + solved.log_determinant
        return remaining / fixed + 2.0 * solved.penalty + spread, fixed

    # One ρ after another: batches of triangular solves can deadlock, see `atlas.scaling.joint.arrow.solve_each`.
    score, variances = jax.lax.map(at, grid)
    best = jnp.argmin(score + _TOWARDS_ZERO * grid)
    return Estimated(grid[best], variances[best], score[best])


def solve_freely(gradient: jax.Array, hessian: jax.Array, scale: jax.Array) -> Solved:
    """The optimum [p] of one law without a prior, for `estimate`; directions that no row determines are left out."""
    values, vectors = jnp.linalg.eigh(hessian)
    known = values > _RANK * values[-1]
    safe = jnp.where(known, values, 1.0)
    along = jnp.where(known, vectors.T @ gradient, 0.0)
    determinant = jnp.sum(jnp.where(known, jnp.log(safe / scale), 0.0))
    return Solved(jnp.sum(along**2 / safe), jnp.zeros_like(scale), determinant, jnp.sum(known))


def winsorised(residual: jax.Array, clip: jax.Array) -> jax.Array:
    """Huber's pseudo-residuals: clipped and rescaled; least squares on them is the M-estimate.

    Unlike reweighting, this leaves the variance of the estimate and the correlation within runs as they are.
    """
    return jnp.clip(residual, -clip, clip) / HUBER_SLOPE


def winsorised_slope(residual: jax.Array, clip: jax.Array) -> jax.Array:
    """Derivative of `winsorised` by the residual."""
    return (jnp.abs(residual) < clip) / HUBER_SLOPE


def deviation(residual: jax.Array, used: jax.Array, parameters: int = 0) -> jax.Array:
    """Standard deviation of the residuals where `used`, by their median size; NaN where there are none.

    As many of the smallest are left out as `parameters` were fitted, as is usual in robust regression: a fit by
    absolute deviations passes through so many rows.
    """
    return _NORMAL * median_size(residual, used, parameters)


def median_size(residual: jax.Array, used: jax.Array, without: int = 0) -> jax.Array:
    """Median of the sizes of the residuals where `used`, `without` the smallest ones; NaN where there are none.

    One sort and two look-ups: jnp.nanmedian compiles for as long as the rest of a fit's noise.

    >>> used = jnp.array([True, True, False, True])
    >>> [float(median_size(jnp.array([-3.0, 1.0, 9.0, 2.0]), used, n)) for n in range(3)]
    [2.0, 2.5, 3.0]
    """
    ordered = jnp.sort(jnp.where(used, jnp.abs(residual), jnp.nan), axis=None)  # NaN comes last
    last = jnp.maximum(jnp.sum(~jnp.isnan(ordered)) - 1, 0)
    below, above = (last + without) // 2, (last + without + 1) // 2
    return 0.5 * (ordered[jnp.minimum(below, last)] + ordered[jnp.minimum(above, last)])


def run_weights(
    residual: jax.Array, groups: Groups, run: jax.Array, runs: int, variance: jax.Array, rho: jax.Array
) -> jax.Array:
    """Bisquare weight [runs] of every run from its mean residual: a run astray as a whole loses its say.

    Args:
      residual: [..., r].
      groups: trust plays no part.
      run: [..., g] int, the run of each group.
      runs: how many there are; one without rows has weight 1.
      variance, rho: of the noise of a row, and its correlation within a group.
    """
    total = jnp.zeros(runs, residual.dtype).at[run]
    size = groups.size
    expected = jnp.sqrt(variance * total.add(size * (1.0 + rho * (size - 1.0)) * (size > 0)))
    present = expected > 0
    score = total.add(by_group(groups.weight * residual, groups)) / jnp.where(present, expected, 1.0)
    typical = jnp.maximum(deviation(score, present), 1.0)
    return jnp.where(present, jnp.clip(1.0 - (score / (typical * _BISQUARE)) ** 2, 0.0) ** 2, 1.0)
