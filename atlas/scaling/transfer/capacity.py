"""The capacity law, or curse of multilinguality (ATLAS Eq. 7), and its fit.

    L(K, N, D_t) = E + A·K^φ / N^α + B·K^ψ / D_t^β        K languages sampled evenly, D_t tokens of the target

φ > 0: every added language costs capacity; ψ < 0: added languages carry over to the target. K = 1 is
Chinchilla's law. There is no repetition in it, so rows of many epochs are left out of a fit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from atlas.errors import UserError, unknown
from atlas.scaling.estimates import Estimate, document, finite
from atlas.scaling.planning.expansion import CapacityExponents
from atlas.scaling.solver import levenberg_marquardt

SHARED = ("alpha", "beta", "phi", "psi")
# Beyond about four epochs a repeated token is worth visibly less than a new one (Muennighoff et al. 2023).
_MAX_EPOCHS = 4.0
# Shares of a mixture count as even within this factor: whole windows are dealt out.
_EVEN = 1.05
_RHO_GRID = np.linspace(0, 0.95, 20)
_STARTS = ((0.35, 0.3), (0.6, 0.2), (0.2, 0.5))  # exponents α, β


def capacity_loss(parameters: Mapping, N, K, D):
    """Eq. 7 with parameters E, A, B, alpha, beta, phi, psi; D is tokens of the target language.

    Broadcasts; the data term equals B·K^(ψ+β) / D_tot^β in total tokens D_tot = K·D.

    >>> law = dict(E=1.0, A=400.0, B=300.0, alpha=0.4, beta=0.3, phi=0.1, psi=-0.05)
    >>> bool(capacity_loss(law, 1e8, 1, 1e9) == 1.0 + 400.0 / 1e8**0.4 + 300.0 / 1e9**0.3)
    True
    """
    capacity = parameters["A"] * K ** parameters["phi"] / N ** parameters["alpha"]
    return parameters["E"] + capacity + parameters["B"] * K ** parameters["psi"] / D ** parameters["beta"]


@dataclass(frozen=True)
class CapacityFit:
    """A fitted capacity law: exponents shared by all languages; E, A and B of each.

    Attributes:
      languages: in the order of the fit.
      parameters: estimates by name: alpha, beta, phi, psi, and E[<language>], A[<language>], B[<language>].
        Not
        identified: the data took away less than half of the weak prior's variance.
      objective: restricted negative log posterior, up to a constant.
      converged: whether two or more of three starts ended at the best optimum.
      residual_sd: standard deviation of log loss; rho: correlation of two rows of one run.
      r2: mean over languages of R² of loss in the fitted rows.
      n_rows, n_runs: how many were fitted.
      warnings: what a reader has to know before believing the numbers.
    """

    languages: tuple[str, ...]
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

    def law(self, language: str) -> dict[str, float]:
        """Parameters of `capacity_loss` for one language."""
        if language not in self.languages:
            raise unknown("language", language, self.languages)
        shared = {name: self.parameters[name].value for name in SHARED}
        return shared | {name: self.parameters[f"{name}[{language}]"].value for name in "EAB"}

    def predict(self, N, K, D, language: str) -> np.ndarray:
        """Loss of `language` at N parameters, K evenly sampled languages and D tokens of the target."""
        N, K, D = (np.asarray(x, np.float64) for x in (N, K, D))
        return capacity_loss(self.law(language), N, K, D)

    def share(self, N: float, K: float, D: float, language: str) -> float:
        """Part of the reducible loss that N is responsible for there: `share` of atlas.scaling.planning.expansion."""
        law = self.law(language)
        reducible = self.predict(N, K, D, language) - law["E"]
        return float(law["A"] * K ** law["phi"] / N ** law["alpha"] / reducible)

    def to_json(self) -> dict:
        """The fit as plain Python values, in the form of fit.json."""
        extra = {"residual_sd": self.residual_sd, "rho": self.rho, "r2": self.r2}
        return document("capacity", self, None) | finite(extra)


def capacity_rows(frame: pd.DataFrame) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Rows of a runs table to which the capacity law applies, and what was left out.

    Kept: rows of runs that sample K ≥ 1 languages evenly, on one of those languages, up to four epochs of the
    target; only cooled-down rows where the table has any.

    Returns:
      (columns run, language, num_params, K, tokens (of the target), loss; notes that count what was left
      out).
    """
    names = [name for name in frame if name.startswith("tokens.")]
    missing = {"run", "language", "num_params", "loss"} - set(frame)
    if missing or not names:
        absent = sorted(missing) or ["tokens.<language>"]
        raise UserError(f"the capacity law needs the column(s) {', '.join(absent)}; table has {', '.join(frame)}")
    tokens_RL = frame[names].fillna(0).to_numpy(np.float64)
    seen_RL = tokens_RL > 0
    own_R = _own(frame, "tokens.", np.zeros(len(frame)))
    unique_R = _own(frame, "unique_tokens.", np.full(len(frame), np.inf))
    low = np.where(seen_RL, tokens_RL, np.inf).min(axis=1, initial=np.inf)
    keep = {
        "of runs that do not sample their languages evenly": tokens_RL.max(axis=1) <= _EVEN * low,
        "on a language that the run was not trained on": own_R > 0,
        f"beyond {_MAX_EPOCHS:g} epochs of the target": own_R <= _MAX_EPOCHS * unique_R,
        "without a positive loss": frame.loss.to_numpy(np.float64) > 0,
    }
    if "phase" in frame and (frame.phase == "cooldown").any():
        keep["of the trunk, not cooled down"] = (frame.phase == "cooldown").to_numpy()
    rows = frame[["run", "language", "num_params", "loss"]].assign(K=seen_RL.sum(axis=1), tokens=own_R)
    kept, notes = np.ones(len(frame), bool), []
    for reason, mask in keep.items():
        if dropped := int((kept & ~mask).sum()):
            notes.append(f"{dropped} rows {reason} were left out")
        kept &= mask
    return rows[kept].reset_index(drop=True), tuple(notes)


