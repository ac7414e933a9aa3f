"""What a fit owes to its data: derivatives through the optimum, and the influence of runs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from atlas.scaling.single import estimator
from atlas.scaling.single.bootstrap import fitted_values, losses_of, refit
from atlas.scaling.single.estimator import Problem
from atlas.scaling.single.fit import Fit
from atlas.scaling.single.specification import Law


def parameter_gradients(fit: Fit) -> np.ndarray:
    """Derivatives [p, n] of the fitted values by the log losses of the rows (by the losses, of raw residuals).

    By the implicit function theorem at the optimum, with the exact Hessian: what refitting after a small
    change of one loss would show. Fitted values are the logarithms of positive parameters, the others
    themselves. Rows beyond the Huber corner have derivative 0.
    """
    with jax.enable_x64(True):
        by_row, to_fitted, _ = _implicit(fit.model, fit.raw, fit.x, fit.problem, fit.scale, {})
        return np.asarray(to_fitted @ by_row)[:, : fit.n_rows]


def prediction_gradients(fit: Fit, *columns, **named) -> np.ndarray:
    """Derivatives [m, n] of log losses predicted at m points by the log losses of the n rows."""
    batch = {name: values.ravel() for name, values in fit.batch(*columns, **named).items()}
    with jax.enable_x64(True):
        by_row, _, slope = _implicit(fit.model, fit.raw, fit.x, fit.problem, fit.scale, batch)
        return np.asarray(slope @ by_row)[:, : fit.n_rows]


def influence(fit: Fit, *columns, **named) -> pd.DataFrame:
    """What leaving out each run would change, by refitting without it.

    Args:
      fit: of all runs.
      columns, named: where to predict, as for `Fit.predict`.

    Returns:
      A row per run, in the order of the table's run ids: the change of every fitted value (the logarithm of
      a positive parameter), and of the log loss at each point (loss, or loss_0, loss_1, …).
    """
    present = np.arange(fit.n_runs)[:, None] == np.asarray(fit.problem.run)[None, :]
    weight = np.where(present, 0.0, np.asarray(fit.problem.weight)[None, :])
    ends, _ = refit(fit, np.broadcast_to(fit.x, (fit.n_runs, len(fit.x))), weight)
    batch = {name: values.ravel() for name, values in fit.batch(*columns, **named).items()}
    change = fitted_values(fit, ends) - fitted_values(fit, fit.x[None])
    moved = np.log(losses_of(fit, ends, batch) / losses_of(fit, fit.x[None], batch))
    points = ["loss"] if moved.shape[1] == 1 else [f"loss_{i}" for i in range(moved.shape[1])]
    return pd.DataFrame(np.hstack([change, moved]), columns=[*fit.model.names, *points])


@partial(jax.jit, static_argnames=("law", "raw"))
def _implicit(law: Law, raw: bool, x: jax.Array, problem: Problem, scale: jax.Array, batch: dict):
    """Derivatives of the coordinates by the responses [p, n], and by the coordinates of the fitted values [p, p] and of
    the log losses of a batch [m, p]."""
    jacobian = jax.jacfwd(lambda x: estimator.residuals(law, raw, x, problem))(x)
    inside = problem.weight * (jnp.abs(estimator.residuals(law, raw, x, problem)) <= problem.corner)
    hessian = jax.hessian(lambda x: estimator.penalised(law, raw, x, problem, scale))(x)
    # The gradient is Σ ψ(r)·∂r/∂x, so its derivative by a response is that row's ψ'(r)·∂r/∂x.
    by_row = -jnp.linalg.solve(hessian, (inside[:, None] * jacobian).T)
    slope = jax.jacfwd(lambda x: jnp.log(law.predict(x, problem.centre, batch)))(x) if batch else None
    return by_row, jax.jacfwd(lambda x: law.fitted(x, problem.centre))(x), slope
