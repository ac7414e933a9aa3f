"""A fitted law of one loss: what it says, how far to trust it, its predictions, and its way to JSON and back."""

import dataclasses
import functools
from collections.abc import Mapping
from functools import partial

import jax
import numpy as np

from atlas.scaling.estimates import Estimate, document, finite, quantile95
from atlas.scaling.padding import bucket, padded
from atlas.scaling.single import estimator
from atlas.scaling.single.estimator import Problem
from atlas.scaling.single.library import law_named
from atlas.scaling.single.specification import Law
from atlas.scaling.table.runs import Runs
from checked import UserError, unknown


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """How far to trust a fit.

    Attributes:
      decrement: gᵀH⁻¹g over the objective at the optimum, twice the relative gain that a further step promises.
      condition: of the curvature at the optimum, in centred coordinates.
      sigma: standard deviation of a row's log loss (or loss, where residuals are raw) around the law, by the median of
        the residuals but for the smallest, as many as parameters.
      correlation: of residuals within a run.
      independent_rows: how many independent rows would tell as much.
      r2, are: coefficient of determination of the losses and mean absolute relative error (of raw residuals: mean
        absolute error over mean absolute loss), in sample.
    """

    decrement: float
    condition: float
    sigma: float
    correlation: float
    independent_rows: float
    r2: float
    are: float


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
      law: its name.
      parameters: name -> estimate, with 90 % intervals and the verdict whether the runs determine it.
      objective: sum over rows of the Huber loss of the residuals: of "least_squares" half their squares, of "lad" 1e-5
        of their sizes, the corner that stands for it.
      converged: whether the gradient vanishes at the optimum and the curvature is positive there.
      starts_agreeing: fraction of the starts that reached it within 1e-6 of its value.
      covariance: [p, p] of the fitted values: the logarithms of positive parameters, the others themselves.
      freedom: degrees of freedom of the intervals: independent rows less parameters.
      tokens: "total" or "own", which tokens D means in a multilingual table.
      unit: of the losses, as the table names it; "" where it does not.
      language: that the rows evaluate.
      warnings: what the runs cannot tell, and what was left out while reading.
      diagnostics: residual scale, curvature, in-sample scores.
      fitted: [p] fitted values.
      model, problem, x, scale: what was solved and where, for `bootstrap`; without rows in a fit read from JSON.
      apart: [n_rows] 1 for rows whose prediction by those at 0 tells the misfit, -1 for others.
      missed: the misfit where it is known already.
      warm_up: the part of each run that was left out.
    """

    law: str
    parameters: dict[str, Estimate]
    objective: float
    converged: bool
    starts_agreeing: float
    covariance: np.ndarray
    freedom: float
    tokens: str
    unit: str
    language: str
    n_rows: int
    n_runs: int
    warnings: tuple[str, ...]
    diagnostics: Diagnostics
    fitted: np.ndarray = dataclasses.field(repr=False)
    model: Law = dataclasses.field(repr=False)
    problem: Problem = dataclasses.field(repr=False)
    x: np.ndarray = dataclasses.field(repr=False)
    scale: float = dataclasses.field(repr=False)
    apart: np.ndarray = dataclasses.field(repr=False)
    missed: float | None = None
    warm_up: float = 0.0

    @functools.cached_property
    def misfit(self) -> float:
        """By how much a fit of the smaller runs misses the largest, beyond a row's noise; 0 where nothing tells.

        Root mean square, in log loss (or loss, where residuals are raw).
        """
        if self.missed is not None or not np.any(self.apart > 0):
            return self.missed or 0.0
        known = padded(self.apart == 0, len(self.problem.weight), False)
        smaller = self.problem._replace(weight=self.problem.weight * known)
        with jax.enable_x64(True):
            if self.n_rows > estimator.SAMPLE:
                found = estimator.polish(self.model, estimator.near(self.x), smaller, np.float64(self.scale))
            else:
                found = estimator.solve(self.model, smaller)
            # Compiled already, unlike residuals by themselves.
            predicted = estimator.spread(self.model, found.x, smaller, found.scale).predicted
            error = (self.problem.observed - np.asarray(self.model.observed(predicted)))[: self.n_rows][self.apart > 0]
        excess = float(np.mean(error**2)) - self.diagnostics.sigma**2
        return float(np.sqrt(max(excess, 0.0))) if np.isfinite(excess) else 0.0

    @property
    def values(self) -> dict[str, float]:
        """Parameters by name."""
        return {name: estimate.value for name, estimate in self.parameters.items()}

    def predict(self, *columns, **named) -> tuple[np.ndarray, np.ndarray]:
        """Loss and its standard deviation for columns of the law (broadcast), by position or by name.

        Chinchilla's are N parameters and D tokens; the data-constrained law adds U unique tokens, infinite
        where left out.

        Returns:
          Two float64 arrays, in the unit of the fitted losses; the deviation is that of the law, without a
          run's noise.

        Raises:
          UserError: a column is missing, unknown or too many.
        """
        batch = self.batch(*columns, **named)
        shape = next(iter(batch.values())).shape
        loss, slope = loss_and_slope(self.model, self.fitted, {name: values.ravel() for name, values in batch.items()})
        deviation = np.sqrt(np.maximum(np.einsum("np,pk,nk->n", slope, self.covariance, slope), 0.0))
        return loss.reshape(shape), deviation.reshape(shape)

    def interval(self, *columns, **named) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of the 90 % interval of the law's loss, without a run's noise; columns as for `predict`."""
        return self._bounds(*self.predict(*columns, **named), 0.0)

    def run_interval(self, *columns, **named) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of the 90 % interval of a new run's loss: of the law, with a row's noise and the law's misfit."""
        noise = np.hypot(self.diagnostics.sigma, self.misfit)
        return self._bounds(*self.predict(*columns, **named), noise)

    def _bounds(self, loss: np.ndarray, deviation: np.ndarray, noise: float) -> tuple[np.ndarray, np.ndarray]:
        raw = self.model.residual == "raw"
        reach = quantile95(self.freedom) * np.hypot(deviation / (1.0 if raw else loss), noise)
        return (loss - reach, loss + reach) if raw else (loss * np.exp(-reach), loss * np.exp(reach))

    @property
    def column_names(self) -> tuple[str, ...]:
        """What `predict` takes."""
        return tuple(column.name for column in self.model.columns)

    def batch(self, *columns, **named) -> dict[str, np.ndarray]:
        """The law's columns as float64 arrays of one shape."""
        wanted = self.model.columns
        given = dict(zip((column.name for column in wanted), columns, strict=False)) | named
        if len(columns) > len(wanted) and any(np.any(np.isfinite(extra)) for extra in columns[len(wanted) :]):
            raise UserError(f"the {self.law} law takes {len(wanted)} columns, got {len(columns)}")
        for name in named:
            if name not in {column.name for column in wanted}:
                raise unknown(f"column of the {self.law} law", name, [column.name for column in wanted])
        missing = [c.name for c in wanted if c.name not in given and c.default is None]
        if missing:
            how = f"give it by name (plan predict: --at={missing[0]}:…)"
            raise UserError(f"the {self.law} law needs {', '.join(missing)} to predict; {how}")
        found = [np.asarray(given.get(column.name, column.default), float) for column in wanted]
        return {c.name: a for c, a in zip(wanted, np.broadcast_arrays(*found), strict=True)}

    def predict_runs(self, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
        """`predict` for every row of a table, with the same meaning of D as in the fit."""
        return self.predict(**columns_of(self.model, runs, self.tokens))

    def to_json(self, holdout: Mapping | None = None) -> dict:
        """The fit as plain values, ready for json.dumps, with the covariance from which plans draw laws."""
        coordinates = [f"log {p.name}" if p.positive else p.name for p in self.model.parameters]
        centre = {c.name: self.problem.centre[c.name] for c in self.model.columns if c.name in self.problem.centre}
        covariance = {"coordinates": coordinates, "matrix": self.covariance.tolist(), "centre": centre}
        diagnostics = dataclasses.asdict(self.diagnostics) | {
            "misfit": self.misfit,
            "starts_agreeing": self.starts_agreeing,
        }
        extra = {"diagnostics": diagnostics, "covariance": covariance | {"freedom": self.freedom}}
        reading = {
            "tokens": self.tokens,
            "residual": self.model.residual,
            "loss_unit": self.unit,
            "language": self.language,
            "warm_up": self.warm_up,
        }
        return document(self.law, self, holdout) | finite(extra | {"reading": reading})

    @classmethod
    def from_json(cls, plain: Mapping) -> "Fit":
        """The fit that `to_json` wrote, as far as predictions need it: it has no rows to resample.

        Raises:
          UserError: it is of no such fit, or a number is missing or not finite.
        """
        try:
            model = residual_of(law_named(plain["law"]), plain["reading"]["residual"])
            estimates = {name: Estimate(**plain["parameters"][name]) for name in model.names}
            value = np.array([estimate.value for estimate in estimates.values()], float)
            covariance = np.array(plain["covariance"]["matrix"], float)
            diagnostics = dict(plain["diagnostics"])
            agreeing, missed = diagnostics.pop("starts_agreeing"), float(diagnostics.pop("misfit"))
            diagnostics = {name: np.nan if x is None else float(x) for name, x in diagnostics.items()}
            centre = plain["covariance"]["centre"]
            positive = [p.positive for p in model.parameters]
            known = {name: plain[name] for name in ("law", "objective", "converged", "n_rows", "n_runs")}
            fit = cls(
                **known,
                **{name: plain["reading"][key] for name, key in (("tokens", "tokens"), ("unit", "loss_unit"))},
                parameters=estimates,
                language=plain["reading"].get("language", ""),
                starts_agreeing=agreeing,
                covariance=covariance,
                freedom=float(plain["covariance"]["freedom"]),
                warnings=tuple(plain["warnings"]),
                diagnostics=Diagnostics(**diagnostics),
                fitted=np.log(value, where=positive, out=value.copy()),
                model=model,
                problem=_no_rows(centre),
                x=np.full(len(value), np.nan),
                scale=float("nan"),
                apart=np.zeros(0, int),
                missed=missed,
                warm_up=float(plain["reading"].get("warm_up") or 0.0),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"this is no fit of one law: {type(error).__name__} {error}; fit its runs again") from None
        noise = (fit.diagnostics.sigma, missed)
        numbers = np.isfinite(fit.fitted).all() and np.isfinite(covariance).all() and np.isfinite(noise).all()
        if covariance.shape != 2 * (len(value),) or not (numbers and 1.0 <= fit.freedom < np.inf):
            raise UserError(
                "the fit's parameters, covariance, freedom or noise are not finite numbers; fit its runs again"
            )
        return fit


def columns_of(law: Law, runs: Runs, tokens: str) -> dict[str, np.ndarray]:
    """The batch [n] of a law that a table gives."""
    for name in set(law.needs) - {"num_params", "tokens"} - set(runs.frame):
        raise UserError(f"the {law.name} law needs column {name!r}, which the runs table lacks")
    found = {column.name: column.read(runs, tokens) for column in law.columns}
    for name, values in found.items():
        if np.isnan(values).any():
            raise UserError(f"the {law.name} law needs {name} in every row; {int(np.isnan(values).sum())} rows lack it")
    return found


def loss_and_slope(law: Law, fitted: np.ndarray, batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Losses [n] of a batch [n] at fitted values [p], and their slopes [n, p] in these."""
    count = len(next(iter(batch.values())))
    rows = {name: padded(values, bucket(count), 1.0) for name, values in batch.items()}
    with jax.enable_x64(True):
        loss, slope = _predict(law, fitted, rows)
    return np.asarray(loss)[:count], np.asarray(slope)[:count]


@functools.cache
def residual_of(law: Law, residual: str) -> Law:
    """The law with residuals of this kind; the same object each time, for which programs are compiled once."""
    return law if residual == law.residual else dataclasses.replace(law, residual=residual)


def _no_rows(centre: Mapping[str, float]) -> Problem:
    none = np.zeros(0)
    return Problem({}, none, none, none.astype(int), dict(centre), none, none, none)


@partial(jax.jit, static_argnames="law")
def _predict(law: Law, fitted: jax.Array, batch: dict) -> tuple[jax.Array, jax.Array]:
    """Losses [n] and their slopes [n, p] in the fitted values."""
    losses = lambda values: law.loss(law.natural(values), batch)  # noqa: E731
    return losses(fitted), jax.jacfwd(losses)(fitted)
