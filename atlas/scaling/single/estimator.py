"""Robust fits of one law: objective, descent from many starts, covariance. Everything here is jitted and pure."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atlas.scaling import noise
from atlas.scaling.single.specification import Law
from atlas.scaling.solver import Optimum, levenberg_marquardt

SAMPLE = 4096  # rows on which the starts of a longer table compete: enough to tell them apart, in a second
_STAGES = 5  # corners from the spread of the residuals to the one asked for
_WIDEST = 3.0  # median residuals: a first corner that hardly clips, so that the first descent is least squares
_ROUGH = 1e-3  # Newton decrement over objective at which a wider corner has served
_STEPS = 100  # of a descent at most; 5 to 30 are usual
OPTIMAL = 1e-10  # Newton decrement over objective below which a gradient counts as zero
LEAST_OBJECTIVE = 1e-12  # below which losses are the law's to rounding, and an optimum is one whatever its gradient
# Times a residual, of _ORDINARY size or clipped at the corner: gain per row, far below a log loss's rounding, that ends
# a descent.
_ROUNDING, _ORDINARY = 1e-17, 1e-2
_AGREEING = 1e-6  # relative gap of objectives within which two starts found one optimum
_RIDGE = 1e-13  # of a Hessian's largest diagonal: keeps what no row determines from a division by zero
_RANK = 1e-12  # of the largest eigenvalue: below it a direction is open
_OPEN = 100.0  # standard deviation of a coordinate that nothing determines
_TINY = 1e-300  # keeps divisions defined; never decides
_RUNS_PER_PARAMETER = 12  # from which the runs themselves tell their covariance
# Windows, in σ, within which residuals show their density at a sharp corner. A wide one is smooth, as the weight of a
# prior has to be, but counts a normal density 28 % too low. Standard errors take a near one, 6 % too low; it widens
# with the tails, as the errors of 240 real points do under resampling, but for no residual beyond _FAR.
_WIDE, _NEAR, _FAR = 1.5, 0.7, 5.0
_LEVERAGE = 0.9  # of a run, at most: what a run that alone determines something counts for
_OUTLYING = 3.0  # σ at which residuals are clipped before their correlation is judged
_SOFT = 1.5  # corner in σ from which clipped residuals correlate as the residuals themselves
# What so few runs share, a level, a coefficient and an exponent take up whole: correlation cannot be told, and must be
# assumed lest checkpoints pass for independent runs.
_ABSORBED = 3
_RHO_GRID = np.linspace(0.0, 0.98, 50)  # correlations within runs to try: steps below what any table tells apart


class Problem(NamedTuple):
    """A law's data, and how residuals count. Rows are [n]; padded rows have weight 0 and finite values.

    Attributes:
      batch: columns of the law.
      observed: log losses, or losses where residuals are raw.
      weight: how often a row counts.
      run: index of the row's run, below n.
      centre: geometric mean of each column, and of the loss.
      corner: of the Huber loss.
      mean, precision: [p] and [p, p], a normal prior on the fitted values; precision 0 for none.
    """

    batch: dict[str, jax.Array]
    observed: jax.Array
    weight: jax.Array
    run: jax.Array
    centre: dict[str, jax.Array]
    corner: jax.Array
    mean: jax.Array
    precision: jax.Array


class Solution(NamedTuple):
    """Where a fit ended. `scale` weighs the prior against the objective, which leaves the prior out."""

    x: jax.Array  # [p]
    objective: jax.Array
    scale: jax.Array
    decrement: jax.Array
    converged: jax.Array
    agreeing: jax.Array


class Spread(NamedTuple):
    """What an optimum says: fitted values, covariance of the coordinates [p, p], and what it rests on."""

    covariance: jax.Array
    sigma: jax.Array  # standard deviation of a row's residual
    correlation: jax.Array  # of residuals within a run
    rows: jax.Array  # as many independent rows would tell as much
    freedom: jax.Array  # degrees of freedom: those rows less parameters
    condition: jax.Array  # of the curvature
    fitted: jax.Array  # [p]
    to_fitted: jax.Array  # [p, p] derivatives of the fitted values by the coordinates
    predicted: jax.Array  # [n] losses


def huber(residual: jax.Array, corner: jax.Array) -> jax.Array:
    """r²/2 up to the corner, linear beyond it."""
    size = jnp.abs(residual)
    return jnp.where(size <= corner, 0.5 * residual**2, corner * (size - 0.5 * corner))


def residuals(law: Law, x: jax.Array, problem: Problem) -> jax.Array:
    """[n] observed less predicted (log) loss."""
    return problem.observed - law.observed(law.predict(x, problem.centre, problem.batch))


def objective(law: Law, x: jax.Array, problem: Problem) -> jax.Array:
    """Weighted sum of Huber losses, without the prior."""
    return jnp.sum(problem.weight * huber(residuals(law, x, problem), problem.corner))


def prior_scale(law: Law, x: jax.Array, problem: Problem) -> jax.Array:
    """Weighs a prior against the Huber sum as it would weigh against the likelihood it stands for."""
    slope, square = _score_moments(residuals(law, x, problem), problem)
    return square * jnp.sum(problem.weight) / jnp.maximum(jnp.sum(slope), _TINY)


def descend(
    law: Law, x: jax.Array, problem: Problem, scale: jax.Array, tolerance: jax.Array | float = 0.0, steps: int = _STEPS
) -> Optimum:
    """Newton descent from x [p], until a step promises less than `tolerance` or rounding.

    It minimises the objective and the prior in its unit.
    """

    def value(x: jax.Array) -> jax.Array:
        away = law.fitted(x, problem.centre) - problem.mean
        return objective(law, x, problem) + 0.5 * scale * away @ problem.precision @ away

    def slope(x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        found, slope = jax.value_and_grad(value)(x)
        return slope, (found, slope)

    def evaluate(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        hessian, (found, gradient) = jax.jacfwd(slope, has_aux=True)(x)
        return found, gradient, hessian

    rounding = _ROUNDING * jnp.sum(problem.weight) * jnp.minimum(problem.corner, _ORDINARY)
    return levenberg_marquardt(evaluate, _newton, x, steps, jnp.maximum(tolerance, rounding))


def _newton(hessian: jax.Array, gradient: jax.Array, damping: jax.Array) -> jax.Array:
    """A damped step; NaN, and so refused, where the damped Hessian is not positive."""
    diagonal = jnp.abs(jnp.diagonal(hessian))
    ridge = damping * diagonal + _RIDGE * jnp.max(diagonal)
    return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(hessian + jnp.diag(ridge)), True), gradient)


def _approach(law: Law, x: jax.Array, problem: Problem) -> tuple[Optimum, jax.Array]:
    """Descends by way of wider corners, since a sharp one has too little curvature from afar.

    Returns the optimum and the weight of the prior there.
    """
    spread = noise.median_size(residuals(law, x, problem), problem.weight > 0)
    widest = jnp.maximum(_WIDEST * spread, problem.corner)

    def stage(state: tuple[Optimum, jax.Array], part: jax.Array):
        x = state[0].x
        wide = problem._replace(corner=widest ** (1.0 - part) * problem.corner**part)
        scale = prior_scale(law, x, problem)
        tolerance = jnp.where(part < 1.0, _ROUGH * objective(law, x, wide), 0.0)
        return (descend(law, x, wide, scale, tolerance), scale), None

    zero = jnp.zeros_like(widest)
    start = Optimum(x, zero, jnp.zeros((x.size, x.size)), zero, jnp.int32(0)), zero
    return jax.lax.scan(stage, start, jnp.linspace(0.0, 1.0, _STAGES))[0]


@partial(jax.jit, static_argnames="law")
def solve(law: Law, problem: Problem) -> Solution:
    """The best optimum from the law's starts."""
    starts = law.start(problem.batch, law.loss_of(problem.observed), problem.weight, problem.centre)
    ends, scales = jax.vmap(lambda x: _approach(law, x, problem))(starts)
    values = jnp.where(jnp.isfinite(ends.value), ends.value, jnp.inf)
    best = jnp.argmin(values)
    agreeing = jnp.mean(values <= values[best] * (1.0 + _AGREEING))
    return _solution(law, jax.tree.map(lambda a: a[best], ends), problem, scales[best], agreeing)


