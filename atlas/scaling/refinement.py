"""How the joint fit reaches its optimum: a start, then rounds of descent and of estimating noise and priors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from atlas.scaling import laws, posterior
from atlas.scaling.posterior import Noise, Prior, Rows, State, Sums
from atlas.scaling.solver import Arrow, Coordinates, Optimum, damped, factor, levenberg_marquardt

_BISQUARE = 4.685
_LEAST_VARIANCE = 1e-14  # of log losses: rounding must not pass for noise
_ITERATIONS = 60  # most steps of one descent; 5 to 15 are usual
_RHO_GRID = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 0.97)


class Spreads(NamedTuple):
    """Which variances of the prior the runs estimate.

    Each is drawn to a standard deviation as if some pseudo-observations had shown it; "drawn" is their number and
    that deviation.
    """

    member: jax.Array  # [t, p, k] membership of each parameter in one of k groups of equal variance
    drawn: jax.Array  # [k, 2] where alike, the deviation is that of all alike groups together
    alike: jax.Array  # [k] 1 for the groups of τ
    alike_drawn: jax.Array  # [2] of all alike groups together
    effect_drawn: jax.Array  # [2] of the effects of targets
    contrast: jax.Array  # [q] 1 for the shared parameters that are themselves the effect of a label
    contrast_drawn: jax.Array  # [2] of each of these


class Report(NamedTuple):
    """What a round of refinement saw, for the stopping rule and the diagnostics."""

    shift: jax.Array  # largest change of a parameter in posterior standard deviations
    decrement: jax.Array
    objective: jax.Array
    iterations: jax.Array
    lowest_z: jax.Array  # smallest D_eff / D_tot over used rows, before the guard


@jax.jit
def refine(
    state: State,
    rows: Rows,
    spreads: Spreads,
    guard: jax.Array,
    judge_runs: jax.Array,
    hold: jax.Array,
    tolerance: jax.Array | float = 1e-9,
) -> tuple[State, Report, jax.Array, Arrow]:
    """One round: descend to the mode, then re-estimate noise, weights of runs and variances of the prior.

    Args:
      judge_runs: bool, whether this round updates the runs' weights too (not before the law fits roughly).
      hold: bool, whether to keep noise, weights and prior: repeated, such rounds end at their exact optimum.
      tolerance: Newton decrement that ends the descent; more to come need not end at the optimum of each.

    Returns:
      The state, a report, the covariance [t, p+h, p+h] of every target's law, and the precision of everything.
    """
    end = _descend(state, rows, guard, tolerance)
    moved = state._replace(x=end.x)
    value, jacobian = posterior.linearise(moved, rows, guard)
    raw = rows.log_loss - value
    judged = _run_weights(raw, state.noise, rows)
    judged = jnp.where(judge_runs & ~hold, judged, state.noise.run_weight)
    moved = moved._replace(noise=state.noise._replace(run_weight=judged))
    sums = posterior.sums(posterior.winsorised(raw, moved.noise), jacobian, rows, moved.noise)
    noise = jax.lax.cond(hold, lambda: moved.noise, lambda: _estimate_noise(moved, sums, rows))
    _, gradient, hessian = posterior.whitened(sums, rows, noise, noise.rho)
    _, matrix = posterior.system(end.x, gradient, hessian, noise.scale, state.prior)
    cov, parts = posterior.covariance(matrix, len(posterior.direct_part(end.x, state.prior)))
    deviation = jnp.sqrt(jnp.diagonal(cov, axis1=1, axis2=2)[:, : end.x.own.shape[1]])
    shift = jnp.max(jnp.abs(end.x.own - state.x.own) / deviation)
    prior = jax.tree.map(lambda a, b: jnp.where(hold, a, b), state.prior, _update_prior(moved, parts, spreads))
    report = Report(shift, end.decrement, end.value, end.iterations, posterior.lowest_z(moved, rows))
    return State(end.x, noise, prior), report, cov, matrix


def _descend(state: State, rows: Rows, guard: jax.Array, tolerance: jax.Array | float) -> Optimum:
    """The posterior mode for fixed pseudo-observations, noise and prior."""
    noise, prior = state.noise, state.prior
    start = posterior.predictions(state, rows, guard)
    observed = start + posterior.winsorised(rows.log_loss - start, noise)

    def evaluate(x: Coordinates):
        value, jacobian = posterior.linearise(state._replace(x=x), rows, guard)
        sums = posterior.sums(observed - value, jacobian, rows, noise)
        square, gradient, hessian = posterior.whitened(sums, rows, noise, noise.rho)
        objective = 0.5 * square / noise.scale + posterior.penalty(x, prior)
        return objective, *posterior.system(x, gradient, hessian, noise.scale, prior)

    def solve(matrix: Arrow, gradient: Coordinates, damping: jax.Array) -> Coordinates:
        matrix = damped(matrix, damping)
        return factor(matrix).solve(matrix, gradient)

    return levenberg_marquardt(evaluate, solve, state.x, _ITERATIONS, tolerance)


def _estimate_noise(state: State, sums: Sums, rows: Rows) -> Noise:
    """ρ and σ² of highest Laplace marginal likelihood, the law linearised at its present mode.

    The prior keeps its absolute precision at every ρ: rescaled to units of the residual it would favour a
    large ρ.
    """
    noise, prior = state.noise, state.prior
    p, h = state.x.own.shape[1], len(posterior.direct_part(state.x, prior))
    group_weight, row_weight = posterior.row_weights(noise, rows)
    count = jnp.sum(row_weight)

    def at(rho: jax.Array) -> tuple[jax.Array, jax.Array]:
        square, gradient, hessian = posterior.whitened(sums, rows, noise, rho)

        def shifted(variance: jax.Array):
            scale = variance * (1.0 - rho)
            slope, matrix = posterior.system(state.x, gradient, hessian, scale, prior)
            factors = factor(matrix)
            step = factors.solve(matrix, slope)
            moved = jnp.concatenate([step.own, jnp.broadcast_to(step.shared[:h], (len(step.own), h))], -1)
            left = square + 2.0 * jnp.sum(moved * gradient) + jnp.einsum("tp,tpk,tk->", moved, hessian, moved)
            x = Coordinates(state.x.own - step.own, state.x.shared - step.shared)
            return left / (1.0 - rho), posterior.penalty(x, prior), factors, scale

        def rescale(_, variance: jax.Array) -> jax.Array:
            left, _, factors, scale = shifted(variance)
            used = jnp.sum(jnp.trace(factors.solve_blocks(hessian[:, :p, :p] / scale), axis1=1, axis2=2))
            return jnp.maximum(left / jnp.maximum(count - used, 0.1 * count), _LEAST_VARIANCE)

        variance = jax.lax.fori_loop(0, 4, rescale, noise.variance)
        left, penalty, factors, scale = shifted(variance)
        ratio = rho / (1.0 - rho)
        spread = count * jnp.log(scale) + jnp.sum(group_weight * jnp.log1p(ratio * rows.group_size))
        return left / variance + 2.0 * penalty + spread + factors.log_determinant(), variance

    grid = jnp.array(_RHO_GRID)
    score, variance = jax.lax.map(at, grid)
    # Without two rows in any group the score is flat, and rounding must not choose.
    best = jnp.argmin(score + 0.1 * grid)
    found = noise._replace(rho=grid[best], variance=variance[best])
    # Estimated from what clipping left, σ is too small while the law is far from the rows: it must not hold them there.
    return found._replace(clip=jnp.maximum(found.corner, noise.clip / 3.0))


def _run_weights(residual: jax.Array, noise: Noise, rows: Rows) -> jax.Array:
    """Bisquare weight of every run from its mean residual: a run astray as a whole loses its say."""
    total = jnp.zeros_like(noise.run_weight).at[rows.group_run]
    size = rows.group_size
    variance = jnp.maximum(noise.variance, posterior.HUBER_VARIANCE * (noise.clip / posterior.HUBER) ** 2)
    deviation = jnp.sqrt(variance * total.add(size * (1.0 + noise.rho * (size - 1.0)) * (size > 0)))
    present = deviation > 0
    score = total.add(posterior.by_group(rows.weight * residual, rows)) / jnp.where(present, deviation, 1.0)
    scores = jnp.where(present, jnp.abs(score), jnp.nan)
    typical = jnp.maximum(1.4826 * jnp.nanmedian(scores), 1.0)
    return jnp.where(present, jnp.clip(1.0 - (score / (typical * _BISQUARE)) ** 2, 0.0) ** 2, 1.0)


def _update_prior(state: State, parts: Arrow, spreads: Spreads) -> Prior:
    """Empirical-Bayes variances of each group of parameters and of the targets' effects.

    MacKay's fixed point: what the data do not reach has informed = 0 and slows nothing.

    Args:
      parts: blocks⁻¹, coupling and shared covariance, from `posterior.covariance`.
      spreads: the groups.
    """
    prior, k = state.prior, state.prior.selector.shape[-1]
    reach = parts.border.at[..., parts.border.shape[-1] - k :].add(prior.selector)
    cov = parts.blocks + jnp.einsum("tpq,qk,tlk->tpl", reach, parts.corner, reach)
    # The gap of a parameter is its target's effect, of which the gaps tell, and what it has of its own.
    left = posterior.effect_spread(prior)
    telling = left[:, None] * prior.effect / prior.variance
    gap = posterior.gap(state.x, prior)
    common = jnp.sum(telling * gap, 1)
    moved = jnp.einsum("tpk,tk->tp", cov, telling)
    common_variance = jnp.sum(telling * moved, 1) + left
    own = gap - prior.effect * common[:, None]
    variance = jnp.diagonal(cov, axis1=1, axis2=2) + prior.effect * (common_variance[:, None] - 2.0 * moved)

    informed = jnp.einsum("tpk,tp->k", spreads.member, _informed(variance, prior.variance))
    square = jnp.einsum("tpk,tp->k", spreads.member, own**2)
    together = _drawn(spreads.alike @ square, spreads.alike @ informed, spreads.alike_drawn)
    to = jnp.where(spreads.alike > 0, together, spreads.drawn[:, 1] ** 2)
    fitted = _drawn(square, informed, jnp.stack([spreads.drawn[:, 0], jnp.sqrt(to)], -1))
    told = jnp.sum(jnp.max(prior.effect, 1) * _informed(common_variance, prior.effect_variance))
    # A label claims that its pairs transfer more: where they seem to transfer less, it says nothing.
    contrast = jnp.maximum(state.x.shared - prior.shared_mean, 0.0) ** 2
    known = _informed(jnp.diagonal(parts.corner), 1.0 / prior.shared_precision)
    contrast = 1.0 / _drawn(contrast, known, spreads.contrast_drawn)
    return prior._replace(
        variance=jnp.where(jnp.sum(spreads.member, -1) > 0, spreads.member @ fitted, prior.variance),
        effect_variance=_drawn(jnp.sum(common**2), told, spreads.effect_drawn),
        shared_precision=jnp.where(spreads.contrast > 0, contrast, prior.shared_precision),
    )


def _informed(variance: jax.Array, prior_variance: jax.Array) -> jax.Array:
    return jnp.clip(1.0 - variance / prior_variance, 1e-3, 1.0)


def _drawn(square: jax.Array, informed: jax.Array, drawn: jax.Array) -> jax.Array:
    """Variance from a sum of squares over as many informed parameters, with the pseudo-observations."""
    count, deviation = drawn[..., 0], drawn[..., 1]
    return jnp.maximum((square + count * deviation**2) / (informed + count), (0.1 * deviation) ** 2)


@jax.jit
def start(rows: Rows, tau: jax.Array, lam: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Blocks to descend from, by variable projection: least squares for E, A, B over a grid of the rest.

    Args:
      tau: [t, s] transfer weights to start from, 1 of a target on itself; NaN where a grid is to choose.
      lam: repetition rate to assume.

    Returns:
      [t, p] blocks, and a robust variance of the log residuals they leave.
    """
    exponents = jnp.exp(jnp.linspace(jnp.log(0.06), jnp.log(1.2), 10))
    grid = jnp.stack(jnp.meshgrid(exponents, exponents, jnp.array([0.0, 0.15, 0.5]), indexing="ij"), -1)
    grid = grid.reshape(-1, 3)

    def for_target(known: jax.Array, log_loss: jax.Array, N: jax.Array, D: jax.Array, U: jax.Array, weight: jax.Array):
        loss = jnp.exp(log_loss)

        def score(point: jax.Array):
            alpha, beta, common = point
            transfer = jnp.where(jnp.isnan(known), common, known)
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

    blocks, residual = jax.vmap(for_target)(tau, rows.log_loss, rows.N, rows.D, rows.U, rows.weight)
    spread = 1.4826 * jnp.nanmedian(jnp.where(rows.weight > 0, jnp.abs(residual), jnp.nan))
    return blocks, jnp.maximum(spread**2, 1e-12)
