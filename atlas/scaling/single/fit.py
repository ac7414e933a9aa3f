"""Fits of one law to one series of runs."""

import dataclasses
from collections.abc import Mapping
from functools import partial

import jax
import numpy as np
from scipy.special import stdtrit

from atlas.scaling.estimates import Estimate, document, finite, r2
from atlas.scaling.padding import bucket, padded
from atlas.scaling.single import estimator
from atlas.scaling.single.estimator import Problem
from atlas.scaling.single.library import LAWS
from atlas.scaling.single.specification import Law
from atlas.scaling.table.runs import Runs
from checked import UserError, unknown

OBJECTIVES = ("huber", "least_squares", "lad")
_LAD_DELTA = 1e-5  # a Huber corner this small is least absolute deviations for any real noise
_NO_CORNER = 1e6  # one that no residual reaches: least squares
_SAMPLE = 4096  # rows on which the starts of a longer table compete: enough to tell them apart, in a second

# Half is the rate of parametric estimation, which Hoffmann et al. (App. D.2) expect of both terms; fits to
# published families lie between 0.15 and 0.75.
_USUAL = (float(np.log(0.5)), 0.35)


@dataclasses.dataclass(frozen=True)
class Prior:
    """A joint normal prior on the fitted values of a law (logarithms of positive parameters).

    Attributes:
      mean: [p].
      precision: [p, p].
      unit: of the losses that it was learnt from; "" where none is known.
    """

    mean: np.ndarray
    precision: np.ndarray
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """How far to trust a fit.

    Attributes:
      decrement: gᵀH⁻¹g over the objective at the optimum, twice the relative gain that a further step promises.
      condition: of the curvature at the optimum, in centred coordinates.
      sigma: standard deviation of a row's log loss around the law, by the median.
      correlation: of residuals within a run.
      independent_rows: how many independent rows would tell as much.
      r2, are: coefficient of determination of the losses and mean absolute relative error, in sample.
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
      objective: sum over rows of the Huber (or square/2, or absolute) loss of the residuals.
      converged: whether the gradient vanishes at the optimum and the curvature is positive there.
      starts_agreeing: fraction of the starts that reached it within 1e-6 of its value.
      covariance: [p, p] of the fitted values: the logarithms of positive parameters, the others themselves.
      freedom: degrees of freedom of the intervals: independent rows less parameters.
      tokens: "total" or "own", which tokens D means in a multilingual table.
      unit: of the losses, as the table names it; "" where it does not.
      warnings: what the runs cannot tell, and what was left out while reading.
      diagnostics: residual scale, curvature, in-sample scores.
      model, problem, x, scale, covariance_x: what was solved and where, for `bootstrap`.
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
    n_rows: int
    n_runs: int
    warnings: tuple[str, ...]
    diagnostics: Diagnostics
    model: Law = dataclasses.field(repr=False)
    problem: Problem = dataclasses.field(repr=False)
    x: np.ndarray = dataclasses.field(repr=False)
    scale: float = dataclasses.field(repr=False)
    covariance_x: np.ndarray = dataclasses.field(repr=False)

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
        count = int(np.prod(shape))
        rows = {name: padded(values.ravel(), bucket(count), 1.0) for name, values in batch.items()}
        with jax.enable_x64(True):
            loss, slope = _predict(self.model, self.x, self.problem.centre, rows)
        loss, slope = np.asarray(loss)[:count], np.asarray(slope)[:count]
        deviation = np.sqrt(np.maximum(np.einsum("np,pk,nk->n", slope, self.covariance_x, slope), 0.0))
        return loss.reshape(shape), deviation.reshape(shape)

    def interval(self, *columns, **named) -> tuple[np.ndarray, np.ndarray]:
        """Bounds of the 90 % interval of the law's loss, without a run's noise; columns as for `predict`."""
        loss, deviation = self.predict(*columns, **named)
        reach = stdtrit(self.freedom, 0.95) * deviation / loss
        return loss * np.exp(-reach), loss * np.exp(reach)

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
            raise UserError(f"the {self.law} law needs {', '.join(missing)} to predict; give it by name")
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
        diagnostics = dataclasses.asdict(self.diagnostics) | {"starts_agreeing": self.starts_agreeing}
        extra = {"diagnostics": diagnostics, "covariance": covariance | {"freedom": self.freedom}}
        return document(self.law, self, holdout) | finite(extra)


def fit(
    law: str | Law,
    runs: Runs,
    *,
    objective: str = "huber",
    delta: float = 1e-3,
    tokens: str | None = None,
    prior: Prior | None = None,
) -> Fit:
    """Fits one law to all rows, which must evaluate one language.

    Minimises the sum of huber_δ(log L − log L̂): starts from variable projection (a grid over the exponents,
    least squares for the rest), then damped Newton steps through ever sharper corners. Standard errors are
    those of an M-estimator, with the rows of a run correlated.

    Args:
      law: the name of one in `atlas.scaling.single.library.LAWS`, or a `Law`.
      runs: rows of one target language.
      objective: "huber", "least_squares" or "lad".
      delta: corner of the Huber loss, in log loss.
      tokens: whether D is the "own" tokens of the evaluated language or the "total" of the mixture; the law's
        own choice by default.
      prior: on the fitted values (logarithms of positive parameters), added to the law's own.

    Raises:
      UserError: unknown law, objective or tokens; a prior of another law or unit; several languages; rows
        without tokens of their language; fewer rows than parameters.
    """
    model = LAWS.get(law) if isinstance(law, str) else law
    if model is None:
        raise unknown("law", law, LAWS)
    tokens = tokens or model.tokens
    _check(model, runs, objective, delta, tokens)
    corner = {"huber": delta, "least_squares": _NO_CORNER, "lad": _LAD_DELTA}[objective]
    columns = columns_of(model, runs, tokens)
    open_ = model.diagnose(columns)
    undetermined = any(p.role == "exponent" and p.name in open_ for p in model.parameters)
    problem = _problem(columns, runs, corner, _prior(model, prior, undetermined, runs.loss_unit))
    with jax.enable_x64(True):
        solution, spread = _solve(model, problem, len(runs))
    return _report(model, runs, open_, tokens, problem, solution, spread)


def columns_of(law: Law, runs: Runs, tokens: str) -> dict[str, np.ndarray]:
    """The batch [n] of a law that a table gives."""
    return {column.name: np.asarray(column.of(runs, tokens), float) for column in law.columns}


def _solve(law: Law, problem: Problem, rows: int) -> tuple[estimator.Solution, estimator.Spread]:
    if rows > _SAMPLE:
        # The starts of a long table compete on some of its rows.
        some = np.random.default_rng(0).choice(rows, _SAMPLE, replace=False)
        picked = {name: values[some] for name, values in problem.batch.items()}
        sample = {name: getattr(problem, name)[some] for name in ("log_loss", "weight")}
        near = estimator.solve(law, problem._replace(batch=picked, run=np.zeros(_SAMPLE, int), **sample))
        solution = estimator.polish(law, near, problem, estimator.prior_scale(law, near.x, problem))
    else:
        solution = estimator.solve(law, problem)
    spread = estimator.spread(law, solution.x, problem, solution.scale)
    if np.any(problem.precision):
        # Rows of a run tell less than as many independent ones: the prior counts for more beside them.
        scale = estimator.prior_scale(law, solution.x, problem) * (rows / spread.rows)
        solution = estimator.polish(law, solution, problem, scale)
        spread = estimator.spread(law, solution.x, problem, scale)
    return jax.tree.map(np.asarray, (solution, spread))


def _problem(columns: Mapping[str, np.ndarray], runs: Runs, corner: float, prior: Prior) -> Problem:
    size = bucket(len(runs))
    size <<= (size.bit_length() - 1) % 2  # powers of four: a fit compiles for seconds and runs for milliseconds
    positive = [name for name, values in columns.items() if np.all(np.isfinite(values) & (values > 0))]
    return Problem(
        batch={name: padded(values, size, values[-1]) for name, values in columns.items()},
        log_loss=padded(np.log(runs.loss), size, 1.0),
        weight=padded(np.ones(len(runs)), size, 0.0),
        run=padded(np.asarray(runs.run), size, 0),
        centre={name: np.exp(np.mean(np.log(columns[name]))) for name in positive}
        | {"loss": np.exp(np.mean(np.log(runs.loss)))},
        corner=np.float64(corner),
        mean=prior.mean,
        precision=prior.precision,
    )


def _prior(law: Law, given: Prior | None, undetermined: bool, unit: str) -> Prior:
    """The law's own prior and the given one.

    Where the design leaves exponents open (and only there) and nothing else is known, they are drawn to
    _USUAL: otherwise noise would choose among laws that fit alike.
    """
    known = {p.name: p.prior for p in law.parameters if p.prior}
    if undetermined and given is None:
        known = {p.name: _USUAL for p in law.parameters if p.role == "exponent"} | known
    mean, deviation = np.array([known.get(name, (0.0, np.inf)) for name in law.names]).T
    own = Prior(mean, np.diag(deviation**-2.0))
    if given is None:
        return own
    if given.unit and unit and given.unit != unit:
        raise UserError(f"the prior is of losses in {given.unit}, the runs' are in {unit}; convert one")
    if given.mean.shape != mean.shape:
        raise UserError(f"the prior has {len(given.mean)} parameters, the {law.name} law {len(mean)}")
    precision = own.precision + given.precision
    return Prior(np.linalg.pinv(precision) @ (own.precision @ mean + given.precision @ given.mean), precision)


def _check(law: Law, runs: Runs, objective: str, delta: float, tokens: str) -> None:
    for kind, name, valid in (("objective", objective, OBJECTIVES), ("meaning of tokens", tokens, ("own", "total"))):
        if name not in valid:
            raise unknown(kind, name, valid)
    if not (np.isfinite(delta) and delta > 0):
        raise UserError(f"delta must be a positive number of log loss, got {delta}; 1e-3 is usual")
    evaluated = [runs.languages[i] for i in np.unique(runs.target)]
    if len(evaluated) > 1:
        raise UserError(
            f"the {law.name} law is fitted to one language, the rows evaluate {len(evaluated)}: "
            f"choose one, such as 'language == \"{evaluated[0]}\"', or fit the atlas law"
        )
    if (tokens == "own" or any(c.name == "p" for c in law.columns)) and (runs.own(runs.D) <= 0).any():
        raise UserError(
            f"some runs evaluate {evaluated[0]!r} without training on it: leave them out or use total tokens"
        )
    if len(runs) < len(law.names):
        raise UserError(f"{len(runs)} rows cannot determine the {len(law.names)} parameters of the {law.name} law")


def _report(law, runs, open_, tokens, problem, solution, spread) -> Fit:
    fitted, predicted = spread.fitted, spread.predicted[: len(runs)]
    covariance = spread.to_fitted @ spread.covariance @ spread.to_fitted.T
    notes = list(runs.warnings)
    deviations = np.sqrt(np.maximum(np.diagonal(covariance), 0.0))
    told = _judge(law, open_, deviations, notes)
    if not solution.converged:
        notes.append("the fit did not reach an optimum: do not trust its parameters")
    quantile = stdtrit(spread.freedom, 0.95)
    estimates = {
        p.name: (Estimate.lognormal if p.positive else Estimate.normal)(value, deviation, p.name in told, quantile)
        for p, value, deviation in zip(law.parameters, fitted, deviations, strict=True)
    }
    return Fit(
        law=law.name,
        parameters=estimates,
        objective=float(solution.objective),
        converged=bool(solution.converged),
        starts_agreeing=float(solution.agreeing),
        covariance=covariance,
        freedom=float(spread.freedom),
        tokens=tokens,
        unit=runs.loss_unit,
        n_rows=len(runs),
        n_runs=len(runs.run_ids),
        warnings=tuple(notes),
        diagnostics=Diagnostics(
            decrement=float(solution.decrement / max(float(solution.objective), estimator.LEAST_OBJECTIVE)),
            condition=float(spread.condition),
            sigma=float(spread.sigma),
            correlation=float(spread.correlation),
            independent_rows=float(spread.rows),
            r2=r2(runs.loss, predicted),
            are=float(np.mean(np.abs(predicted / runs.loss - 1.0))),
        ),
        model=law,
        problem=problem,
        x=solution.x,
        scale=float(solution.scale),
        covariance_x=spread.covariance,
    )


def _judge(law: Law, structural: Mapping[str, str], deviations: np.ndarray, notes: list[str]) -> set[str]:
    """The parameters that the runs determine; why not, in `notes`, for the others."""
    for reason in dict.fromkeys(structural.values()):
        notes.append(f"{', '.join(n for n in structural if structural[n] == reason)} not identified: {reason}")
    told = set(law.names) - set(structural)
    widths = [np.inf if p.scale else p.width for p in law.parameters]
    vague = {name for name, d, width in zip(law.names, deviations, widths, strict=True) if not d < width}
    if extra := sorted(vague & told):
        notes.append(f"{', '.join(extra)} not identified: the runs leave its size open")
    return told - vague


@partial(jax.jit, static_argnames="law")
def _predict(law: Law, x: jax.Array, centre: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
    """Losses [n] and their slopes [n, p] in the coordinates."""
    losses = lambda x: law.predict(x, centre, batch)  # noqa: E731
    return losses(x), jax.jacfwd(losses)(x)
