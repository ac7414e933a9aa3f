"""The capacity law, or curse of multilinguality (ATLAS Eq. 7), fitted to all languages of a study at once.

    L(K, N, D_t) = E + A·K^φ / N^α + B·K^ψ / D_t^β        K languages sampled evenly, D_t tokens of the target

The exponents are shared, E, A and B are each language's own. There is no repetition in it, so rows of many epochs are
left out.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atlas.scaling import noise
from atlas.scaling.estimates import Estimate, document, finite, r2
from atlas.scaling.law import capacity
from atlas.scaling.solver import levenberg_marquardt
from atlas.scaling.table.runs import COOLDOWN, Runs
from checked import UserError

SHARED = ("alpha", "beta", "phi", "psi")
_LEVELS = ("E", "A", "B")
# Beyond about four epochs a repeated token is worth visibly less than a new one (Muennighoff et al. 2023).
_MAX_EPOCHS = 4.0
_EVEN = 1.05  # factor within which shares of a mixture count as even: whole windows are dealt out
_LEAST_ROWS = 8  # the law of one language has 7 parameters

# Weak priors keep every direction finite: means and standard deviations of log α, log β, φ, ψ, and of log E, log A/N₀^α
# and log B/D₀^β beside the language's lowest log loss (N₀, D₀: geometric means). One is a factor of 2.7 either way.
_SHARED_PRIOR = ((np.log(0.35), 0.7), (np.log(0.3), 0.7), (0.0, 0.5), (0.0, 0.5))
_LEVEL_PRIOR = ((np.log(0.7), 1.0), (np.log(0.15), 1.5), (np.log(0.15), 1.5))
_TOLD = 0.5  # part of a prior's variance below which the runs, not it, determine a parameter
_STARTS = ((0.35, 0.3), (0.6, 0.2), (0.2, 0.5))  # exponents α, β
_SAME = 0.1  # of a log posterior, within which starts count as one optimum
_RHO_GRID = np.linspace(0.0, 0.95, 20)  # steps far below what a study tells apart
_ROUNDS, _STILL = 10, 1e-6  # of law and noise in turn, and the relative change of the objective that ends them
_MISFIT = 0.05  # of the loss, from which the noise is estimated: more than runs miss a law by
_STEPS, _DECREMENT = 200, 1e-10  # of one descent, which takes about ten


@dataclasses.dataclass(frozen=True)
class CapacityExponents:
    """The exponents of the capacity law that an expansion needs; φ and ψ may have either sign."""

    alpha: float
    beta: float
    phi: float
    psi: float

    @property
    def optimal_share(self) -> float:
        """w at a compute-optimal baseline, β/(α+β)."""
        return self.beta / (self.alpha + self.beta)


@dataclasses.dataclass(frozen=True)
class CapacityFit:
    """A fitted capacity law: exponents shared by all languages; E, A and B of each.

    Attributes:
      parameters: estimates by name: alpha, beta, phi, psi, and E[<language>], A[<language>], B[<language>]; not
        identified where the data took away less than half of the weak prior's variance.
      objective: restricted negative log posterior, up to a constant.
      converged: whether two or more of three starts ended at the best optimum.
      residual_sd: standard deviation of log loss; rho: correlation of two rows of one run.
      r2: mean over languages of R² of loss in the fitted rows.
      n_rows, n_runs: how many were fitted.
      warnings: what a reader has to know before believing the numbers.
    """

    parameters: dict[str, Estimate]
    objective: float
    converged: bool
    residual_sd: float
    rho: float
    r2: float
    n_rows: int
    n_runs: int
    warnings: tuple[str, ...]

    @property
    def exponents(self) -> CapacityExponents:
        """What an expansion from K to rK languages needs."""
        return CapacityExponents(**{name: self.parameters[name].value for name in SHARED})

    def to_json(self) -> dict:
        """The fit as plain Python values, in the form of fit.json."""
        extra = {"residual_sd": self.residual_sd, "rho": self.rho, "r2": self.r2}
        return document("capacity", self, None) | finite(extra)


def fit_capacity(runs: Runs) -> CapacityFit:
    """Fits Eq. 7 by least squares of log loss with a run random effect, under weak priors.

    Uses the rows of runs that sample K ≥ 1 languages evenly, on one of those languages, up to four epochs of it; only
    cooled-down rows where the table has any. The correlation of rows of one run is estimated by restricted maximum
    likelihood, and standard errors include it.

    Args:
      runs: a table of runs from scratch.

    Raises:
      UserError: fewer than 8 rows are left.
    """
    rows, notes = _applicable(runs)
    present, language = np.unique(rows.target, return_inverse=True)
    languages = tuple(rows.languages[i] for i in present)
    data, centre = _data(rows, language, len(languages))
    with jax.enable_x64(True):
        solved = [_solve(data, exponents) for exponents in _STARTS]
        best = min(solved, key=lambda end: float(end.objective))
        parameters = _estimates(best, languages, centre, data.prior_sd)
    agree = sum(float(end.objective) < float(best.objective) + _SAME for end in solved)
    fitted = rows.loss * np.exp(-np.asarray(best.residual))
    scores = [r2(rows.loss[language == i], fitted[language == i]) for i in range(len(languages))]
    return CapacityFit(
        parameters=parameters,
        objective=float(best.objective),
        converged=agree > 1,
        residual_sd=float(np.sqrt(best.variance)),
        rho=float(best.rho),
        r2=float(np.nanmean(scores)) if np.any(np.isfinite(scores)) else float("nan"),
        n_rows=len(rows),
        n_runs=len(rows.run_ids),
        warnings=(*notes, *_warnings(rows, parameters, agree)),
    )


def _applicable(runs: Runs) -> tuple[Runs, tuple[str, ...]]:
    """The rows to which the law applies, and notes that count what was left out."""
    own, least = runs.own(runs.D), np.where(runs.D > 0, runs.D, np.inf).min(1)
    keep = {
        "of runs that do not sample their languages evenly": runs.D.max(1) <= _EVEN * least,
        "on a language that the run was not trained on": own > 0,
        f"beyond {_MAX_EPOCHS:g} epochs of the target": own <= _MAX_EPOCHS * runs.own(runs.U),
    }
    if (cooled := runs.phase == COOLDOWN).any():
        keep["of the trunk, not cooled down"] = cooled
    kept, notes = np.ones(len(runs), bool), []
    for reason, mask in keep.items():
        if dropped := int((kept & ~mask).sum()):
            notes.append(f"{dropped} rows {reason} were left out")
        kept &= mask
    if kept.sum() < _LEAST_ROWS:
        raise UserError(f"the capacity law has 7 parameters; {int(kept.sum())} usable rows are too few to fit it")
    return runs.where(kept), tuple(notes)


class _Data(NamedTuple):
    """Rows, N and D in their geometric means, [r]; priors of θ = (log α, log β, φ, ψ, log E, a, b), [4 + 3·Lt]."""

    log_loss: jax.Array
    N: jax.Array
    K: jax.Array
    D: jax.Array
    language: jax.Array
    groups: noise.Groups  # the rows of a run
    prior_mean: jax.Array
    prior_sd: jax.Array


class _Solved(NamedTuple):
    theta: jax.Array
    residual: jax.Array  # [r] observed less predicted log loss
    covariance: jax.Array
    variance: jax.Array
    rho: jax.Array
    objective: jax.Array


def _data(rows: Runs, language: np.ndarray, count: int) -> tuple[_Data, tuple[float, ...]]:
    """The rows as arrays, and the logarithms of N₀ and D₀."""
    own, log_loss = rows.own(rows.D), np.log(rows.loss)
    centre = tuple(float(np.log(values).mean()) for values in (rows.N, own))
    least = np.array([log_loss[language == i].min() for i in range(count)])
    prior = [np.array(_SHARED_PRIOR), *(np.stack([least + mean, np.full(count, sd)], 1) for mean, sd in _LEVEL_PRIOR)]
    mean, sd = np.concatenate(prior).T
    size = np.bincount(rows.run).astype(float)
    groups = noise.Groups(rows.run, np.ones(len(rows)), size, np.ones_like(size))
    N, D = rows.N / np.exp(centre[0]), own / np.exp(centre[1])
    return _Data(log_loss, N, (rows.D > 0).sum(1).astype(float), D, language, groups, mean, sd), centre


def _solve(data: _Data, exponents: tuple[float, float]) -> _Solved:
    """Alternates the law's mode with the noise until they stand still."""
    theta = np.concatenate([np.log(exponents), data.prior_mean[2:]])
    new = _alternate(data, theta, np.float64(_MISFIT**2), np.float64(0.0))
    for _ in range(_ROUNDS - 1):
        old, new = new, _alternate(data, new.theta, new.variance, new.rho)
        if abs(new.objective - old.objective) < _STILL * max(1.0, abs(new.objective)) and new.rho == old.rho:
            break
    return new