def _own(frame: pd.DataFrame, prefix: str, default: np.ndarray) -> np.ndarray:
    """Column prefix + <the row's language>, `default` where there is none, [R]."""
    value = default.copy()
    for language in frame.language.unique():
        if prefix + str(language) in frame:
            mask = (frame.language == language).to_numpy()
            value[mask] = frame.loc[mask, prefix + str(language)].fillna(0).to_numpy(np.float64)
    return value


def fit_capacity(rows: pd.DataFrame, notes: Sequence[str] = ()) -> CapacityFit:
    """Fits Eq. 7 by least squares of log loss with a run random effect.

    Exponents are shared by the languages, E, A and B are per language. Weak priors (a factor of two or more
    either way) keep every direction finite; a parameter that they decide is reported as not identified. The
    correlation of rows of one run is estimated by restricted maximum likelihood, and standard errors include
    it.

    Args:
      rows: run, language, num_params, K, tokens, loss, as `capacity_rows` gives them.
      notes: what was left out before, repeated in the fit's warnings.
    """
    if len(rows) < 8:
        raise UserError(f"the capacity law has 7 parameters; {len(rows)} usable rows are too few to fit it")
    language, names = pd.factorize(rows.language, sort=True)
    languages = tuple(map(str, names))
    data, centre = _data(rows, languages, language)
    with jax.enable_x64(True):
        solved = [_solve(data, exponents) for exponents in _STARTS]
        best = min(solved, key=lambda end: float(end.objective))
        parameters = _estimates(best, languages, centre, data.prior_sd)
    agree = sum(float(end.objective) < float(best.objective) + 0.1 for end in solved)
    loss = rows.loss.to_numpy(np.float64)
    return CapacityFit(
        languages=languages,
        parameters=parameters,
        objective=float(best.objective),
        converged=agree > 1,
        residual_sd=float(best.sd),
        rho=float(best.rho),
        r2=_mean_r2(loss, loss * np.exp(np.asarray(best.residual)), language),
        n_rows=len(rows),
        n_runs=int(rows.run.nunique()),
        warnings=(*notes, *_warnings(rows, parameters, agree)),
    )


class _Data(NamedTuple):
    """Rows in logs, N and D centred, [M]; priors of θ = (log α, log β, φ, ψ, log E, a, b), [4 + 3·Lt]."""

    log_loss: jax.Array
    log_N: jax.Array
    log_K: jax.Array
    log_D: jax.Array
    language: jax.Array
    run: jax.Array
    run_size: jax.Array  # rows of the row's run
    prior_mean: jax.Array
    prior_sd: jax.Array


