"""The optimum of joint fits against another optimiser's, and their derivatives against refits."""

import functools
from typing import Any

import jax
import numpy as np
from scipy.optimize import minimize

from atlas.scaling import JointFit, influence

_STEPS = (1e-7, 1e-8)  # of log losses, for finite differences: the longest that carries no row across its corner
_LEFT_OUT = 40  # runs
_AWAY = 3.0  # posterior standard deviations


def derivatives(fit: JointFit, point: dict[str, Any], seed: int) -> dict[str, float]:
    """Agreement with refits, noise and priors held.

    Returns:
      "gradient error": of the derivative of the losses at `point` in a random direction, relative to that of refits;
      "influence correlation": of one-step changes without a run and refits without it, the median over the points;
      "worst influence correlation": the least over the points.
    """
    direction = np.random.default_rng(seed).normal(size=fit.n_rows)
    for step in _STEPS:
        shifts = step * direction, -step * direction
        moved = [influence.refit(fit, shift) for shift in shifts]
        if np.array_equal(*map(functools.partial(_clipped, fit), moved, shifts)):
            break
    numeric = np.subtract(*(np.log(end.predict(**point)[0]) for end in moved)) / (2 * step)
    found = influence.prediction_gradients(fit, **point) @ direction
    names = fit.record.runs.run_ids
    some = np.random.default_rng(seed).permutation(len(names))[:_LEFT_OUT]
    base, refits = np.log(fit.predict(**point)[0]), []
    for run in some:
        weight = np.array(fit.record.state.noise.run_weight)
        weight[run] = 0.0
        refits.append(np.log(influence.refit(fit, run_weight=weight).predict(**point)[0]) - base)
    quick = influence.influence(fit, **point).loc[[names[run] for run in some]].to_numpy()
    agreement = [np.corrcoef(a, b)[0, 1] for a, b in zip(quick.T, np.array(refits).T, strict=True)]
    return {
        "gradient error": float(np.linalg.norm(found - numeric) / np.linalg.norm(numeric)),
        "influence correlation": float(np.median(agreement)),
        "worst influence correlation": float(min(agreement)),
    }


def _clipped(fit: JointFit, moved: JointFit, log_shift: np.ndarray) -> np.ndarray:
    """[n] whether the residual of each row lies beyond the corner of the winsorised score."""
    record = fit.record
    residual = np.log(record.runs.loss) + log_shift - np.log(moved.predict_runs(record.runs)[0])
    return np.abs(residual) > record.state.noise.clip


def objective_gap(fit: JointFit) -> float:
    """|ours − theirs| / theirs: minus the log posterior where the fit ended and where L-BFGS-B ends.

    Noise, priors and pseudo-observations are the fit's; the descent starts a few posterior standard deviations away, in
    coordinates whitened by the fit's precision, without which L-BFGS-B does not arrive.
    """
    with jax.enable_x64(True):
        function, end, precision = influence.objective(fit)
        value = jax.jit(jax.value_and_grad(function))
        factor = np.linalg.cholesky(precision)

        def whitened(z: np.ndarray) -> tuple[float, np.ndarray]:
            found, slope = value(end + np.linalg.solve(factor.T, z))
            # Where a line search leaves the law's domain it has to turn back.
            return (float(found), np.linalg.solve(factor, slope)) if np.isfinite(found) else (1e30, np.zeros_like(z))

        start = np.random.default_rng(0).normal(scale=_AWAY, size=len(end))
        options = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 20}
        theirs = minimize(whitened, start, jac=True, method="L-BFGS-B", options=options).fun
        ours = whitened(np.zeros_like(end))[0]
    return abs(ours - theirs) / theirs
