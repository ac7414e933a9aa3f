"""How the joint fit reaches its optimum: a start, then rounds of descent and of estimating noise and priors."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from atlas.scaling import law as laws
from atlas.scaling.joint import system
from atlas.scaling.joint.arrow import Arrow, Coordinates, damped, factor
from atlas.scaling.joint.system import Linear, Noise, Prior, Rows, State
from atlas.scaling.noise import (
    HUBER,
    HUBER_VARIANCE,
    Groups,
    Solved,
    Sums,
    deviation,
    estimate,
    run_weights,
    sums,
    whitened,
    winsorised,
)
from atlas.scaling.solver import Optimum, levenberg_marquardt

_ITERATIONS = 60  # most steps of one descent; 1 to 5 are usual
_LAST_ROUNDS = 60  # at most, with noise and priors held
_FAR = 1.0  # posterior standard deviations: shorter steps arrive by themselves
_AHEAD = 16.0  # times its length, at most, that a step is continued
_WORSE = 2.0  # times the shift before: a continued step that is followed by more is taken back
_DAMPING = 1e-6  # of the first step; much more would hardly move along what the rows leave to the prior
_STEP = 1e-3  # decrement of their descents: one step each, since every round moves the pseudo-observations
_LEAST_INFORMED = 1e-3  # keeps a spread from being divided by nothing
_LEAST_SPREAD = 0.1  # of what a spread is drawn to: below it a hierarchy would pass for equality
_CLOSING = 3.0  # most by which winsorising closes in a round
_RHO_GRID = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.8, 0.9, 0.97)
_RHO_STEPS = (-6, -3, -1, 0, 1, 3, 6)  # places in the grid that one round looks at

# The grid of variable projection: exponents from well below to well above published ones; τ common to all sources.
_START_EXPONENTS = (0.06, 1.2, 10)
_START_TRANSFER = (0.0, 0.15, 0.5)
_START_GUARD = 1e-2  # wide, as in the first rounds
_START_RIDGE = 1e-9  # of least squares for E, A, B, whose columns are nearly one where exponents are small
_START_LEAST = 0.02  # part of the loss that each of E, A, B makes up at least: their logarithms are fitted
_START_VARIANCE = 1e-12  # of log losses, at least


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


class Round(NamedTuple):
    """Where a round of refinement ended."""

    state: State
    linear: Linear  # the law of the rows at the state
    report: Report
    covariance: jax.Array  # [t, p+h, p+h] of every target's law
    precision: Arrow  # of everything


@jax.jit
def refine(
    state: State,
    linear: Linear,
    rows: Rows,
    spreads: Spreads,
    guard: jax.Array,
    judge_runs: jax.Array,
    keep_rho: jax.Array,
    hold: jax.Array,
    tolerance: jax.Array | float,
) -> Round:
    """One round: descend to the mode, then re-estimate noise, weights of runs and variances of the prior.

    Args:
      linear: the law of the rows at the state, under the same guard.
      judge_runs: bool, whether this round updates the runs' weights too (not before the law fits roughly).
      keep_rho: bool, whether to estimate the noise's variance only.
      hold: bool, whether to keep noise, weights and prior: repeated, such rounds end at their exact optimum.
      tolerance: Newton decrement that ends the descent; more to come need not end at the optimum of each.
    """
    end = _descend(state, linear, rows, guard, tolerance)
    matrix, _, linear = end.hessian
    moved = state._replace(x=end.x)

    def judged() -> tuple[Noise, Arrow]:
        raw = rows.log_loss - linear.log_loss
        weight = jnp.where(judge_runs, _run_weights(raw, state.noise, rows), state.noise.run_weight)
        noise = state.noise._replace(run_weight=weight)
        groups = system.groups_of(rows, noise)
        found = sums(winsorised(raw, noise.clip), linear.jacobian, groups)
        noise = _estimate_noise(moved._replace(noise=noise), found, groups, keep_rho)
        _, gradient, hessian = whitened(found, groups, noise.rho)
        return noise, system.system(end.x, gradient, hessian, noise.scale, state.prior)[1]

    noise, matrix = jax.lax.cond(hold, lambda: (state.noise, matrix), judged)
    cov, parts = system.covariance(matrix, len(system.direct_part(end.x, state.prior)))
    deviation = jnp.sqrt(jnp.diagonal(cov, axis1=1, axis2=2)[:, : end.x.own.shape[1]])
    shift = jnp.max(jnp.abs(end.x.own - state.x.own) / deviation)
    prior = jax.tree.map(lambda a, b: jnp.where(hold, a, b), state.prior, _update_prior(moved, parts, spreads))
    report = Report(shift, end.decrement, end.value, end.iterations, system.lowest_z(moved, rows))
    return Round(State(end.x, noise, prior), linear, report, cov, matrix)


class Ahead:
    """Continues the steps of rounds that creep: SQUAREM (Varadhan and Roland 2008) on their fixed point.

    A row beyond the corner pulls as one at the corner, so that a law which is far from it follows by little a round,
    hundreds of times in nearly the same direction. Of every three rounds' steps the length and the change tell how far
    they lead.
    """

    def __init__(self) -> None:
        self._path: list[Coordinates] = []
        self._before: tuple[Coordinates, float] | None = None

    def __call__(self, start: Coordinates, found: Round) -> Coordinates | None:
        """Where the next round starts in place of this one's end; None for that end.

        Args:
          start: where the round `found` began.
        """
        shift = float(found.report.shift)
        if self._before is not None:
            (end, past), self._before, self._path = self._before, None, []
            return end if shift > _WORSE * past else None
        self._path = [*self._path, start] if shift > _FAR else []
        if len(self._path) < 3:
            return None
        path, self._path = [*self._path[1:], found.state.x], []
        deviation = jnp.sqrt(jnp.diagonal(found.covariance, axis1=1, axis2=2)[:, : start.own.shape[1]])
        step, turn = (path[1].own - path[0].own) / deviation, (path[2].own - 2 * path[1].own + path[0].own) / deviation
        length = float(jnp.linalg.norm(step) / jnp.maximum(jnp.linalg.norm(turn), 1e-300))
        if not length > 1.0:
            return None
        self._before = found.state.x, shift
        far = min(length, _AHEAD)
        return jax.tree.map(lambda a, b, c: a + 2.0 * far * (b - a) + far**2 * (c - 2.0 * b + a), *path)


def settle(state: State, linear: Linear, rows: Rows, spreads: Spreads, shift: float) -> Round:
    """The exact optimum with noise, weights of runs and prior held, to a shift in posterior standard deviations.

    Args:
      linear: the law of the rows at the state.
    """
    for _ in range(_LAST_ROUNDS):
        found = refine(state, linear, rows, spreads, laws.GUARD, False, True, True, _STEP)
        state, linear = found.state, found.linear
        if float(found.report.shift) < shift:
            break
    return found


def _descend(state: State, linear: Linear, rows: Rows, guard: jax.Array, tolerance: jax.Array | float) -> Optimum:
    """The posterior mode for fixed pseudo-observations, noise and prior, with its Hessian and the law there."""
    noise, prior = state.noise, state.prior
    observed = linear.log_loss + winsorised(rows.log_loss - linear.log_loss, noise.clip)
    groups = system.groups_of(rows, noise)

    def evaluate(x: Coordinates, linear: Linear):
        found = sums(observed - linear.log_loss, linear.jacobian, groups)
        square, gradient, hessian = whitened(found, groups, noise.rho)
        objective = 0.5 * jnp.sum(square) / noise.scale + system.penalty(x, prior)
        gradient, matrix = system.system(x, gradient, hessian, noise.scale, prior)
        return objective, gradient, (matrix, system.told(hessian, noise.scale, prior), linear)

    def anew(x: Coordinates):
        return evaluate(x, system.linearise(state._replace(x=x), rows, guard))

    def solve(at: tuple[Arrow, Coordinates, Linear], gradient: Coordinates, damping: jax.Array) -> Coordinates:
        # Only what the rows tell bends. To damp the prior too would hold parameters that it ties to one another.
        matrix = damped(at[0], jax.tree.map(lambda told: damping * told, at[1]))
        return factor(matrix).solve(matrix, gradient)

    start = evaluate(state.x, linear)
    return levenberg_marquardt(anew, solve, state.x, _ITERATIONS, tolerance, start, _DAMPING)


def _estimate_noise(state: State, found: Sums, groups: Groups, keep_rho: jax.Array) -> Noise:
    """ρ and σ² of highest Laplace marginal likelihood near the present ρ, the law linearised at its present mode."""
    noise, prior = state.noise, state.prior
    p, h = state.x.own.shape[1], len(system.direct_part(state.x, prior))

    def solve(gradient: jax.Array, hessian: jax.Array, scale: jax.Array) -> Solved:
        slope, matrix = system.system(state.x, gradient, hessian, scale, prior)
        factors = factor(matrix)
        step = factors.solve(matrix, slope)
        moved = jnp.concatenate([step.own, jnp.broadcast_to(step.shared[:h], (len(step.own), h))], -1)
        drop = -2.0 * jnp.sum(moved * gradient) - jnp.einsum("tp,tpk,tk->", moved, hessian, moved)
        x = Coordinates(state.x.own - step.own, state.x.shared - step.shared)
        used = jnp.sum(jnp.trace(factors.solve_blocks(hessian[:, :p, :p] / scale), axis1=1, axis2=2))
        return Solved(drop, system.penalty(x, prior), factors.log_determinant(), used)

    grid = jnp.array(_RHO_GRID)
    place = jnp.argmin(jnp.abs(grid - noise.rho)) + jnp.array(_RHO_STEPS)
    grid = jnp.where(keep_rho, noise.rho, grid[jnp.clip(place, 0, len(grid) - 1)])
    best = estimate(found, groups, solve, grid, noise.variance)
    moved = noise._replace(rho=best.rho, variance=best.variance)
    # Estimated from what clipping left, σ is too small while the law is far from the rows: it must not hold them there.
    return moved._replace(clip=jnp.maximum(moved.corner, noise.clip / _CLOSING))


def _run_weights(residual: jax.Array, noise: Noise, rows: Rows) -> jax.Array:
    """Bisquare weight of every run; see `atlas.scaling.noise.run_weights`."""
    variance = jnp.maximum(noise.variance, HUBER_VARIANCE * (noise.clip / HUBER) ** 2)
    runs = len(noise.run_weight)
    return run_weights(residual, system.groups_of(rows, noise), rows.group_run, runs, variance, noise.rho)


def _update_prior(state: State, parts: Arrow, spreads: Spreads) -> Prior:
    """Empirical-Bayes variances of each group of parameters and of the targets' effects.

    MacKay's fixed point: what the data do not reach has informed = 0 and slows nothing.

    Args:
      parts: blocks⁻¹, coupling and shared covariance, from `system.covariance`.
      spreads: the groups.
    """
    prior, k = state.prior, state.prior.selector.shape[-1]
    reach = parts.border.at[..., parts.border.shape[-1] - k :].add(prior.selector)
    cov = parts.blocks + jnp.einsum("tpq,qk,tlk->tpl", reach, parts.corner, reach)
    # The gap of a parameter is its target's effect, of which the gaps tell, and what it has of its own.
    left = system.effect_spread(prior)
    telling = left[:, None] * prior.effect / prior.variance
    gap = system.gap(state.x, prior)
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
    """Part of a parameter that the rows, not the prior, determine (MacKay's γ), never quite nothing."""
    return jnp.clip(1.0 - variance / prior_variance, _LEAST_INFORMED, 1.0)


def _drawn(square: jax.Array, informed: jax.Array, drawn: jax.Array) -> jax.Array:
    """Variance from a sum of squares over as many informed parameters, with the pseudo-observations."""
    count, spread = drawn[..., 0], drawn[..., 1]
    return jnp.maximum((square + count * spread**2) / (informed + count), (_LEAST_SPREAD * spread) ** 2)


@jax.jit
def start(rows: Rows, tau: jax.Array, lam: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Blocks to descend from, by variable projection: least squares for E, A, B over a grid of the rest.

    Args:
      tau: [t, s] transfer weights to start from, 1 of a target on itself; NaN where a grid is to choose.
      lam: repetition rate to assume.

    Returns:
      [t, p] blocks, and a robust variance of the log residuals they leave.
    """
    exponents, commons = jnp.geomspace(*_START_EXPONENTS), jnp.array(_START_TRANSFER)
    places = map(jnp.arange, (len(exponents), len(exponents), len(commons)))
    grid = jnp.stack(jnp.meshgrid(*places, indexing="ij"), -1).reshape(-1, 3)

    def for_target(known: jax.Array, log_loss: jax.Array, N: jax.Array, D: jax.Array, U: jax.Array, weight: jax.Array):
        relative = weight * jnp.exp(-log_loss)
        transfer = jnp.where(jnp.isnan(known), commons[:, None], known)
        D_eff = laws.effective_tokens(D, U, transfer[:, None], lam, guard=_START_GUARD)
        by_size = relative * N ** -exponents[:, None]
        by_data = relative * D_eff[:, None] ** -exponents[:, None]

        def residual(place: jax.Array) -> tuple[jax.Array, jax.Array]:
            """Relative residuals of the best E, A, B for one point of the grid, and these."""
            alpha, beta, common = place
            design = jnp.stack([relative, by_size[alpha], by_data[common, beta]], -1)
            normal = design.T @ design
            ridge = _START_RIDGE * jnp.diag(jnp.diagonal(normal))
            coefficients = jnp.linalg.solve(normal + ridge, design.T @ weight)
            least = _START_LEAST * jnp.sum(weight) / jnp.maximum(design.T @ weight, 1e-30)
            coefficients = jnp.maximum(coefficients, least)
            return weight - design @ coefficients, coefficients

        scores = jax.lax.map(lambda place: jnp.sum(residual(place)[0] ** 2), grid)
        best = grid[jnp.argmin(jnp.where(jnp.isfinite(scores), scores, jnp.inf))]
        left, coefficients = residual(best)
        alpha, beta, common = best
        e, a, b = jnp.log(coefficients)
        law = jnp.stack([e, a, jnp.log(exponents[alpha]), b, jnp.log(exponents[beta]), jnp.log(lam)])
        return jnp.concatenate([law, transfer[common]]), left

    blocks, residual = jax.vmap(for_target)(tau, rows.log_loss, rows.N, rows.D, rows.U, rows.weight)
    return blocks, jnp.maximum(deviation(residual, rows.weight > 0) ** 2, _START_VARIANCE)
