"""What a joint fit may claim: estimates in natural units, and verdicts on what the runs determine."""

import numpy as np

from atlas.scaling.estimates import Estimate, diagnose_sizes
from atlas.scaling.posterior import LOG_ALPHA, LOG_B, LOG_BETA, LOG_LAMBDA, TAU
from atlas.scaling.runs import Runs

EXPONENT = (np.log(0.33), 0.7)  # of the mean log exponents
CAPACITY = 0.15  # of φ, around 0
_UNKNOWN_TRANSFER = Estimate.normal(0.1, 0.5, False)  # what is reported of a τ that the design hides
_TELLING = 0.5  # a parameter is identified if its posterior variance is below this part of its prior's
_NAMES = ("E", "A", "alpha", "B", "beta", "lambda")


def parameters_of(
    runs: Runs,
    theta: np.ndarray,
    phi: float,
    cov: np.ndarray,
    prior_variance: np.ndarray,
    units: tuple[float, float],
    capacity: bool,
    notes: list[str],
) -> dict[str, Estimate]:
    """Estimates by name, with the verdicts on what the runs determine."""
    parameters: dict[str, Estimate] = {}
    for t, name in enumerate(runs.targets):
        rows = runs.where(runs.target == t)
        told = _told(cov[t], prior_variance[t])
        confounded = _judge_design(rows, t, name, told, notes)
        for key, estimate in _law(theta[t], cov[t], told, units).items():
            parameters[f"{key}[{name}]"] = estimate
        for s, source in enumerate(runs.languages):
            if s != t:
                deviation = np.sqrt(cov[t, TAU + s, TAU + s])
                found = Estimate.normal(theta[t, TAU + s], deviation, told[TAU + s])
                parameters[f"tau[{name}<-{source}]"] = _UNKNOWN_TRANSFER if confounded else found
    if capacity:
        variance = cov[0, -1, -1]
        parameters["phi"] = Estimate.normal(phi, np.sqrt(variance), bool(variance < _TELLING * CAPACITY**2))
    guesses = [key for key, estimate in parameters.items() if key.startswith("tau") and not estimate.identified]
    if guesses:
        shown = ", ".join(guesses[:4]) + (", …" if len(guesses) > 4 else "")
        notes.append(f"{len(guesses)} transfer weights come from the prior, not from the runs: {shown}")
    return parameters


def _told(cov: np.ndarray, prior_variance: np.ndarray) -> np.ndarray:
    """Whether the data told each parameter of a block: its variance fell well below its prior's.

    An exponent's prior is the weak one before shrinkage: shrunk to the other languages it is still known.
    """
    prior = prior_variance.copy()
    prior[[LOG_ALPHA, LOG_BETA]] = EXPONENT[1] ** 2
    return np.diagonal(cov)[:-1] < _TELLING * prior


def _judge_design(rows: Runs, t: int, name: str, told: np.ndarray, notes: list[str]) -> bool:
    """Withdraws what the design of a target's runs leaves open, whatever the priors made of it.

    Returns whether B and the transfer weights are confounded.
    """
    shares = rows.shares[:, t]
    confounded = bool(shares.min() < 0.999 and np.ptp(shares) < 0.02)
    if confounded:
        told[[LOG_B, *range(TAU, len(told))]] = False
        notes.append(
            f"{name}: its share is {shares.mean():.2f} in every run, so B and the transfer weights "
            "cannot be told apart; add a monolingual run or another proportion"
        )
    epochs = float(np.max(rows.D[:, t] / rows.U[:, t]))
    if epochs < 4.0:
        told[LOG_LAMBDA] = False
        notes.append(f"{name}: at most {epochs:.1f} epochs seen, so lambda is not identified; 8 or more tell it")
    for parameter, reason in diagnose_sizes(rows.N, rows.own(rows.D)).items():
        index = {"E": 0, "A": 1, "alpha": 2, "B": 3, "beta": 4}[parameter]
        told[index] = False
        if parameter in ("alpha", "beta"):
            notes.append(f"{name}: {parameter} is not identified: {reason}")
    return confounded


def _law(theta: np.ndarray, cov: np.ndarray, told: np.ndarray, units: tuple[float, float]) -> dict[str, Estimate]:
    """E, A, alpha, B, beta, lambda of one target in natural units; A and B refer to N = 1 and D = 1 token."""
    direction = np.eye(TAU, len(cov))
    level = theta[:TAU].copy()
    for term, exponent, unit in ((1, 2, units[0]), (3, 4, units[1])):
        slope = np.exp(theta[exponent]) * np.log(unit)
        level[term] += slope
        direction[term, exponent] = slope
    deviation = np.sqrt(np.einsum("ip,pk,ik->i", direction, cov, direction))
    told = [told[0], told[1] and told[2], told[2], told[3] and told[4], told[4], told[5]]
    return {name: Estimate.lognormal(level[i], deviation[i], told[i]) for i, name in enumerate(_NAMES)}


def note_runs(weights: dict[str, float], lowest_z: float, guard: float, notes: list[str]) -> None:
    astray = [run for run, weight in weights.items() if weight < 0.2]
    if astray:
        shown = ", ".join(astray[:6]) + (", …" if len(astray) > 6 else "")
        notes.append(f"{len(astray)} runs do not follow the law of the others and lost their weight: {shown}")
    if lowest_z < 3.0 * guard:
        notes.append(
            f"effective tokens fall to {lowest_z:.3g} of the tokens seen in some run: "
            "the law's guard distorts the fit there"
        )
