"""Numerics of the joint fit: rows of all target languages, noise, priors, and one round of refinement.

Every target language t has a block θ_t = (log E, a, log α, b, log β, log λ, τ_{t←s} for all Ls sources) with
a = log(A/N₀^α) and b = log(B/D₀^β), N₀ and D₀ being geometric means: in these units the blocks are well
conditioned. The τ of a target on itself is pinned at 1. Shared parameters are (φ, mean log α, mean log β,
mean τ of each group of pairs). Arrays carry t target, r row, g group (the rows of one run on one target), s
source, p and q parameters.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from atlas.scaling import laws
from atlas.scaling.solver import Arrow, Coordinates, Optimum, damped, factor, levenberg_marquardt

LOG_E, LOG_A, LOG_ALPHA, LOG_B, LOG_BETA, LOG_LAMBDA, TAU = range(7)
PHI, MEAN_ALPHA, MEAN_BETA, MEAN_TAU = range(4)

_HUBER = 1.345  # 95 % efficient under Gaussian noise
_HUBER_SLOPE = 0.8213  # P(|x| < 1.345), the mean slope of the winsorised residual
HUBER_VARIANCE = 1.0526  # variance of winsorised residual / slope, in units of σ²
_BISQUARE = 4.685
_ITERATIONS = 60  # most steps of one descent; 5 to 15 are usual
_RHO_GRID = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 0.97)


class Rows(NamedTuple):
    """Evaluations by target; N in N₀, D and U in D₀. A padded row has weight 0 and harmless values."""

    log_loss: jax.Array  # [t, r]
    N: jax.Array  # [t, r]
    D: jax.Array  # [t, r, s]
    U: jax.Array  # [t, r, s]
    weight: jax.Array  # [t, r] 1 or 0
    group: jax.Array  # [t, r] int
    group_size: jax.Array  # [t, g] 0 where padded
    group_run: jax.Array  # [t, g] int, index into the runs


class Prior(NamedTuple):
    """Independent normals: θ_t around base + selector · shared, shared around its own mean."""

    base: jax.Array  # [t, p]
    selector: jax.Array  # [t, p, q] 0 or 1
    precision: jax.Array  # [t, p]
    shared_mean: jax.Array  # [q]
    shared_precision: jax.Array  # [q]


class Noise(NamedTuple):
    """Log-loss noise: variance, correlation within a run on one target, weight of every run."""

    variance: jax.Array
    rho: jax.Array
    run_weight: jax.Array  # [runs]


class State(NamedTuple):
    x: Coordinates
    noise: Noise
    prior: Prior


class Report(NamedTuple):
    """What a round of refinement saw, for the stopping rule and the diagnostics."""

    shift: jax.Array  # largest change of a parameter in posterior standard deviations
    decrement: jax.Array
    objective: jax.Array
    iterations: jax.Array
    lowest_z: jax.Array  # smallest D_eff / D_tot over used rows, before the guard


class _Sums(NamedTuple):
    """Sufficient statistics of a linearised fit for any ρ: over rows, and per group of correlated rows."""

    residual: jax.Array  # Σ w r²
    gradient: jax.Array  # [t, p+1] Σ w r J
    hessian: jax.Array  # [t, p+1, p+1] Σ w J Jᵀ
    group_residual: jax.Array  # [t, g] Σ r
    group_jacobian: jax.Array  # [t, g, p+1] Σ J


def log_loss(theta: jax.Array, phi: jax.Array, N: jax.Array, D: jax.Array, U: jax.Array, guard: jax.Array) -> jax.Array:
    """log of `laws.atlas` for one row, from a block θ [p]; N in N₀, D and U [s] in D₀."""
    E, A, alpha, B, beta, lam = jnp.exp(theta[:TAU])
    return jnp.log(laws.atlas(N, D, U, E, A, alpha, B, beta, theta[TAU:], lam, phi, guard))


def _predictions(x: Coordinates, rows: Rows, guard: jax.Array) -> jax.Array:
    by_row = jax.vmap(log_loss, (None, None, 0, 0, 0, None))
    return jax.vmap(by_row, (0, None, 0, 0, 0, None))(x.own, x.shared[PHI], rows.N, rows.D, rows.U, guard)


def _linearise(x: Coordinates, rows: Rows, guard: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-loss predictions [t, r] and their Jacobian [t, r, p+1] in (θ_t, φ)."""
    by_row = jax.vmap(jax.value_and_grad(log_loss, (0, 1)), (None, None, 0, 0, 0, None))
    by_target = jax.vmap(by_row, (0, None, 0, 0, 0, None))
    value, (own, phi) = by_target(x.own, x.shared[PHI], rows.N, rows.D, rows.U, guard)
    return value, jnp.concatenate([own, phi[..., None]], -1)


