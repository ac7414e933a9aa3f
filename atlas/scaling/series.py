"""Fits of laws for one series of runs: Chinchilla and the data-constrained law."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atlas.errors import UserError, unknown
from atlas.scaling import laws
from atlas.scaling.arrays import bucket, padded
from atlas.scaling.estimates import Estimate, diagnose_sizes, document
from atlas.scaling.runs import Runs
from atlas.scaling.solver import levenberg_marquardt

OBJECTIVES = ("huber", "least_squares", "lad")
_LAD_DELTA = 1e-5  # a Huber corner this small is least absolute deviations for any real noise
_STARTS = 6
_DESCENT, _POLISH = 150, 60  # most steps with reweighted and with exact second derivatives
_OPEN = 100.0  # standard deviation of the log of a parameter that nothing determines
_OPTIMAL = 1e-10  # Newton decrement over objective below which a gradient counts as zero


@dataclasses.dataclass(frozen=True)
class Law:
    """A law of N, D and U with positive parameters, of which the first five are E, A, alpha, B, beta.

    Attributes:
      names: of all parameters.
      loss: (N, D, U, *parameters) -> loss.
      prior: log mean and standard deviation of the logs of the parameters after the fifth.
    """

    names: tuple[str, ...]
    loss: Callable[..., jax.Array]
    prior: tuple[tuple[float, float], ...] = ()


LAWS: Mapping[str, Law] = {
    "chinchilla": Law(("E", "A", "alpha", "B", "beta"), lambda N, D, U, *p: laws.chinchilla(N, D, *p)),
    # The two rates of decay are drawn to the published ones: few studies repeat data or overgrow models
    # enough.
    "data_constrained": Law(
        ("E", "A", "alpha", "B", "beta", "R_D", "R_N"),
        laws.data_constrained,
        prior=((np.log(15.387756), 1.0), (np.log(5.309743), 2.0)),
    ),
}


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
      law: its name.
      parameters: name -> estimate, with 90 % intervals and the verdict whether the runs determine it.
      objective: sum over rows of the Huber (or square/2, or absolute) loss of log residuals.
      converged: whether the gradient vanishes at the optimum.
      starts_agreeing: fraction of the starts that reached it within 1e-6 of its value.
      covariance: [p, p] of the logs of the parameters.
      tokens: "total" or "own", which tokens D means in a multilingual table.
      warnings: what the runs cannot tell, and what was left out while reading.
    """

    law: str
    parameters: dict[str, Estimate]
    objective: float
    converged: bool
    starts_agreeing: float
    covariance: np.ndarray
    tokens: str
    n_rows: int
    n_runs: int
    warnings: tuple[str, ...]

    def predict(self, N, D, U=np.inf) -> tuple[np.ndarray, np.ndarray]:
        """Loss at N parameters, D tokens and U unique tokens (broadcast), and its standard deviation.

        Returns:
          Two float64 arrays, in the unit of the fitted losses; the deviation is that of the law, without a
          run's noise.
        """
        N, D, U = np.broadcast_arrays(*(np.asarray(a, float) for a in (N, D, U)))
        size = bucket(N.size)
        rows = [padded(a.ravel(), size, 1.0) for a in (N, D, U)]
        x = np.log([estimate.value for estimate in self.parameters.values()])
        with jax.enable_x64(True):
            loss, slope = (np.asarray(a)[: N.size] for a in _predict(self.law, x, *rows))
        deviation = np.sqrt(np.einsum("np,pk,nk->n", slope, self.covariance, slope))
        return loss.reshape(N.shape), deviation.reshape(N.shape)

    def predict_runs(self, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
        """`predict` for every row of a table, with the same meaning of D as in the fit."""
        return self.predict(runs.N, *_tokens(runs, self.tokens))

    def to_json(self, holdout: Mapping | None = None) -> dict:
        """The fit as plain values, ready for json.dumps."""
        return document(self.law, self, holdout)


def fit(law: str, runs: Runs, *, objective: str = "huber", delta: float = 1e-3, tokens: str = "own") -> Fit:
    """Fits one law to all rows, which must evaluate one language.

    Minimises the sum of huber_δ(log L − log L̂): starts from variable projection (a grid over the exponents,
    least squares for E, A, B), then Levenberg–Marquardt with reweighting and a polish with exact second
    derivatives. Standard errors are those of an M-estimator, clustered by run.

    Args:
      law: "chinchilla" or "data_constrained".
      runs: rows of one target language.
      objective: "huber", "least_squares" or "lad".
      delta: corner of the Huber loss, in log loss.
      tokens: whether D is the "own" tokens of the evaluated language or the "total" of the mixture.

    Raises:
      UserError: unknown law, objective or tokens; several languages; rows without tokens of their language;
        fewer rows than parameters.
    """
    _check(law, runs, objective, delta, tokens)
    D, U = _tokens(runs, tokens)
    units = np.exp([np.mean(np.log(runs.N)), np.mean(np.log(D))])
    corner = {"huber": delta, "least_squares": 1e6, "lad": _LAD_DELTA}[objective]
    size = bucket(len(runs))
    columns = (np.log(runs.loss), runs.N / units[0], D / units[1], U / units[1], np.ones(len(runs)), runs.run)
    fills = (0.0, 1.0, 1.0, np.inf, 0.0, 0)
    rows = _Rows(*(padded(values, size, fill) for values, fill in zip(columns, fills, strict=True)))
    with jax.enable_x64(True):
        solution = jax.tree.map(np.asarray, _solve(law, rows, corner))
    natural, transform = _natural(solution.x, units)
    covariance = transform @ solution.covariance @ transform.T
    notes = list(runs.warnings)
    told = _judge(LAWS[law].names, runs.N, D, U, covariance, notes)
    if not solution.converged:
        notes.append("the fit did not reach an optimum: do not trust its parameters")
    deviations = np.sqrt(np.diagonal(covariance))
    return Fit(
        law=law,
        parameters={
            name: Estimate.lognormal(value, deviation, name in told)
            for name, value, deviation in zip(LAWS[law].names, natural, deviations, strict=True)
        },
        objective=float(solution.objective),
        converged=bool(solution.converged),
        starts_agreeing=float(solution.agreeing),
        covariance=covariance,
        tokens=tokens,
        n_rows=len(runs),
        n_runs=len(runs.run_ids),
        warnings=tuple(notes),
    )


def _check(law: str, runs: Runs, objective: str, delta: float, tokens: str) -> None:
    for kind, name, valid in (
        ("law", law, LAWS),
        ("objective", objective, OBJECTIVES),
        ("meaning of tokens", tokens, ("own", "total")),
    ):
        if name not in valid:
            raise unknown(kind, name, valid)
    if not (np.isfinite(delta) and delta > 0):
        raise UserError(f"delta must be a positive number of log loss, got {delta}; 1e-3 is usual")
    evaluated = [runs.languages[i] for i in np.unique(runs.target)]
    if len(evaluated) > 1:
        raise UserError(
            f"the {law} law is fitted to one language, the rows evaluate {len(evaluated)}: "
            f"choose one, such as 'language == \"{evaluated[0]}\"', or fit the atlas law"
        )
    if tokens == "own" and (runs.own(runs.D) <= 0).any():
        raise UserError(
            f"some runs evaluate {evaluated[0]!r} without training on it: leave them out or use total tokens"
        )
    if len(runs) < len(LAWS[law].names):
        raise UserError(f"{len(runs)} rows cannot determine the {len(LAWS[law].names)} parameters of the {law} law")


def _tokens(runs: Runs, tokens: str) -> tuple[np.ndarray, np.ndarray]:
    """D [n] and U [n] of a series."""
    if tokens == "own":
        return runs.own(runs.D), runs.own(runs.U)
    # Of a mixture in which something repeats, only the seen part of each language is unique.
    return runs.total_tokens, np.minimum(runs.D, runs.U).sum(1)


def _natural(x: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log parameters for N and D in ones, and their Jacobian in x, the same for N and D in `units`."""
    transform = np.eye(len(x))
    for term, exponent, unit in ((1, 2, units[0]), (3, 4, units[1])):
        transform[term, exponent] = np.exp(x[exponent]) * np.log(unit)
    natural = x.copy()
    natural[[1, 3]] += transform[[1, 3], [2, 4]]
    return natural, transform


def _judge(
    names: tuple[str, ...],
    N: np.ndarray,
    D: np.ndarray,
    U: np.ndarray,
    covariance: np.ndarray,
    notes: list[str],
) -> set[str]:
    """The parameters that the runs determine; why not, in `notes`, for the others."""
    structural = diagnose_sizes(N, D)
    for reason in dict.fromkeys(structural.values()):
        notes.append(f"{', '.join(n for n in structural if structural[n] == reason)} not identified: {reason}")
    told = {name for name in names if name not in structural}
    vague = {name for name, variance in zip(names, np.diagonal(covariance), strict=True) if not variance < 1.0}
    # A and B are the law's value at one parameter and one token: their logs are vague in any real study.
    vague -= {"A", "B"}
    if "R_D" in names and np.max(D / U) < 4.0:
        vague.add("R_D")
    if extra := sorted(vague & told):
        notes.append(f"{', '.join(extra)} not identified: the runs leave its size open")
    return told - vague


class _Rows(NamedTuple):
    log_loss: jax.Array  # [n]
    N: jax.Array  # [n] in units of its geometric mean, as D and U
    D: jax.Array
    U: jax.Array
    weight: jax.Array  # 1, or 0 where padded
    run: jax.Array


class _Solution(NamedTuple):
    x: jax.Array  # [p] logs of the parameters
    objective: jax.Array
    covariance: jax.Array  # [p, p]
    converged: jax.Array
    agreeing: jax.Array


@partial(jax.jit, static_argnames="law")
def _predict(law: str, x: jax.Array, N: jax.Array, D: jax.Array, U: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Losses [n] and their slopes [n, p] in the logs of the parameters."""
    loss = lambda x, N, D, U: LAWS[law].loss(N, D, U, *jnp.exp(x))  # noqa: E731
    return jax.vmap(jax.value_and_grad(loss), (None, 0, 0, 0))(x, N, D, U)


def _huber(residual: jax.Array, corner: jax.Array) -> jax.Array:
    size = jnp.abs(residual)
    return jnp.where(size <= corner, 0.5 * residual**2, corner * (size - 0.5 * corner))


def _residuals(law: str, x: jax.Array, rows: _Rows) -> jax.Array:
    return rows.log_loss - jnp.log(LAWS[law].loss(rows.N, rows.D, rows.U, *jnp.exp(x)))


def _starts(law: str, rows: _Rows) -> jax.Array:
    """Best points [s, p] of a grid over the exponents, E, A and B by least squares on relative residuals."""
    exponents = jnp.exp(jnp.linspace(jnp.log(0.05), jnp.log(1.6), 16))
    alpha, beta = (g.ravel() for g in jnp.meshgrid(exponents, exponents, indexing="ij"))
    loss = jnp.exp(rows.log_loss)
    extra = jnp.array([mean for mean, _ in LAWS[law].prior])

    def score(alpha: jax.Array, beta: jax.Array) -> tuple[jax.Array, jax.Array]:
        terms = jnp.stack([jnp.ones_like(rows.N), rows.N**-alpha, rows.D**-beta], -1)
        design = terms * (rows.weight / loss)[:, None]
        normal = design.T @ design
        coefficients = jnp.linalg.solve(normal + 1e-10 * jnp.diag(jnp.diagonal(normal)), design.T @ rows.weight)
        coefficients = jnp.maximum(coefficients, 1e-3 * jnp.sum(rows.weight * loss) / jnp.sum(rows.weight))
        E, A, B = jnp.log(coefficients)
        x = jnp.concatenate([jnp.stack([E, A, jnp.log(alpha), B, jnp.log(beta)]), extra])
        return jnp.sum(rows.weight * jnp.abs(_residuals(law, x, rows))), x

    scores, points = jax.vmap(score)(alpha, beta)
    return points[jnp.argsort(jnp.where(jnp.isfinite(scores), scores, jnp.inf))[:_STARTS]]


@partial(jax.jit, static_argnames="law")
def _solve(law: str, rows: _Rows, corner: jax.Array) -> _Solution:
    starts = _starts(law, rows)
    residual = _residuals(law, starts[0], rows)
    slope, square = _influence(residual, rows, corner)
    prior_scale = _prior_scale(slope, square, rows)
    values = jax.vmap(lambda x: _descend(law, rows, corner, prior_scale, x))(starts)
    best = jnp.argmin(jnp.where(jnp.isfinite(values.value), values.value, jnp.inf))
    x, value = values.x[best], values.value[best]
    objective = jnp.sum(rows.weight * _huber(_residuals(law, x, rows), corner))
    return _Solution(
        x,
        objective,
        _covariance(law, x, rows, corner),
        values.decrement[best] <= _OPTIMAL * jnp.maximum(value, 1e-12),
        jnp.mean(values.value <= value * (1.0 + 1e-6)),
    )


def _descend(law: str, rows: _Rows, corner: jax.Array, prior_scale: jax.Array, x: jax.Array):
    """Reweighted Gauss–Newton from afar, then Newton: reweighting alone creeps where the corner is sharp."""
    mean = jnp.array([0.0] * 5 + [m for m, _ in LAWS[law].prior])
    precision = jnp.array([0.0] * 5 + [s**-2.0 for _, s in LAWS[law].prior]) * prior_scale

    def value(x: jax.Array) -> jax.Array:
        residual = _residuals(law, x, rows)
        return jnp.sum(rows.weight * _huber(residual, corner)) + 0.5 * jnp.sum(precision * (x - mean) ** 2)

    def reweighted(x: jax.Array):
        residual = _residuals(law, x, rows)
        jacobian = jax.jacfwd(lambda x: _residuals(law, x, rows))(x)
        weight = rows.weight * jnp.minimum(1.0, corner / jnp.maximum(jnp.abs(residual), 1e-300))
        gradient = jacobian.T @ (weight * residual) + precision * (x - mean)
        return value(x), gradient, jacobian.T @ (weight[:, None] * jacobian) + jnp.diag(precision)

    def exact(x: jax.Array):
        return value(x), jax.grad(value)(x), jax.hessian(value)(x)

    def solve(hessian: jax.Array, gradient: jax.Array, damping: jax.Array) -> jax.Array:
        diagonal = jnp.abs(jnp.diagonal(hessian))
        ridge = damping * diagonal + 1e-13 * jnp.max(diagonal)
        return jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(hessian + jnp.diag(ridge)), True), gradient)

    tolerance = 1e-17 * jnp.sum(rows.weight) * jnp.minimum(corner, 1e-2)
    rough = levenberg_marquardt(reweighted, solve, x, _DESCENT, tolerance)
    return levenberg_marquardt(exact, solve, rough.x, _POLISH, tolerance)


