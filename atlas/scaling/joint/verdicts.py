"""What a joint fit may claim: estimates in natural units, and verdicts on what the runs determine."""

import numpy as np

from atlas.scaling.estimates import Estimate, diagnose_sizes
from atlas.scaling.joint.prior import CAPACITY, EXPONENT, LAMBDA
from atlas.scaling.joint.system import (
    LOG_A,
    LOG_ALPHA,
    LOG_B,
    LOG_BETA,
    LOG_LAMBDA,
    PHI,
    SOURCE_LAMBDA,
    TAU,
    State,
    direct_part,
)
from atlas.scaling.table.runs import Runs

_UNKNOWN_TRANSFER = Estimate.normal(0.1, 0.5, False)  # what is reported of a τ that the design hides
_TELLING = 0.5  # a parameter is identified if its posterior variance is below this part of its prior's
_EPOCHS = 4.0  # fewer tell nothing of repetition
LAW = ("E", "A", "alpha", "B", "beta", "lambda")


def parameters_of(
    runs: Runs,
    state: State,
    cov: np.ndarray,
    units: tuple[float, float],
    capacity: bool,
    lambda_kind: str,
    notes: list[str],
) -> dict[str, Estimate]:
    """Estimates by name, with the verdicts on what the runs determine."""
    parameters: dict[str, Estimate] = {}
    theta, direct = state.x.own, direct_part(state.x, state.prior)
    repeated = _judge_repetition(runs, lambda_kind, notes)
    for t, name in enumerate(runs.targets):
        rows = runs.where(runs.target == t)
        told = _told(cov[t], state.prior.variance[t])
        told[LOG_LAMBDA] &= repeated[t]
        confounded = _judge_design(rows, t, name, told, notes)
        parameters |= {f"{key}[{name}]": found for key, found in _law(theta[t], cov[t], told, units).items()}
        for s, source in enumerate(runs.languages):
            if s != t:
                deviation = np.sqrt(cov[t, TAU + s, TAU + s])
                found = Estimate.normal(theta[t, TAU + s], deviation, told[TAU + s])
                parameters[f"tau[{name}<-{source}]"] = _UNKNOWN_TRANSFER if confounded else found
    shared = np.diagonal(cov[0])[theta.shape[1] :]
    if lambda_kind == "source":
        parameters = {name: found for name, found in parameters.items() if not name.startswith("lambda")}
        for s, name in enumerate(runs.languages):
            variance = shared[SOURCE_LAMBDA + s]
            told = repeated[s] and variance < _TELLING * LAMBDA[1] ** 2
            parameters[f"lambda[<-{name}]"] = Estimate.lognormal(direct[SOURCE_LAMBDA + s], np.sqrt(variance), told)
    if capacity:
        told = shared[PHI] < _TELLING * CAPACITY**2
        parameters["phi"] = Estimate.normal(direct[PHI], np.sqrt(shared[PHI]), told)
    guesses = [key for key, estimate in parameters.items() if key.startswith("tau") and not estimate.identified]
    if guesses:
        shown = ", ".join(guesses[:4]) + (", …" if len(guesses) > 4 else "")
        notes.append(f"{len(guesses)} transfer weights come from the prior, not from the runs: {shown}")
    return parameters


def _told(cov: np.ndarray, prior_variance: np.ndarray) -> np.ndarray:
    """Whether the data told each parameter of a block: its variance fell well below its prior's.

    The prior of an exponent, and of a λ that the languages share, is the weak one before shrinkage: shrunk to
    the other languages it is still known. That of a τ is around the effect of its target: known pairs of the
    target do not make an unseen one known.
    """
    prior = prior_variance.copy()
    prior[[LOG_ALPHA, LOG_BETA]] = EXPONENT[1] ** 2
    prior[LOG_LAMBDA] = LAMBDA[1] ** 2
    return np.diagonal(cov)[: len(prior)] < _TELLING * prior


def _judge_repetition(runs: Runs, lambda_kind: str, notes: list[str]) -> np.ndarray:
    """[Ls] whether enough epochs were seen to tell λ of each language (of all, where they share it)."""
    epochs = runs.D / runs.U
    if lambda_kind == "source":
        most = epochs.max(0)
    else:
        own = np.where(runs.target[:, None] == np.arange(len(runs.languages)), epochs, 0.0)
        most = own.max(0) if lambda_kind == "target" else np.full(len(runs.languages), epochs.max())
    names = (
        ["all languages"] if lambda_kind == "shared" else runs.languages if lambda_kind == "source" else runs.targets
    )
    for name, value in zip(names, most, strict=False):
        if value < _EPOCHS:
            notes.append(f"{name}: at most {value:.1f} epochs seen, so lambda is not identified; 8 or more tell it")
    return most >= _EPOCHS


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
    for parameter, reason in diagnose_sizes(rows.N, rows.own(rows.D)).items():
        index = {"E": 0, "A": 1, "alpha": 2, "B": 3, "beta": 4}[parameter]
        told[index] = False
        if parameter in ("alpha", "beta"):
            notes.append(f"{name}: {parameter} is not identified: {reason}")
    return confounded


def log_law(theta: np.ndarray, units: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Logs of E, A, alpha, B, beta, lambda of one target, A and B at N = 1 and D = 1 token.

    Args:
      theta: [p] block.
      units: N0 and D0.

    Returns:
      [6] values and their derivatives [6, p] by the block.
    """
    direction, level = np.eye(TAU, len(theta)), theta[:TAU].copy()
    for term, exponent, unit in ((LOG_A, LOG_ALPHA, units[0]), (LOG_B, LOG_BETA, units[1])):
        slope = np.exp(theta[exponent]) * np.log(unit)
        level[term] += slope
        direction[term, exponent] = slope
    return level, direction


def _law(theta: np.ndarray, cov: np.ndarray, told: np.ndarray, units: tuple[float, float]) -> dict[str, Estimate]:
    """E, A, alpha, B, beta, lambda of one target in natural units."""
    level, direction = log_law(theta, units)
    own = cov[: len(theta), : len(theta)]
    deviation = np.sqrt(np.einsum("ip,pk,ik->i", direction, own, direction))
    told = [told[0], told[1] and told[2], told[2], told[3] and told[4], told[4], told[5]]
    return {name: Estimate.lognormal(level[i], deviation[i], told[i]) for i, name in enumerate(LAW)}


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
