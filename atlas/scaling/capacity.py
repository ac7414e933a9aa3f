"""The capacity law, or curse of multilinguality (ATLAS Eq. 7), and its fit.

    L(K, N, D_t) = E + A·K^φ / N^α + B·K^ψ / D_t^β        K languages sampled evenly, D_t tokens of the target

φ > 0: every added language costs capacity; ψ < 0: added languages carry over to the target. K = 1 is Chinchilla's
law. There is no repetition in it, so rows of many epochs are left out of a fit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from atlas.errors import UserError, unknown
from atlas.scaling.expansion import CapacityExponents

_SHARED = ("alpha", "beta", "phi", "psi")
# Beyond about four epochs a repeated token is worth visibly less than a new one (Muennighoff et al. 2023).
_MAX_EPOCHS = 4.0
# Shares of a mixture count as even within this factor: whole windows are dealt out.
_EVEN = 1.05
_RHO_GRID = np.linspace(0, 0.95, 20)
_Z90 = NormalDist().inv_cdf(0.95)


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
      parameters: name → value, se, low, high (90 %), identified. Names: alpha, beta, phi, psi, and E.<language>,
        A.<language>, B.<language>. Not identified: the data took less than half of the weak prior's variance.
      residual_sd: standard deviation of log loss; rho: correlation of two rows of one run.
      r2: mean over languages of R² of loss in the fitted rows.
      rows, runs: how many were fitted.
      warnings: what a reader has to know before believing the numbers.
    """

    languages: tuple[str, ...]
    parameters: dict[str, dict]
    residual_sd: float
    rho: float
    r2: float
    rows: int
    runs: int
    warnings: tuple[str, ...]

    @property
    def exponents(self) -> CapacityExponents:
        """What an expansion from K to rK languages needs."""
        return CapacityExponents(**{name: self.parameters[name]["value"] for name in _SHARED})

    def law(self, language: str) -> dict[str, float]:
        """Parameters of `capacity_loss` for one language."""
        if language not in self.languages:
            raise unknown("language", language, self.languages)
        shared = {name: self.parameters[name]["value"] for name in _SHARED}
        return shared | {name: self.parameters[f"{name}.{language}"]["value"] for name in "EAB"}

    def predict(self, N, K, D, language: str) -> np.ndarray:
        """Loss of `language` at N parameters, K evenly sampled languages and D tokens of the target."""
        N, K, D = (np.asarray(x, np.float64) for x in (N, K, D))
        return capacity_loss(self.law(language), N, K, D)

    def share(self, N: float, K: float, D: float, language: str) -> float:
        """Part of the reducible loss that N is responsible for there: `share` of atlas.scaling.expansion."""
        law = self.law(language)
        reducible = self.predict(N, K, D, language) - law["E"]
        return float(law["A"] * K ** law["phi"] / N ** law["alpha"] / reducible)

    def to_json(self) -> dict:
        """The fit as plain Python values, in the form of fit.json."""
        return {
            "law": "capacity",
            "n_rows": self.rows,
            "n_runs": self.runs,
            "parameters": self.parameters,
            "residual_sd": self.residual_sd,
            "rho": self.rho,
            "r2": self.r2,
            "warnings": list(self.warnings),
        }


