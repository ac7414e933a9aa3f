"""Bootstrap of a fit: the runs drawn again and again, the law fitted to each draw from the optimum of all."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from atlas.scaling.padding import padded
from atlas.scaling.single import estimator
from atlas.scaling.single.estimator import Problem
from atlas.scaling.single.fitted import Fit
from atlas.scaling.single.specification import Law
from checked import UserError

_LANES = 64  # resamples descended at once
_STEPS = 6  # of a round, after which those that arrived make room for others; most need no second
_ROUNDS = 20  # at most: 120 steps, as a single fit may take 100


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """Parameters of resampled fits.

    Attributes:
      names: of the parameters.
      values: [B, p] parameters, float64.
      converged: fraction of the resamples whose gradient vanished.
    """

    names: tuple[str, ...]
    values: np.ndarray
    converged: float

    @property
    def se(self) -> dict[str, float]:
        """Standard deviation of each parameter over the resamples."""
        return dict(zip(self.names, np.std(self.values, axis=0, ddof=1).tolist(), strict=True))

    def interval(self) -> dict[str, tuple[float, float]]:
        """90 % percentile interval of each parameter."""
        low, high = np.quantile(self.values, [0.05, 0.95], axis=0).tolist()
        return dict(zip(self.names, zip(low, high, strict=True), strict=True))


def check_count(count: int) -> None:
    """Raises UserError for too few resamples."""
    if count < 2:
        raise UserError(f"a bootstrap needs 2 resamples or more, got {count}; 1000 are usual")


def bootstrap(fit: Fit, count: int = 1000, *, seed: int = 0) -> Bootstrap:
    """Fits the law again to `count` resamples of the runs.

    Rows of a run are alike, so resampling rows would understate the uncertainty of a table with checkpoints. Draws
    follow numpy's legacy generator, as the published bootstrap of the 240 Chinchilla points does (arXiv 2404.10102,
    seed 42).

    Args:
      fit: of all runs.
      count: number of resamples B, 2 or more.
      seed: of the draws.

    Raises:
      UserError: fewer than 2 resamples, or runs.
    """
    check_count(count)
    if not len(fit.problem.weight):
        raise UserError("a fit that was read from JSON has no runs to resample; fit them again")
    if fit.n_runs < 2:
        raise UserError("a bootstrap draws runs, and there is one: it would tell no error")
    runs, random = fit.n_runs, np.random.RandomState(seed)
    draws = np.stack([np.bincount(random.choice(runs, runs), minlength=runs) for _ in range(count)])
    weights = padded((draws[:, fit.problem.run[: fit.n_rows]].T).astype(float), len(fit.problem.weight), 0.0).T
    ends, arrived = _refit(fit, weights)
    with jax.enable_x64(True):
        values = np.asarray(_natural(fit.model, ends, fit.problem.centre))
    return Bootstrap(fit.model.names, values, float(np.mean(arrived)))


def _refit(fit: Fit, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Descends from the optimum of all under other weights of the rows [B, n].

    Lanes that arrive make room for others, so that no resample waits for the slowest.

    Returns:
      Coordinates [B, p] and whether each gradient vanished [B].
    """
    x, done = np.tile(fit.x, (len(weight), 1)), np.zeros(len(weight), bool)
    for _ in range(_ROUNDS):
        waiting = np.flatnonzero(~done)
        for first in range(0, len(waiting), _LANES):
            some = waiting[first : first + _LANES]
            lanes = np.resize(some, _LANES)
            with jax.enable_x64(True):
                end, arrived = _round(fit.model, x[lanes], fit.problem, weight[lanes], fit.scale)
            x[some], done[some] = np.asarray(end)[: len(some)], np.asarray(arrived)[: len(some)]
        if done.all():
            break
    return x, done


@partial(jax.jit, static_argnames="law")
def _round(law: Law, x, problem: Problem, weight, scale):
    def lane(x, weight):
        end = estimator.descend(law, x, problem._replace(weight=weight), scale, steps=_STEPS)
        return end.x, estimator.is_optimum(end)

    return jax.vmap(lane)(x, weight)


@partial(jax.jit, static_argnames="law")
def _natural(law: Law, x: jax.Array, centre: dict) -> jax.Array:
    return jax.vmap(lambda x: jnp.stack([*law.natural(law.fitted(x, centre)).values()]))(x)
