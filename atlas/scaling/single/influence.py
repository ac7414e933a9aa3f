"""What a fit owes to its data: derivatives through the optimum, influence of runs, profile intervals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from atlas.errors import unknown
from atlas.scaling.estimates import t_quantile
from atlas.scaling.single import estimator as robust
from atlas.scaling.single.bootstrap import refit
from atlas.scaling.single.estimator import Problem
from atlas.scaling.single.fit import Fit
from atlas.scaling.single.specification import Law

_GRID = np.linspace(0.25, 6.0, 24)  # standard errors at which a profile is taken, to either side
_HOLD = 1e6  # precision that holds a profiled parameter, relative to the curvature of its profile


def parameter_gradients(fit: Fit) -> np.ndarray:
    """Derivatives [p, n] of the fitted values by the log losses of the rows (by the losses, of raw residuals).

    By the implicit function theorem at the optimum, with the exact Hessian: what refitting after a small
    change of one loss would show. Fitted values are the logarithms of positive parameters, the others
    themselves. Rows beyond the Huber corner have derivative 0.
    """
    with jax.enable_x64(True):
        by_row, to_fitted = _implicit(fit.model, fit.raw, fit.x, fit.problem, fit.scale)
        return np.asarray(to_fitted @ by_row)[:, : fit.n_rows]


def prediction_gradients(fit: Fit, *columns, **named) -> np.ndarray:
    """Derivatives [m, n] of log losses predicted at m points by the log losses of the n rows."""
    batch = {name: values.ravel() for name, values in fit.batch(*columns, **named).items()}
    with jax.enable_x64(True):
        by_row, _ = _implicit(fit.model, fit.raw, fit.x, fit.problem, fit.scale)
        slope = _log_slope(fit.model, fit.x, fit.problem.centre, batch)
        return np.asarray(slope @ by_row)[:, : fit.n_rows]


def influence(fit: Fit, *columns, exact: bool = True, **named) -> pd.DataFrame:
    """What leaving out each run would change.

    Args:
      fit: of all runs.
      columns, named: where to predict, as for `Fit.predict`; may be left out.
      exact: refits without each run; otherwise one Newton step without it, which is near where the corner is not
        sharp (least squares) and saves time for thousands of runs.

    Returns:
      A row per run, in the order of the table's run ids: the change of every fitted value (the logarithm of
      a positive parameter), and of the log loss at each point (loss, or loss_0, loss_1, …).
    """
    runs = fit.n_runs
    present = np.arange(runs)[:, None] == np.asarray(fit.problem.run)[None, :]
    weight = np.where(present, 0.0, np.asarray(fit.problem.weight)[None, :])
    start = np.broadcast_to(fit.x, (runs, len(fit.x)))
    with jax.enable_x64(True):
        if exact:
            ends, _ = refit(fit, start, weight)
        else:
            ends = np.asarray(_without(fit.model, fit.raw, fit.x, fit.problem, weight, fit.scale))
        change = np.asarray(
            _fitted(fit.model, ends, fit.problem.centre) - _fitted(fit.model, start, fit.problem.centre)
        )
        found = dict(zip(fit.model.names, change.T, strict=True))
        if columns or named:
            batch = {name: values.ravel() for name, values in fit.batch(*columns, **named).items()}
            points = [np.asarray(_log_loss(fit.model, x, fit.problem.centre, batch)) for x in (ends, start)]
            moved = (points[0] - points[1]).T
            names = ["loss"] if len(moved) == 1 else [f"loss_{i}" for i in range(len(moved))]
            found |= dict(zip(names, moved, strict=True))
    return pd.DataFrame(found)


def profile_interval(fit: Fit, name: str, level: float = 0.9) -> tuple[float, float]:
    """Interval of a parameter by profile likelihood: where the best fit with it held gets as much worse as noise does.

    Follows the curvature of the objective where a normal interval takes it to be constant. The noise is
    scaled as in the standard errors: correlation within runs and the corner of the objective included.

    Returns:
      Low and high; infinite (0 for a positive parameter's low) where the objective never gets that much worse.
    """
    if name not in fit.model.names:
        raise unknown(f"parameter of the {fit.law} law", name, fit.model.names)
    j = fit.model.names.index(name)
    parameter, se = fit.model.parameters[j], float(np.sqrt(fit.covariance[j, j]))
    with jax.enable_x64(True):
        centre = float(_fitted(fit.model, fit.x[None], fit.problem.centre)[0, j])
        values = centre + se * np.concatenate([-_GRID[::-1], _GRID])
        rise = np.asarray(_profile(fit.model, fit.raw, fit.x, fit.covariance_x, fit.problem, fit.scale, j, values))
        inverse = np.asarray(_inverse_curvature(fit.model, fit.raw, fit.x, fit.problem, fit.scale))
    # The unit of noise is what makes the profile's curvature agree with the standard error.
    distance = np.sqrt(2.0 * np.maximum(rise, 0.0) * inverse[j] / se**2)
    reach = t_quantile(0.5 + 0.5 * level, fit.freedom)
    half = len(_GRID)
    low = _crossing(distance[:half][::-1], reach)
    high = _crossing(distance[half:], reach)
    low, high = centre - se * low, centre + se * high
    return (float(np.exp(low)), float(np.exp(high))) if parameter.positive else (low, high)


def _crossing(distance: np.ndarray, reach: float) -> float:
    """Standard errors at which the distance first exceeds the reach; infinite if nowhere on the grid."""
    beyond = np.flatnonzero(distance >= reach)
    if not len(beyond):
        return np.inf
    i = beyond[0]
    before = (0.0, 0.0) if i == 0 else (_GRID[i - 1], distance[i - 1])
    return before[0] + (reach - before[1]) / (distance[i] - before[1]) * (_GRID[i] - before[0])


@partial(jax.jit, static_argnames=("law", "raw"))
def _profile(law: Law, raw: bool, x, covariance, problem: Problem, scale, j, values):
    """Rise [v] of the penalised objective at the best fit with fitted value j held at each of `values`."""
    direction = jax.jacfwd(lambda x: law.fitted(x, problem.centre))(x)[j]
    variance = direction @ covariance @ direction
    step = covariance @ direction / variance
    here, least = law.fitted(x, problem.centre)[j], robust.penalised(law, raw, x, problem, scale)
    hold = _HOLD * robust.prior_scale(law, raw, x, problem) / variance
    unit = jnp.zeros(len(x)).at[j].set(1.0)

    def at(value: jax.Array) -> jax.Array:
        # Holding is a very sharp prior; combined with the law's own it stays one normal prior.
        own = scale * problem.precision
        precision = own + hold * jnp.outer(unit, unit)
        mean = jnp.linalg.solve(precision + 1e-12 * hold * jnp.eye(len(x)), own @ problem.mean + hold * value * unit)
        held = problem._replace(mean=mean, precision=precision)
        end = robust.descend(law, raw, x + step * (value - here), held, 1.0)
        return robust.penalised(law, raw, end.x, problem, scale) - least

    return jax.vmap(at)(values)


@partial(jax.jit, static_argnames=("law", "raw"))
def _inverse_curvature(law: Law, raw: bool, x, problem: Problem, scale):
    """[p] diagonal of the inverse curvature in the fitted values."""
    to_fitted = jax.jacfwd(lambda x: law.fitted(x, problem.centre))(x)
    return jnp.diagonal(to_fitted @ jnp.linalg.solve(robust.curvature(law, raw, x, problem, scale), to_fitted.T))


@partial(jax.jit, static_argnames=("law", "raw"))
def _implicit(law: Law, raw: bool, x, problem: Problem, scale):
    """Derivatives of the coordinates by the responses [p, n], and of the fitted values by the coordinates [p, p]."""
    jacobian = jax.jacfwd(lambda x: robust.residuals(law, raw, x, problem))(x)
    inside = problem.weight * (jnp.abs(robust.residuals(law, raw, x, problem)) <= problem.corner)
    hessian = jax.hessian(lambda x: robust.penalised(law, raw, x, problem, scale))(x)
    # The gradient is Σ ψ(r)·∂r/∂x, so its derivative by a response is that row's ψ'(r)·∂r/∂x.
    by_row = -jnp.linalg.solve(hessian, (inside[:, None] * jacobian).T)
    return by_row, jax.jacfwd(lambda x: law.fitted(x, problem.centre))(x)


@partial(jax.jit, static_argnames=("law", "raw"))
def _without(law: Law, raw: bool, x, problem: Problem, weight, scale):
    """Coordinates [r, p] after one Newton step under each of the weights [r, n]."""

    def step(weight: jax.Array) -> jax.Array:
        own = problem._replace(weight=weight)
        gradient = jax.grad(lambda x: robust.penalised(law, raw, x, own, scale))(x)
        return x - jnp.linalg.solve(robust.curvature(law, raw, x, own, scale), gradient)

    return jax.lax.map(step, weight, batch_size=64)


@partial(jax.jit, static_argnames="law")
def _fitted(law: Law, x, centre):
    return jax.vmap(lambda x: law.fitted(x, centre))(jnp.asarray(x))


@partial(jax.jit, static_argnames="law")
def _log_loss(law: Law, x, centre, batch):
    return jax.vmap(lambda x: jnp.log(law.predict(x, centre, batch)))(jnp.asarray(x))


@partial(jax.jit, static_argnames="law")
def _log_slope(law: Law, x, centre, batch):
    return jax.jacfwd(lambda x: jnp.log(law.predict(x, centre, batch)))(jnp.asarray(x))