def _by_group(values: jax.Array, rows: Rows) -> jax.Array:
    groups = rows.group_size.shape[1]
    return jax.vmap(partial(jax.ops.segment_sum, num_segments=groups, indices_are_sorted=True))(values, rows.group)


def _row_weights(noise: Noise, rows: Rows) -> tuple[jax.Array, jax.Array]:
    """Weights of groups [t, g] and of their rows [t, r]."""
    by_group = noise.run_weight[rows.group_run]
    return by_group, rows.weight * jnp.take_along_axis(by_group, rows.group, 1)


def _sums(residual: jax.Array, jacobian: jax.Array, rows: Rows, noise: Noise) -> _Sums:
    _, weight = _row_weights(noise, rows)
    weighted = jacobian * weight[..., None]
    return _Sums(
        jnp.sum(weight * residual**2),
        jnp.einsum("trp,tr->tp", weighted, residual),
        jnp.einsum("trp,trk->tpk", weighted, jacobian),
        _by_group(rows.weight * residual, rows),
        _by_group(rows.weight[..., None] * jacobian, rows),
    )


def _whitened(sums: _Sums, rows: Rows, noise: Noise, rho: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Residual square, gradient and Hessian under equal correlation ρ within a group, in units of σ²(1 − ρ).

    The inverse of (1 − ρ)I + ρ11ᵀ is (I − k 11ᵀ)/(1 − ρ), k = c/(1 + c·m), c = ρ/(1 − ρ), m rows.
    """
    ratio = rho / (1.0 - rho)
    shrink = noise.run_weight[rows.group_run] * ratio / (1.0 + ratio * rows.group_size)
    shrunk = sums.group_jacobian * shrink[..., None]
    square = sums.residual - jnp.sum(shrink * sums.group_residual**2)
    gradient = sums.gradient - jnp.einsum("tgp,tg->tp", shrunk, sums.group_residual)
    return square, gradient, sums.hessian - jnp.einsum("tgp,tgk->tpk", shrunk, sums.group_jacobian)


def _system(
    x: Coordinates, gradient: jax.Array, hessian: jax.Array, scale: jax.Array, prior: Prior
) -> tuple[Coordinates, Arrow]:
    """Gradient and Hessian of minus the log posterior, from the whitened sums over `scale` and the prior."""
    gap = _gap(x, prior)
    pull = prior.precision * gap
    phi = jnp.zeros_like(x.shared).at[PHI]
    own = -gradient[:, :-1] / scale + pull
    shared = phi.set(-jnp.sum(gradient[:, -1]) / scale) - jnp.einsum("tpq,tp->q", prior.selector, pull)
    shared = shared + prior.shared_precision * (x.shared - prior.shared_mean)
    weighted = prior.selector * prior.precision[..., None]
    blocks = hessian[:, :-1, :-1] / scale + jax.vmap(jnp.diag)(prior.precision)
    border = -weighted.at[:, :, PHI].add(-hessian[:, :-1, -1] / scale)
    corner = jnp.einsum("tpq,tpk->qk", prior.selector, weighted) + jnp.diag(prior.shared_precision)
    corner = corner.at[PHI, PHI].add(jnp.sum(hessian[:, -1, -1]) / scale)
    return Coordinates(own, shared), Arrow(blocks, border, corner)


def _gap(x: Coordinates, prior: Prior) -> jax.Array:
    return x.own - prior.base - prior.selector @ x.shared


def _penalty(x: Coordinates, prior: Prior) -> jax.Array:
    own = jnp.sum(prior.precision * _gap(x, prior) ** 2)
    return 0.5 * (own + jnp.sum(prior.shared_precision * (x.shared - prior.shared_mean) ** 2))


def _winsorised(residual: jax.Array, noise: Noise) -> jax.Array:
    """Huber's pseudo-residuals: clipped at 1.345σ and rescaled; least squares on them is the M-estimate.

    Unlike reweighting, this leaves the variance of the estimate and the correlation within runs as they are.
    """
    limit = _HUBER * jnp.sqrt(noise.variance / HUBER_VARIANCE)
    return jnp.clip(residual, -limit, limit) / _HUBER_SLOPE


def _descend(state: State, rows: Rows, guard: jax.Array) -> Optimum:
    """The posterior mode for fixed pseudo-observations, noise and prior."""
    noise, prior = state.noise, state.prior
    start = _predictions(state.x, rows, guard)
    observed = start + _winsorised(rows.log_loss - start, noise)
    scale = noise.variance * (1.0 - noise.rho)

    def evaluate(x: Coordinates):
        value, jacobian = _linearise(x, rows, guard)
        square, gradient, hessian = _whitened(_sums(observed - value, jacobian, rows, noise), rows, noise, noise.rho)
        return 0.5 * square / scale + _penalty(x, prior), *_system(x, gradient, hessian, scale, prior)

    def solve(matrix: Arrow, gradient: Coordinates, damping: jax.Array) -> Coordinates:
        matrix = damped(matrix, damping)
        return factor(matrix).solve(matrix, gradient)

    return levenberg_marquardt(evaluate, solve, state.x, _ITERATIONS, 1e-9)


def _estimate_noise(state: State, sums: _Sums, rows: Rows) -> Noise:
    """ρ and σ² of highest Laplace marginal likelihood, the law linearised at its present mode.

    The prior keeps its absolute precision at every ρ: rescaled to units of the residual it would favour a
    large ρ.
    """
    noise, prior = state.noise, state.prior
    group_weight, row_weight = _row_weights(noise, rows)
    count = jnp.sum(row_weight)

    def at(rho: jax.Array) -> tuple[jax.Array, jax.Array]:
        square, gradient, hessian = _whitened(sums, rows, noise, rho)

        def shifted(variance: jax.Array):
            scale = variance * (1.0 - rho)
            slope, matrix = _system(state.x, gradient, hessian, scale, prior)
            factors = factor(matrix)
            step = factors.solve(matrix, slope)
            moved = jnp.concatenate([step.own, jnp.broadcast_to(step.shared[PHI], (len(step.own), 1))], -1)
            left = square + 2.0 * jnp.sum(moved * gradient) + jnp.einsum("tp,tpk,tk->", moved, hessian, moved)
            x = Coordinates(state.x.own - step.own, state.x.shared - step.shared)
            return left / (1.0 - rho), _penalty(x, prior), factors, scale

        def rescale(_, variance: jax.Array) -> jax.Array:
            left, _, factors, scale = shifted(variance)
            inverse = jax.scipy.linalg.cho_solve((factors.blocks, True), hessian[:, :-1, :-1] / scale)
            used = jnp.sum(jnp.trace(inverse, axis1=1, axis2=2))
            return jnp.maximum(left / jnp.maximum(count - used, 0.1 * count), 1e-18)

        variance = jax.lax.fori_loop(0, 4, rescale, noise.variance)
        left, penalty, factors, scale = shifted(variance)
        ratio = rho / (1.0 - rho)
        spread = count * jnp.log(scale) + jnp.sum(group_weight * jnp.log1p(ratio * rows.group_size))
        return left / variance + 2.0 * penalty + spread + factors.log_determinant(), variance

    grid = jnp.array(_RHO_GRID)
    score, variance = jax.lax.map(at, grid)
    # Without two rows in any group the score is flat, and rounding must not choose.
    best = jnp.argmin(score + 0.1 * grid)
    return noise._replace(rho=grid[best], variance=variance[best])


def _run_weights(residual: jax.Array, noise: Noise, rows: Rows) -> jax.Array:
    """Bisquare weight of every run from its mean residual: a run astray as a whole loses its say."""
    total = jnp.zeros_like(noise.run_weight).at[rows.group_run]
    by_group = _by_group(rows.weight * residual, rows)
    size = rows.group_size
    deviation = jnp.sqrt(noise.variance * total.add(size * (1.0 + noise.rho * (size - 1.0)) * (size > 0)))
    present = deviation > 0
    score = total.add(by_group) / jnp.where(present, deviation, 1.0)
    scores = jnp.where(present, jnp.abs(score), jnp.nan)
    typical = jnp.maximum(1.4826 * jnp.nanmedian(scores), 1.0)
    return jnp.where(present, jnp.clip(1.0 - (score / (typical * _BISQUARE)) ** 2, 0.0) ** 2, 1.0)


def _covariance(matrix: Arrow) -> tuple[jax.Array, Arrow]:
    """Posterior covariance of (θ_t, φ) [t, p+1, p+1], and blocks⁻¹, coupling, covariance of the shared."""
    factors = factor(matrix)
    own = jax.vmap(lambda c: jax.scipy.linalg.cho_solve((c, True), jnp.eye(len(c))))(factors.blocks)
    shared = jax.scipy.linalg.cho_solve((factors.schur, True), jnp.eye(len(factors.schur)))
    full = own + jnp.einsum("tpq,qk,tlk->tpl", factors.coupling, shared, factors.coupling)
    cross = -jnp.einsum("tpq,q->tp", factors.coupling, shared[:, PHI])
    corner = jnp.broadcast_to(shared[PHI, PHI], (len(own), 1, 1))
    top = jnp.concatenate([full, cross[..., None]], -1)
    bottom = jnp.concatenate([cross[:, None, :], corner], -1)
    return jnp.concatenate([top, bottom], 1), Arrow(own, factors.coupling, shared)


def _update_prior(state: State, parts: Arrow, groups: jax.Array, floor: jax.Array) -> Prior:
    """Empirical-Bayes variances of log α, log β and of each group of τ (EM, with a few pseudo-observations).

    Args:
      parts: blocks⁻¹, coupling and shared covariance, from `_covariance`.
      groups: [t, p, k] membership of each parameter in one of the k hierarchical groups.
      floor: [k, 2] pseudo-count and standard deviation that each group's variance is drawn to.
    """
    prior = state.prior
    reach = parts.border + prior.selector
    variance = jnp.diagonal(parts.blocks, axis1=1, axis2=2)
    variance = variance + jnp.einsum("tpq,qk,tpk->tp", reach, parts.corner, reach)
    gap = _gap(state.x, prior) ** 2
    # MacKay's fixed point: a parameter that the data do not reach has informed = 0 and slows nothing.
    informed = jnp.clip(1.0 - prior.precision * variance, 1e-3, 1.0)
    count, drawn = floor[:, 0], floor[:, 1] ** 2
    total = jnp.einsum("tpk,tp->k", groups, gap) + count * drawn
    fitted = total / (jnp.einsum("tpk,tp->k", groups, informed) + count)
    fitted = jnp.maximum(fitted, (0.1 * floor[:, 1]) ** 2)
    member = jnp.sum(groups, -1)
    return prior._replace(precision=jnp.where(member > 0, groups @ (1.0 / fitted), prior.precision))


@jax.jit
def refine(
    state: State, rows: Rows, groups: jax.Array, floor: jax.Array, guard: jax.Array, judge_runs: jax.Array
) -> tuple[State, Report, jax.Array]:
    """One round: descend to the mode, then re-estimate noise, weights of runs and variances of the prior.

    Args:
      groups, floor: see `_update_prior`.
      judge_runs: bool, whether this round updates the runs' weights too (not before the law fits roughly).
    """
    end = _descend(state, rows, guard)
    moved = state._replace(x=end.x)
    value, jacobian = _linearise(end.x, rows, guard)
    raw = rows.log_loss - value
    noise = state.noise
    judged = _run_weights(raw, noise, rows)
    noise = noise._replace(run_weight=jnp.where(judge_runs, judged, noise.run_weight))
    sums = _sums(_winsorised(raw, noise), jacobian, rows, noise)
    noise = _estimate_noise(moved._replace(noise=noise), sums, rows)
    _, gradient, hessian = _whitened(sums, rows, noise, noise.rho)
    _, matrix = _system(end.x, gradient, hessian, noise.variance * (1.0 - noise.rho), state.prior)
    cov, parts = _covariance(matrix)
    deviation = jnp.sqrt(jnp.diagonal(cov, axis1=1, axis2=2)[:, :-1])
    shift = jnp.max(jnp.abs(end.x.own - state.x.own) / deviation)
    prior = _update_prior(moved, parts, groups, floor)
    report = Report(shift, end.decrement, end.value, end.iterations, _lowest_z(end.x, rows))
    return State(end.x, noise, prior), report, cov


def _lowest_z(x: Coordinates, rows: Rows) -> jax.Array:
    lam = jnp.exp(x.own[:, None, LOG_LAMBDA, None])
    z = jnp.sum(x.own[:, None, TAU:] * laws.saturation(rows.D, rows.U, lam), -1) / jnp.sum(rows.D, -1)
    return jnp.min(jnp.where(rows.weight > 0, z, jnp.inf))


@jax.jit
def start(rows: Rows, tau_own: jax.Array, lam: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Blocks to descend from, by variable projection: least squares for E, A, B over a grid of the rest.

    Args:
      tau_own: [t, s] 1 where a source is the target itself.
      lam: repetition rate to assume.

    Returns:
      [t, p] blocks, and a robust variance of the log residuals they leave.
    """
    exponents = jnp.exp(jnp.linspace(jnp.log(0.06), jnp.log(1.2), 10))
    grid = jnp.stack(jnp.meshgrid(exponents, exponents, jnp.array([0.0, 0.15, 0.5]), indexing="ij"), -1)
    grid = grid.reshape(-1, 3)

    def for_target(own: jax.Array, log_loss: jax.Array, N: jax.Array, D: jax.Array, U: jax.Array, weight: jax.Array):
        loss = jnp.exp(log_loss)

        def score(point: jax.Array):
            alpha, beta, tau = point
            transfer = own + (1.0 - own) * tau
            D_eff = laws.effective_tokens(D, U, transfer, lam, 1e-2)
            terms = jnp.stack([jnp.ones_like(N), N**-alpha, D_eff**-beta], -1)
            design = terms * (weight / loss)[:, None]
            normal = design.T @ design
            ridge = 1e-9 * jnp.diag(jnp.diagonal(normal))
            coefficients = jnp.linalg.solve(normal + ridge, design.T @ weight)
            least = 0.02 * jnp.sum(weight * loss) / jnp.maximum(terms.T @ weight, 1e-30)
            coefficients = jnp.maximum(coefficients, least)
            residual = log_loss - jnp.log(terms @ coefficients)
            e, a, b = jnp.log(coefficients)
            law = jnp.stack([e, a, jnp.log(alpha), b, jnp.log(beta), jnp.log(lam)])
            return jnp.sum(weight * residual**2), jnp.concatenate([law, transfer]), residual

        scores, blocks, residuals = jax.lax.map(score, grid)
        best = jnp.argmin(jnp.where(jnp.isfinite(scores), scores, jnp.inf))
        return blocks[best], residuals[best]

    blocks, residual = jax.vmap(for_target)(tau_own, rows.log_loss, rows.N, rows.D, rows.U, rows.weight)
    spread = 1.4826 * jnp.nanmedian(jnp.where(rows.weight > 0, jnp.abs(residual), jnp.nan))
    return blocks, jnp.maximum(spread**2, 1e-12)


@jax.jit
def predict(
    theta: jax.Array,
    phi: jax.Array,
    cov: jax.Array,
    N: jax.Array,
    D: jax.Array,
    U: jax.Array,
    target: jax.Array,
    guard: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Log loss of rows and its standard deviation under the posterior of the law.

    Args:
      theta: [t, p]; phi: scalar; cov: [t, p+1, p+1].
      N: [n]; D, U: [n, s], in N₀ and D₀.
      target: [n] int.
    """
    own = jax.vmap(jax.value_and_grad(log_loss, (0, 1)), (0, None, 0, 0, 0, None))
    value, (slope, slope_phi) = own(theta[target], phi, N, D, U, guard)
    slope = jnp.concatenate([slope, slope_phi[:, None]], -1)
    return value, jnp.sqrt(jnp.einsum("np,npk,nk->n", slope, cov[target], slope))