def capacity_rows(frame: pd.DataFrame) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Rows of a runs table to which the capacity law applies, and what was left out.

    Kept: rows of runs that sample K ≥ 1 languages evenly, on one of those languages, up to four epochs of the
    target; only cooled-down rows where the table has any.

    Returns:
      (columns run, language, num_params, K, tokens (of the target), loss; notes that count what was left out).
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

    Exponents are shared by the languages, E, A and B are per language. Weak priors (a factor of two or more either
    way) keep every direction finite; a parameter that they decide is reported as not identified. The correlation of
    rows of one run is estimated by restricted maximum likelihood, and standard errors include it.

    Args:
      rows: run, language, num_params, K, tokens, loss, as `capacity_rows` gives them.
      notes: what was left out before, repeated in the fit's warnings.
    """
    if len(rows) < 8:
        raise UserError(f"the capacity law has 7 parameters; {len(rows)} usable rows are too few to fit it")
    problem = _Problem.of(rows)
    with jax.enable_x64(True):
        solved = [_solve(problem, start) for start in problem.starts()]
        best = min(solved, key=lambda fit: fit.objective)
        names, value, se = _natural(problem, best)
    identified = np.diag(best.covariance) < 0.5 * problem.prior_sd**2
    parameters = {
        name: _summary(name, v, s, ok) for name, v, s, ok in zip(names, value, se, identified, strict=True)
    }
    agree = sum(fit.objective < best.objective + 0.1 for fit in solved)
    warnings = (*notes, *_warnings(rows, parameters, best, agree, len(solved)))
    fitted = np.exp(problem.log_loss + best.residual)
    return CapacityFit(
        languages=problem.languages,
        parameters=parameters,
        residual_sd=best.sd,
        rho=best.rho,
        r2=_mean_r2(rows.loss.to_numpy(np.float64), fitted, problem.language),
        rows=len(rows),
        runs=int(rows.run.nunique()),
        warnings=warnings,
    )


@dataclass(frozen=True)
class _Problem:
    """The data in centred logs, [M] each, and priors of the vector (log α, log β, φ, ψ, log E, a, b), [4 + 3·Lt]."""

    languages: tuple[str, ...]
    language: np.ndarray
    run: np.ndarray
    log_N: np.ndarray
    log_K: np.ndarray
    log_D: np.ndarray
    log_loss: np.ndarray
    centre: tuple[float, float]
    prior_mean: np.ndarray
    prior_sd: np.ndarray

    @classmethod
    def of(cls, rows: pd.DataFrame) -> "_Problem":
        columns = {name: rows[name].to_numpy(np.float64) for name in ("num_params", "K", "tokens", "loss")}
        for name, values in columns.items():
            if not np.all(np.isfinite(values) & (values > 0)):
                raise UserError(f"column {name} must be positive and finite for the capacity law; drop other rows")
        language, languages = pd.factorize(rows.language, sort=True)
        log_N, log_D, log_loss = (np.log(columns[name]) for name in ("num_params", "tokens", "loss"))
        centre = (float(log_N.mean()), float(log_D.mean()))
        least = np.array([log_loss[language == i].min() for i in range(len(languages))])
        ones = np.ones(len(languages))
        mean = np.concatenate([np.log([0.35, 0.3]), [0, 0], least + np.log(0.7), *(2 * [least + np.log(0.15)])])
        sd = np.concatenate([[0.7, 0.7, 0.5, 0.5], ones, 1.5 * ones, 1.5 * ones])
        run = pd.factorize(rows.run)[0]
        shifted = (log_N - centre[0], np.log(columns["K"]), log_D - centre[1])
        return cls(tuple(map(str, languages)), language, run, *shifted, log_loss, centre, mean, sd)

    def starts(self) -> list[np.ndarray]:
        """The prior mean with low and high exponents."""
        pairs = [(0.35, 0.3), (0.6, 0.2), (0.2, 0.5)]
        return [np.concatenate([np.log(pair), self.prior_mean[2:]]) for pair in pairs]


@dataclass(frozen=True)
class _Solved:
    theta: np.ndarray
    residual: np.ndarray
    covariance: np.ndarray
    sd: float
    rho: float
    objective: float  # restricted negative log posterior, up to a constant


@partial(jax.jit, static_argnums=0)
def _residual_and_jacobian(count: int, theta, log_N, log_K, log_D, log_loss, language):
    """Predicted less observed log loss [M], and its derivative [M, 4 + 3·count]."""

    def residual(theta):
        alpha, beta, phi, psi = jnp.exp(theta[0]), jnp.exp(theta[1]), theta[2], theta[3]
        log_E, a, b = theta[4:].reshape(3, count)[:, language]
        terms = jnp.stack([log_E, a + phi * log_K - alpha * log_N, b + psi * log_K - beta * log_D])
        return jax.nn.logsumexp(terms, axis=0) - log_loss

    return residual(theta), jax.jacfwd(residual)(theta)


def _solve(problem: _Problem, start: np.ndarray) -> _Solved:
    """Levenberg–Marquardt in the whitened residuals, alternated with the noise's scale and correlation."""
    theta, sd, rho = start, 0.05, 0.0
    for _ in range(8):
        before = theta, sd, rho
        theta = _minimise(problem, theta, sd, rho)
        residual, jacobian = _evaluate(problem, theta)
        sd, rho, objective = _noise(problem, theta, residual, jacobian, sd)
        if np.allclose(theta, before[0], atol=1e-7) and np.isclose(sd, before[1], rtol=1e-4) and rho == before[2]:
            break
    white = _whiten(jacobian, problem.run, rho) / sd
    covariance = np.linalg.inv(white.T @ white + np.diag(problem.prior_sd**-2.0))
    return _Solved(theta, residual, covariance, sd, rho, objective)