class _Solved(NamedTuple):
    theta: jax.Array
    residual: jax.Array  # [M] predicted less observed log loss
    covariance: jax.Array
    sd: jax.Array
    rho: jax.Array
    objective: jax.Array  # restricted negative log posterior, up to a constant


def _data(rows: pd.DataFrame, languages: tuple, language: np.ndarray) -> tuple[_Data, tuple[float, float]]:
    """The rows as arrays, and the means of log N and log D that they were centred on."""
    columns = {name: rows[name].to_numpy(np.float64) for name in ("num_params", "K", "tokens", "loss")}
    for name, values in columns.items():
        if not np.all(np.isfinite(values) & (values > 0)):
            raise UserError(f"column {name} must be positive and finite for the capacity law; drop the other rows")
    log_N, log_K, log_D, log_loss = (np.log(column) for column in columns.values())
    centre = (float(log_N.mean()), float(log_D.mean()))
    least = np.array([log_loss[language == i].min() for i in range(len(languages))])
    ones = np.ones(len(languages))
    mean = np.concatenate([np.log([0.35, 0.3]), [0, 0], least + np.log(0.7), *(2 * [least + np.log(0.15)])])
    sd = np.concatenate([[0.7, 0.7, 0.5, 0.5], ones, 1.5 * ones, 1.5 * ones])
    run = pd.factorize(rows.run)[0]
    logs = (log_loss, log_N - centre[0], log_K, log_D - centre[1])
    return _Data(*logs, language, run, np.bincount(run)[run].astype(float), mean, sd), centre


def _solve(data: _Data, exponents: tuple[float, float]) -> _Solved:
    """Alternates the law's mode with the scale and run correlation of the noise until they stand still."""
    theta = np.concatenate([np.log(exponents), data.prior_mean[2:]])
    old = _Solved(theta, data.log_loss, np.eye(len(theta)), np.float64(0.05), np.float64(0.0), np.float64(np.inf))
    for _ in range(10):
        new = _alternate(data, old.theta, old.sd, old.rho)
        if abs(new.objective - old.objective) < 1e-6 * max(1.0, abs(new.objective)) and new.rho == old.rho:
            break
        old = new
    return new


def _linearise(theta: jax.Array, data: _Data) -> tuple[jax.Array, jax.Array]:
    """Predicted less observed log loss [M] and its derivative [M, 4 + 3·Lt]."""
    levels = theta[4:].reshape(3, -1)
    log_E, a, b = levels[:, data.language]
    slope_N, slope_D = -jnp.exp(theta[0]) * data.log_N, -jnp.exp(theta[1]) * data.log_D
    terms = jnp.stack([log_E, a + theta[2] * data.log_K + slope_N, b + theta[3] * data.log_K + slope_D])
    log_loss = jax.nn.logsumexp(terms, axis=0)
    part = jnp.exp(terms - log_loss)
    own = jax.nn.one_hot(data.language, levels.shape[1], dtype=part.dtype)
    shared = [part[1] * slope_N, part[2] * slope_D, part[1] * data.log_K, part[2] * data.log_K]
    return log_loss - data.log_loss, jnp.hstack([jnp.stack(shared, 1), *(p[:, None] * own for p in part)])


def _whiten(x: jax.Array, data: _Data, rho: jax.Array) -> jax.Array:
    """x [M, …] times the inverse root of the correlation (1−ρ)·I + ρ·11ᵀ within each run."""
    sums = jax.ops.segment_sum(x, data.run, num_segments=len(data.run))[data.run]
    factor = (1 - jnp.sqrt((1 - rho) / (1 + (data.run_size - 1) * rho))) / data.run_size
    return (x - factor.reshape(-1, *[1] * (x.ndim - 1)) * sums) / jnp.sqrt(1 - rho)


@jax.jit
def _alternate(data: _Data, theta: jax.Array, sd: jax.Array, rho: jax.Array) -> _Solved:
    """The law's mode under a given noise, then the noise under that law."""

    def evaluate(theta):
        gap = (theta - data.prior_mean) / data.prior_sd
        residual, jacobian = (_whiten(x, data, rho) / sd for x in _linearise(theta, data))
        r = jnp.concatenate([residual, gap])
        J = jnp.concatenate([jacobian, jnp.diag(1 / data.prior_sd)])
        return 0.5 * r @ r, J.T @ r, J.T @ J

    def step(hessian, gradient, damping):
        return jnp.linalg.solve(hessian + damping * jnp.diag(jnp.diag(hessian)), gradient)

    theta = levenberg_marquardt(evaluate, step, theta, iterations=200, tolerance=1e-10).x
    residual, jacobian = _linearise(theta, data)
    sd, rho, objective = _noise(data, theta, residual, jacobian, sd)
    white = _whiten(jacobian, data, rho) / sd
    covariance = jnp.linalg.inv(white.T @ white + jnp.diag(data.prior_sd**-2.0))
    return _Solved(theta, residual, covariance, sd, rho, objective)