def _residual(theta: jax.Array, data: _Data) -> jax.Array:
    """[r] observed less predicted log loss."""
    alpha, beta = jnp.exp(theta[:2])
    E, A, B = jnp.exp(theta[4:].reshape(3, -1)[:, data.language])
    return data.log_loss - jnp.log(capacity(data.N, data.K, data.D, E, A, alpha, B, beta, theta[2], theta[3]))


@jax.jit
def _alternate(data: _Data, theta: jax.Array, variance: jax.Array, rho: jax.Array) -> _Solved:
    """The law's mode under a given noise, then the noise under that law."""
    precision = jnp.diag(data.prior_sd**-2.0)

    def linearised(theta: jax.Array) -> noise.Sums:
        return noise.sums(_residual(theta, data), -jax.jacfwd(_residual)(theta, data), data.groups)

    def evaluate(theta: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        square, gradient, hessian = noise.whitened(linearised(theta), data.groups, rho)
        scale, pull = variance * (1.0 - rho), precision @ (theta - data.prior_mean)
        value = 0.5 * (square / scale + (theta - data.prior_mean) @ pull)
        return value, pull - gradient / scale, hessian / scale + precision

    def step(hessian: jax.Array, gradient: jax.Array, damping: jax.Array) -> jax.Array:
        return jnp.linalg.solve(hessian + damping * jnp.diag(jnp.diag(hessian)), gradient)

    theta = levenberg_marquardt(evaluate, step, theta, _STEPS, _DECREMENT).x
    sums, gap = linearised(theta), theta - data.prior_mean

    def stay(gradient: jax.Array, hessian: jax.Array, scale: jax.Array) -> noise.Solved:
        # Few runs leave directions so open that the law bends on the way to another ρ's optimum: ρ would swing.
        posterior = hessian / scale + precision
        used = jnp.trace(jnp.linalg.solve(posterior, hessian / scale))
        return noise.Solved(0.0, 0.5 * gap @ precision @ gap, jnp.linalg.slogdet(posterior)[1], used)

    found = noise.estimate(sums, data.groups, stay, _RHO_GRID, variance)
    _, _, hessian = noise.whitened(sums, data.groups, found.rho)
    covariance = jnp.linalg.inv(hessian / (found.variance * (1.0 - found.rho)) + precision)
    return _Solved(theta, _residual(theta, data), covariance, found.variance, found.rho, 0.5 * found.score)


def _estimates(
    solved: _Solved, languages: tuple[str, ...], centre: tuple[float, float], prior_sd: np.ndarray
) -> dict[str, Estimate]:
    """Parameters by name; A and B moved from the centre of the data to N = 1 and D = 1."""

    def moved(theta: jax.Array) -> jax.Array:
        away = jnp.concatenate([jnp.zeros(1), jnp.exp(theta[:2]) * jnp.array(centre)])
        return theta.at[4:].add(jnp.repeat(away, len(languages)))

    slope = jax.jacfwd(moved)(solved.theta)
    se = np.sqrt(np.diag(slope @ solved.covariance @ slope.T))
    told = np.diag(solved.covariance) < _TOLD * prior_sd**2
    names = [*SHARED, *(f"{name}[{language}]" for name in _LEVELS for language in languages)]
    return {
        name: (Estimate.normal if name in ("phi", "psi") else Estimate.lognormal)(*numbers)
        for name, *numbers in zip(names, np.asarray(moved(solved.theta)), se, told, strict=True)
    }


def _warnings(rows: Runs, parameters: dict[str, Estimate], agree: int) -> list[str]:
    found = []
    if len(np.unique((rows.D > 0).sum(1))) < 2:
        found.append("every run has the same number of languages: phi and psi cannot be told; add even mixtures")
    if (sizes := len(np.unique(rows.N))) < 3:
        found.append(f"{sizes} model size(s): alpha and E need at least three")
    weak = [name for name in SHARED if not parameters[name].identified]
    if weak:
        found.append(f"not identified by these runs (the prior decides): {', '.join(weak)}")
    if agree < 2:
        found.append(f"only {agree} of {len(_STARTS)} starts reached the best optimum")
    if len(rows.run_ids) < len(parameters):
        found.append(f"{len(rows.run_ids)} runs for {len(parameters)} parameters")
    return found