def _influence(residual: jax.Array, rows: _Rows, corner: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Slope [n] of the Huber score at each row, smoothed over 1.5σ, and its mean square over rows.

    Where the corner lies far below the noise, the slope is in effect the density of residuals near zero. It
    is taken row by row: rows of high leverage are often the ones that the law misses, and so hold the fit
    the least.
    """
    size = jnp.abs(residual)
    spread = 1.4826 * jnp.nanmedian(jnp.where(rows.weight > 0, size, jnp.nan))
    window = jnp.maximum(corner, 1.5 * spread)
    slope = rows.weight * (size <= window) * (corner / window)
    return slope, jnp.sum(rows.weight * jnp.minimum(size, corner) ** 2) / jnp.sum(rows.weight)


def _prior_scale(slope: jax.Array, square: jax.Array, rows: _Rows) -> jax.Array:
    """Weighs a prior against the Huber sum as it would weigh against the likelihood it stands for."""
    return square * jnp.sum(rows.weight) / jnp.maximum(jnp.sum(slope), 1e-300)


def _covariance(law: str, x: jax.Array, rows: _Rows, corner: jax.Array) -> jax.Array:
    """Covariance of an M-estimator of the logs of the parameters, clustered by run.

    A direction that the rows leave open gets the standard deviation _OPEN: both halves of the sandwich
    vanish there, and their ratio would pass for certainty.
    """
    residual = _residuals(law, x, rows)
    jacobian = jax.jacfwd(lambda x: _residuals(law, x, rows))(x) * rows.weight[:, None]
    slope, square = _influence(residual, rows, corner)
    scores = jax.ops.segment_sum(jnp.clip(residual, -corner, corner)[:, None] * jacobian, rows.run, len(rows.run))
    clusters = jnp.sum(jnp.any(scores != 0.0, 1))
    correction = clusters / jnp.maximum(clusters - len(x), 1.0)
    scale = _prior_scale(slope, square, rows)
    precision = jnp.diag(jnp.array([0.0] * 5 + [s**-2.0 for _, s in LAWS[law].prior]))
    values, vectors = jnp.linalg.eigh((slope[:, None] * jacobian).T @ jacobian + scale * precision)
    open_ = values < 1e-12 * values[-1]
    inverse = (vectors * jnp.where(open_, 0.0, 1.0 / jnp.where(open_, 1.0, values))) @ vectors.T
    meat = correction * scores.T @ scores + scale**2 * precision
    return inverse @ meat @ inverse + (vectors * jnp.where(open_, _OPEN**2, 0.0)) @ vectors.T
