"""Bootstrap of a fit: the runs drawn again and again, the law fitted to each draw from the optimum of all."""

import dataclasses
from functools import partial

import jax
import numpy as np

from atlas.errors import UserError, unknown
from atlas.scaling.padding import padded
from atlas.scaling.single import estimator as robust
from atlas.scaling.single.estimator import Problem
from atlas.scaling.single.fit import Fit
from atlas.scaling.single.specification import Law

_LANES = 64  # resamples descended at once
_ROUND = 6  # steps after which those that arrived make room for others


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """Parameters of resampled fits.

    Attributes:
      names: of the parameters.
      values: [B, p] parameters, float64.
      coordinates: [B, p] where each descent ended.
      converged: fraction of the resamples whose gradient vanished.
    """

    names: tuple[str, ...]
    values: np.ndarray
    coordinates: np.ndarray
    converged: float

    @property
    def se(self) -> dict[str, float]:
        """Standard deviation of each parameter over the resamples."""
        return dict(zip(self.names, np.std(self.values, axis=0, ddof=1).tolist(), strict=True))

    def interval(self, level: float = 0.9) -> dict[str, tuple[float, float]]:
        """Percentile interval of each parameter."""
        low, high = np.quantile(self.values, [0.5 - 0.5 * level, 0.5 + 0.5 * level], axis=0)
        return {name: (float(a), float(b)) for name, a, b in zip(self.names, low, high, strict=True)}

    def predict(self, fit: Fit, *columns, **named) -> np.ndarray:
        """Losses [B, …] of every resampled law at columns of the law."""
        batch = fit.batch(*columns, **named)
        with jax.enable_x64(True):
            return np.asarray(_losses(fit.model, self.coordinates, fit.problem.centre, batch))


def bootstrap(fit: Fit, count: int = 1000, *, seed: int = 0, by: str = "run") -> Bootstrap:
    """Fits the law again to `count` resamples of the runs, or of the rows.

    Rows of a run are alike, so resampling rows of a table with checkpoints understates the uncertainty; in a
    table with one row a run both are the same. Draws follow numpy's legacy generator, as the published
    bootstrap of the 240 Chinchilla points does (arXiv 2404.10102, seed 42).

    Args:
      fit: of all runs.
      count: number of resamples B, 2 or more.
      seed: of the draws.
      by: "run" or "row".
    """
    if count < 2:
        raise UserError(f"a bootstrap needs 2 resamples or more, got {count}; 1000 are usual")
    if by not in ("run", "row"):
        raise unknown("unit to resample", by, ("run", "row"))
    units = fit.problem.run[: fit.n_rows] if by == "run" else np.arange(fit.n_rows)
    present = int(units.max()) + 1
    random = np.random.RandomState(seed)
    draws = np.stack([np.bincount(random.choice(present, present), minlength=present) for _ in range(count)])
    weights = padded((draws[:, units].T).astype(float), len(fit.problem.weight), 0.0).T
    ends, arrived = refit(fit, np.broadcast_to(fit.x, (count, len(fit.x))), weights)
    with jax.enable_x64(True):
        natural = np.asarray(_natural(fit.model, ends, fit.problem.centre))
    return Bootstrap(fit.model.names, natural, ends, float(np.mean(arrived)))


def refit(fit: Fit, x: np.ndarray, weight: np.ndarray, response: np.ndarray | None = None):
    """Descends from x [B, p] under other weights, or other responses, of the rows [B, n].

    Lanes that arrive make room for others, so that no resample waits for the slowest.

    Returns:
      Coordinates [B, p] and whether each gradient vanished [B].
    """
    x, done = np.array(x), np.zeros(len(x), bool)
    response = np.broadcast_to(fit.problem.response, weight.shape) if response is None else response
    for _ in range(20):
        waiting = np.flatnonzero(~done)
        for first in range(0, len(waiting), _LANES):
            some = waiting[first : first + _LANES]
            lanes = np.resize(some, _LANES)
            with jax.enable_x64(True):
                end, arrived = _round(
                    fit.model, fit.raw, x[lanes], fit.problem, weight[lanes], response[lanes], fit.scale
                )
            x[some], done[some] = np.asarray(end)[: len(some)], np.asarray(arrived)[: len(some)]
        if done.all():
            break
    return x, done


@partial(jax.jit, static_argnames=("law", "raw"))
def _round(law: Law, raw: bool, x, problem: Problem, weight, response, scale):
    def lane(x, weight, response):
        own = problem._replace(weight=weight, response=response)
        end = robust.descend(law, raw, x, own, scale, steps=_ROUND)
        return end.x, end.decrement <= robust.OPTIMAL * end.value

    return jax.vmap(lane)(x, weight, response)


@partial(jax.jit, static_argnames="law")
def _natural(law: Law, x: jax.Array, centre: dict) -> jax.Array:
    def one(x: jax.Array) -> jax.Array:
        return jax.numpy.stack(list(law.natural(law.fitted(x, centre)).values()))

    return jax.vmap(one)(x)


@partial(jax.jit, static_argnames="law")
def _losses(law: Law, x: jax.Array, centre: dict, batch: dict) -> jax.Array:
    return jax.vmap(lambda x: law.predict(x, centre, batch))(x)