def _noise(data: _Data, theta: jax.Array, residual: jax.Array, jacobian: jax.Array, sd: jax.Array):
    """Scale and run correlation of least restricted negative log likelihood, and its value there."""
    precision = jnp.diag(data.prior_sd**-2.0)
    prior = jnp.sum(((theta - data.prior_mean) / data.prior_sd) ** 2)
    rows = len(residual)

    def at(rho: jax.Array) -> tuple[jax.Array, jax.Array]:
        white_r, white_J = _whiten(residual, data, rho), _whiten(jacobian, data, rho)
        square, gram = white_r @ white_r, white_J.T @ white_J
        spent = jnp.trace(jnp.linalg.solve(gram / sd**2 + precision, gram / sd**2))
        # Noise-free data must not end in a division by zero.
        scale = jnp.maximum(jnp.sqrt(square / jnp.maximum(rows - spent, 1.0)), 1e-9)
        # The log determinant of a run's correlation, dealt out over its rows.
        volume = jnp.sum(((data.run_size - 1) * jnp.log1p(-rho) + jnp.log1p((data.run_size - 1) * rho)) / data.run_size)
        determinant = jnp.linalg.slogdet(gram / scale**2 + precision)[1]
        return 0.5 * (square / scale**2 + prior + 2 * rows * jnp.log(scale) + volume + determinant), scale

    grid = jnp.where(jnp.max(data.run_size) > 1, jnp.asarray(_RHO_GRID), 0.0)
    value, scale = jax.vmap(at)(grid)
    best = jnp.argmin(value)
    return scale[best], grid[best], value[best]


def _estimates(
    solved: _Solved, languages: tuple[str, ...], centre: tuple[float, float], prior_sd: np.ndarray
) -> dict[str, Estimate]:
    """Parameters by name; A and B moved from the centre of the data to N = 1 and D = 1."""
    value, J = np.array(solved.theta), np.eye(len(solved.theta))
    for exponent in range(2):
        rows = 4 + (exponent + 1) * len(languages) + np.arange(len(languages))
        move = np.exp(value[exponent]) * centre[exponent]
        value[rows] += move
        J[rows, exponent] = move
    se = np.sqrt(np.diag(J @ solved.covariance @ J.T))
    told = np.diag(solved.covariance) < 0.5 * prior_sd**2
    names = [*SHARED, *(f"{name}[{language}]" for name in "EAB" for language in languages)]
    return {
        name: (Estimate.normal if name in ("phi", "psi") else Estimate.lognormal)(*numbers)
        for name, *numbers in zip(names, value, se, told, strict=True)
    }


def _warnings(rows: pd.DataFrame, parameters: dict[str, Estimate], agree: int) -> list[str]:
    found = []
    if rows.K.nunique() < 2:
        found.append("every run has the same number of languages: phi and psi cannot be told; add even mixtures")
    if rows.num_params.nunique() < 3:
        found.append(f"{rows.num_params.nunique()} model size(s): alpha and E need at least three")
    weak = [name for name in SHARED if not parameters[name].identified]
    if weak:
        found.append(f"not identified by these runs (the prior decides): {', '.join(weak)}")
    if agree < 2:
        found.append(f"only {agree} of {len(_STARTS)} starts reached the best optimum")
    if rows.run.nunique() < len(parameters):
        found.append(f"{rows.run.nunique()} runs for {len(parameters)} parameters")
    return found


def _mean_r2(loss: np.ndarray, fitted: np.ndarray, language: np.ndarray) -> float:
    values = []
    for index in np.unique(language):
        y, f = loss[language == index], fitted[language == index]
        if len(y) > 1 and np.ptp(y) > 0:
            values.append(1 - np.sum((y - f) ** 2) / np.sum((y - y.mean()) ** 2))
    return float(np.mean(values)) if values else float("nan")