@partial(jax.jit, static_argnames="law")
def polish(law: Law, near: Solution, problem: Problem, scale: jax.Array) -> Solution:
    """The optimum that a descent from a solution of another sample or prior reaches."""
    return _solution(law, descend(law, near.x, problem, scale), problem, scale, near.agreeing)


def near(x: np.ndarray) -> Solution:
    """A place [p] from which `polish` may start."""
    unknown = np.float64(np.nan)
    return Solution(x, unknown, unknown, unknown, np.bool_(False), unknown)


def _solution(law: Law, end: Optimum, problem: Problem, scale: jax.Array, agreeing: jax.Array) -> Solution:
    return Solution(end.x, objective(law, end.x, problem), scale, end.decrement, is_optimum(end), agreeing)


def is_optimum(end: Optimum) -> jax.Array:
    """Whether the gradient vanished where a descent ended; not where it never had a finite objective."""
    return jnp.isfinite(end.value) & (end.decrement <= OPTIMAL * jnp.maximum(end.value, LEAST_OBJECTIVE))


def _score_moments(residual: jax.Array, problem: Problem, near: bool = False):
    """Slope [n] of the Huber score at each row, smoothed over a window, and its mean square over rows.

    Where the corner lies far below the noise, the slope is in effect the density of residuals near zero. It
    is taken row by row: rows of high leverage are often the ones that the law misses, and so hold the fit
    the least.
    """
    size = jnp.abs(residual)
    sigma = noise.deviation(residual, problem.weight > 0)
    if near:
        square = jnp.sum(problem.weight * jnp.minimum(size, _FAR * sigma) ** 2) / jnp.sum(problem.weight)
        window = _NEAR * jnp.maximum(sigma, jnp.sqrt(square))
    else:
        window = _WIDE * sigma
    window = jnp.maximum(problem.corner, window)
    slope = problem.weight * (size <= window) * (problem.corner / window)
    square = jnp.sum(problem.weight * jnp.minimum(size, problem.corner) ** 2) / jnp.sum(problem.weight)
    return slope, square