def _evaluate(problem: _Problem, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    data = (problem.log_N, problem.log_K, problem.log_D, problem.log_loss, problem.language)
    return tuple(map(np.asarray, _residual_and_jacobian(len(problem.languages), theta, *data)))


def _minimise(problem: _Problem, theta: np.ndarray, sd: float, rho: float) -> np.ndarray:
    def system(theta):
        residual, jacobian = _evaluate(problem, theta)
        prior = (theta - problem.prior_mean) / problem.prior_sd
        r = np.concatenate([_whiten(residual, problem.run, rho) / sd, prior])
        return r, np.concatenate([_whiten(jacobian, problem.run, rho) / sd, np.diag(1 / problem.prior_sd)])

    r, J = system(theta)
    damping = 1e-3
    for _ in range(200):
        gradient, hessian = J.T @ r, J.T @ J
        step = -np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), gradient)
        new_r, new_J = system(theta + step)
        if new_r @ new_r < r @ r:
            gain = 1 - (new_r @ new_r) / (r @ r)
            theta, r, J, damping = theta + step, new_r, new_J, max(damping / 5, 1e-12)
            if gain < 1e-13:
                break
        else:
            damping *= 4
            if damping > 1e12:
                break
    return theta


def _whiten(x: np.ndarray, run: np.ndarray, rho: float) -> np.ndarray:
    """x [M, …] times the inverse root of the correlation (1−ρ)·I + ρ·11ᵀ within each run."""
    count = np.bincount(run)
    mean = np.stack([np.bincount(run, column) for column in np.reshape(x, (len(run), -1)).T], -1) / count[:, None]
    factor = 1 - np.sqrt((1 - rho) / (1 + (count - 1) * rho))
    return (x - np.reshape((factor[:, None] * mean)[run], x.shape)) / np.sqrt(1 - rho)


def _noise(
    problem: _Problem, theta: np.ndarray, residual: np.ndarray, jacobian: np.ndarray, sd: float
) -> tuple[float, float, float]:
    """Scale and run correlation that minimise the restricted negative log likelihood, and its value there."""
    count = np.bincount(problem.run)
    precision = np.diag(problem.prior_sd**-2.0)
    prior = np.sum(((theta - problem.prior_mean) / problem.prior_sd) ** 2)
    best = (sd, 0.0, np.inf)
    for rho in _RHO_GRID if count.max() > 1 else _RHO_GRID[:1]:
        white_r, white_J = _whiten(residual, problem.run, rho), _whiten(jacobian, problem.run, rho)
        gram = white_J.T @ white_J
        spent = np.trace(np.linalg.solve(gram / sd**2 + precision, gram / sd**2))
        # Noise-free data must not end in a division by zero.
        scale = max(float(np.sqrt(white_r @ white_r / max(len(residual) - spent, 1.0))), 1e-9)
        volume = np.sum((count - 1) * np.log(1 - rho) + np.log1p((count - 1) * rho))
        determinant = np.linalg.slogdet(gram / scale**2 + precision)[1]
        misfit = white_r @ white_r / scale**2 + prior
        value = 0.5 * (misfit + 2 * len(residual) * np.log(scale) + volume + determinant)
        best = min(best, (scale, float(rho), float(value)), key=lambda item: item[2])
    return best


def _natural(problem: _Problem, solved: _Solved) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names, values and standard errors; those of positive parameters are of their logarithm."""
    count = len(problem.languages)

    def uncentre(theta):
        a = theta[4 + count : 4 + 2 * count] + jnp.exp(theta[0]) * problem.centre[0]
        b = theta[4 + 2 * count :] + jnp.exp(theta[1]) * problem.centre[1]
        return jnp.concatenate([theta[: 4 + count], a, b])

    J = np.asarray(jax.jacfwd(uncentre)(solved.theta))
    names = [*_SHARED, *(f"{name}.{language}" for name in "EAB" for language in problem.languages)]
    return names, np.asarray(uncentre(solved.theta)), np.sqrt(np.diag(J @ solved.covariance @ J.T))


def _summary(name: str, value: float, se: float, identified: bool) -> dict:
    low, high = value - _Z90 * se, value + _Z90 * se
    if name not in ("phi", "psi"):
        value, low, high = np.exp([value, low, high])
        se *= value
    numbers = {"value": value, "se": se, "low": low, "high": high}
    return {key: float(number) for key, number in numbers.items()} | {"identified": bool(identified)}


def _warnings(rows: pd.DataFrame, parameters: dict, best: _Solved, agree: int, starts: int) -> list[str]:
    found = []
    if rows.K.nunique() < 2:
        found.append("every run has the same number of languages: phi and psi cannot be told; add even mixtures")
    if rows.num_params.nunique() < 3:
        found.append(f"{rows.num_params.nunique()} model size(s): alpha and E need at least three")
    weak = [name for name in _SHARED if not parameters[name]["identified"]]
    if weak:
        found.append(f"not identified by these runs (the prior decides): {', '.join(weak)}")
    if agree < 2:
        found.append(f"only {agree} of {starts} starts reached the best optimum")
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
