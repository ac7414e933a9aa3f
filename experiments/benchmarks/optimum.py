"""The optimum of joint fits against another optimiser's, and their derivatives against refits."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atlas.scaling import JointFit
from atlas.scaling.joint import rounds as refinement
from atlas.scaling.joint import system as posterior
from atlas.scaling.joint.fit import Record, rows_by_target
from atlas.scaling.joint.influence import influence, prediction_gradients
from atlas.scaling.joint.prior import joint_prior
from atlas.scaling.simulation import Truth
from atlas.scaling.solver import Arrow, Coordinates

_STEPS = (1e-7, 1e-8)  # of log losses, for finite differences: the longest that carries no row across its corner
_LEFT_OUT = 40  # runs
_AWAY = 3.0  # posterior standard deviations
_SETTLED = 1e-11  # shift in posterior standard deviations


class Problem(NamedTuple):
    """A fit's rows, and what it kept fixed at its optimum."""

    fit: JointFit
    rows: posterior.Rows
    spreads: refinement.Spreads


def problem(fit: JointFit, law: Truth) -> Problem:
    runs = fit.record.runs
    spreads = joint_prior(runs, law.families, None, "targets", "target", True)[1]
    return Problem(fit, rows_by_target(runs, fit.N0, fit.D0), spreads)


def refit(
    solved: Problem,
    log_shift: np.ndarray | float = 0.0,
    run_weight: np.ndarray | None = None,
    settled: float = _SETTLED,
) -> JointFit:
    """The fit with its noise and priors, after its log losses moved by [n] or its runs' weights changed.

    Args:
      settled: shift of a round, in posterior standard deviations, that ends the descent.
    """
    fit, state = solved.fit, solved.fit.record.state
    if run_weight is not None:
        state = state._replace(noise=state.noise._replace(run_weight=run_weight))
    rows = solved.rows
    if np.any(log_shift):
        runs = dataclasses.replace(fit.record.runs, loss=fit.record.runs.loss * np.exp(log_shift))
        rows = rows_by_target(runs, fit.N0, fit.D0)
    with jax.enable_x64(True):
        linear = posterior.linearise(state, rows, fit.guard)
        state = refinement.settle(state, linear, rows, solved.spreads, fit.guard, settled).state
        direct = np.asarray(posterior.direct_part(state.x, state.prior))
        return dataclasses.replace(fit, theta=np.asarray(state.x.own), phi=float(direct[posterior.PHI]))


def derivatives(solved: Problem, point: dict[str, Any], seed: int) -> dict[str, float]:
    """Agreement with refits, noise and priors held.

    Returns:
      "gradient error": of the derivative of the losses at `point` in a random direction, relative to that of refits;
      "influence correlation": of one-step changes without a run and refits without it, the median over the points;
      "worst influence correlation": the least over the points.
    """
    fit = solved.fit
    direction = np.random.default_rng(seed).normal(size=fit.n_rows)
    for step in _STEPS:
        shifts = step * direction, -step * direction
        moved = [refit(solved, shift) for shift in shifts]
        if np.array_equal(*map(functools.partial(_clipped, fit.record), moved, shifts)):
            break
    numeric = np.subtract(*(np.log(end.predict(**point)[0]) for end in moved)) / (2 * step)
    found = prediction_gradients(fit, **point) @ direction
    names = fit.record.runs.run_ids
    some = np.random.default_rng(seed).permutation(len(names))[:_LEFT_OUT]
    base, refits = np.log(fit.predict(**point)[0]), []
    for run in some:
        weight = np.array(fit.record.state.noise.run_weight)
        weight[run] = 0.0
        refits.append(np.log(refit(solved, run_weight=weight).predict(**point)[0]) - base)
    quick = influence(fit, **point).loc[[names[run] for run in some]].to_numpy()
    agreement = [np.corrcoef(a, b)[0, 1] for a, b in zip(quick.T, np.array(refits).T, strict=True)]
    return {
        "gradient error": float(np.linalg.norm(found - numeric) / np.linalg.norm(numeric)),
        "influence correlation": float(np.median(agreement)),
        "worst influence correlation": float(min(agreement)),
    }


def _clipped(record: Record, moved: JointFit, log_shift: np.ndarray) -> np.ndarray:
    """[n] whether the residual of each row lies beyond the corner of the winsorised score."""
    residual = np.log(record.runs.loss) + log_shift - np.log(moved.predict_runs(record.runs)[0])
    return np.abs(residual) > record.state.noise.clip


def objective_gap(solved: Problem, minimize: Callable[..., Any]) -> float:
    """|ours − theirs| / theirs: minus the log posterior where the fit ended and where L-BFGS-B ends.

    Noise, priors and pseudo-observations are the fit's; the descent starts a few posterior standard deviations away, in
    coordinates whitened by the fit's precision, without which L-BFGS-B does not arrive.
    """
    fit, rows = solved.fit, solved.rows
    state = fit.record.state
    with jax.enable_x64(True):
        value = jax.jit(jax.value_and_grad(_minus_log_posterior(state, rows, fit.guard)))
        end = np.concatenate([np.ravel(state.x.own), state.x.shared])
        factor = np.linalg.cholesky(_dense(fit.record.precision))

        def whitened(z: np.ndarray) -> tuple[float, np.ndarray]:
            found, slope = value(end + np.linalg.solve(factor.T, z))
            # Where a line search leaves the law's domain it has to turn back.
            return (float(found), np.linalg.solve(factor, slope)) if np.isfinite(found) else (1e30, np.zeros_like(z))

        start = np.random.default_rng(0).normal(scale=_AWAY, size=len(end))
        options = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 20}
        theirs = minimize(whitened, start, jac=True, method="L-BFGS-B", options=options).fun
        ours = whitened(np.zeros_like(end))[0]
    return abs(ours - theirs) / theirs


def _minus_log_posterior(
    state: posterior.State, rows: posterior.Rows, guard: float
) -> Callable[[jax.Array], jax.Array]:
    noise = state.noise
    predicted = posterior.predictions(state, rows, guard)
    observed = predicted + posterior.winsorised(rows.log_loss - predicted, noise)
    group_weight, weight = posterior.row_weights(noise, rows)
    shrink = group_weight * posterior.shrinkage(rows.group_size, noise.rho)

    def value(flat: jax.Array) -> jax.Array:
        x = Coordinates(flat[: state.x.own.size].reshape(state.x.own.shape), flat[state.x.own.size :])
        residual = observed - posterior.predictions(state._replace(x=x), rows, guard)
        square = jnp.sum(weight * residual**2)
        square = square - jnp.sum(shrink * posterior.by_group(rows.weight * residual, rows) ** 2)
        return 0.5 * square / noise.scale + posterior.penalty(x, state.prior)

    return value


def _dense(matrix: Arrow) -> np.ndarray:
    t, p, q = matrix.border.shape
    found = np.zeros((t * p + q, t * p + q))
    for i in range(t):
        block = slice(i * p, (i + 1) * p)
        found[block, block], found[block, t * p :] = matrix.blocks[i], matrix.border[i]
        found[t * p :, block] = matrix.border[i].T
    found[t * p :, t * p :] = matrix.corner
    return found