@partial(jax.jit, static_argnames="law")
def spread(law: Law, x: jax.Array, problem: Problem, scale: jax.Array) -> Spread:
    """Covariance of an M-estimator's coordinates, with rows of one run correlated.

    Many runs show the covariance of their scores themselves (a sandwich clustered by run); of few, it is
    taken from one variance and one correlation within runs, estimated by REML. A direction that the rows
    leave open gets the standard deviation _OPEN: both halves of the sandwich vanish there, and their ratio
    would pass for certainty.
    """
    residual = residuals(law, x, problem)
    jacobian = jax.jacfwd(lambda x: residuals(law, x, problem))(x) * problem.weight[:, None]
    groups = _groups(problem)
    slope, square = _score_moments(residual, problem, near=True)
    sigma, correlation, sums = _noise(residual, jacobian, groups)
    rows = noise.independent_rows(groups, correlation)
    freedom = jnp.maximum(rows - len(x), 1.0)
    tied = _score_correlation(correlation, problem.corner / jnp.maximum(sigma, _TINY))
    shared = sums.group_jacobian.T @ sums.group_jacobian
    modelled = square * ((1.0 - tied) * sums.hessian + tied * shared) * rows / freedom

    to_fitted = jax.jacfwd(lambda x: law.fitted(x, problem.centre))(x)
    prior = to_fitted.T @ problem.precision @ to_fitted
    bread = (slope[:, None] * jacobian).T @ jacobian + scale * prior
    values, vectors = jnp.linalg.eigh(bread)
    open_ = values < _RANK * values[-1]
    inverse = (vectors * jnp.where(open_, 0.0, 1.0 / jnp.where(open_, 1.0, values))) @ vectors.T
    # A fit gives way to a run with leverage, whose scores are then too small (MacKinnon and White's HC2).
    taken = jnp.sum(slope) / jnp.sum(problem.weight) * jnp.sum(jacobian @ inverse * jacobian, 1)
    leverage = jnp.minimum(noise.by_group(taken, groups), _LEVERAGE)
    scores = jnp.clip(residual, -problem.corner, problem.corner)[:, None] * jacobian
    by_run = noise.by_group(scores, groups) / jnp.sqrt(1.0 - leverage)[:, None]
    many = jnp.sum(groups.size > 0) >= _RUNS_PER_PARAMETER * len(x)
    meat = jnp.where(many, by_run.T @ by_run, modelled)
    covariance = inverse @ (meat + scale**2 * prior) @ inverse + (vectors * jnp.where(open_, _OPEN**2, 0.0)) @ vectors.T
    condition, fitted = values[-1] / jnp.maximum(values[0], _TINY), law.fitted(x, problem.centre)
    predicted = law.loss_of(problem.observed - residual)
    sigma = noise.deviation(residual, problem.weight > 0, len(x))
    return Spread(covariance, sigma, correlation, rows, freedom, condition, fitted, to_fitted, predicted)


def _groups(problem: Problem) -> noise.Groups:
    """The rows of each run, as many groups as rows; most are empty."""
    size = jax.ops.segment_sum(problem.weight, problem.run, len(problem.run))
    return noise.Groups(problem.run, problem.weight, size, jnp.ones_like(size))


def _noise(residual: jax.Array, jacobian: jax.Array, groups: noise.Groups) -> tuple[jax.Array, jax.Array, noise.Sums]:
    """Standard deviation of a residual, its correlation within runs by REML, and the sums that told it.

    Correlations of the residuals themselves would be too small: the fit takes up part of what the rows of a run share.
    """
    sigma = noise.deviation(residual, groups.weight > 0)
    # In units of σ, so that exact losses have noise too; clipped, so that a row astray cannot pass for its run.
    unit = jnp.clip(residual / jnp.maximum(sigma, _TINY), -_OUTLYING, _OUTLYING)
    sums = noise.sums(unit, jacobian, groups)
    told = noise.estimate(sums, groups, noise.solve_freely, _RHO_GRID, jnp.float64(1.0)).rho
    return sigma, jnp.where(jnp.sum(groups.size > 0) > _ABSORBED, told, _RHO_GRID[-1]), sums


def _score_correlation(correlation: jax.Array, corner: jax.Array) -> jax.Array:
    """Correlation of clipped normal residuals: their own beyond _SOFT σ, that of their signs for a sharp corner."""
    soft = jnp.minimum(corner / _SOFT, 1.0)
    return soft * correlation + (1.0 - soft) * (2.0 / jnp.pi) * jnp.arcsin(correlation)
