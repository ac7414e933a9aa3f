"""What a joint fit may claim: estimates in natural units, and verdicts on what the runs determine."""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from atlas.scaling.estimates import Z90, diagnose_sizes
from atlas.scaling.joint.prior import Hyperprior
from atlas.scaling.joint.system import (
    LOG_A,
    LOG_ALPHA,
    LOG_B,
    LOG_BETA,
    LOG_E,
    LOG_LAMBDA,
    PHI,
    SOURCE_LAMBDA,
    TAU,
    State,
    Units,
    direct_part,
    natural_arrays,
)
from atlas.scaling.law import GUARD, JointLaw
from atlas.scaling.table.runs import Runs

Estimates = dict[str, JointLaw]  # value, se, low, high (90 % interval) and identified of every parameter

_UNKNOWN_TRANSFER = 0.1, 0.5  # what is reported of a τ that the design hides: about the published ones, and their range
_TELLING = 0.5  # a parameter is identified if its posterior variance is below this part of its prior's
_EPOCHS = 4.0  # fewer tell nothing of repetition: λ within a factor of e^2.5 (joint simulations)
_ALIKE = 0.02  # range of a target's shares within which B and the transfer weights cannot be told apart
_ASTRAY = 3.0  # prior deviations of the mean exponents: beyond 2.7 or below .04
_ETA_ASTRAY = 1.3  # beyond 1.9: there the weights can all go to 0
_LOST = 0.2  # weight of a run below which it is said to have gone astray
_MANY = 3  # runs of a size, of which most do not go astray by chance
_NAMED = 6  # runs or pairs that a note names
DISTORTED = 3.0  # widths of the guard below which it bends the law
_LARGEST = 700.0  # logarithm that float64 still holds


def estimates_of(
    runs: Runs, state: State, cov: np.ndarray, units: Units, lambda_kind: str, hyperprior: Hyperprior, notes: list[str]
) -> Estimates:
    """Estimates of every parameter, and in `notes` the verdicts on what the runs leave open.

    Args:
      cov: [Lt, p+h, p+h] posterior of every target's block and of the direct shared parameters.
    """
    theta, direct = state.x.own, direct_part(state.x, state.prior)
    p = theta.shape[1]
    repeated = _repeated(runs, lambda_kind, notes)
    told = _told(cov, state.prior.variance, len(runs.languages), hyperprior)
    said: dict[str, list[str]] = {}
    confounded = np.array([_judge_design(runs, t, told[t], said) for t in range(len(theta))])
    notes += [f"{', '.join(languages)}: {verdict}" for verdict, languages in said.items()]
    variance = np.diagonal(cov, axis1=1, axis2=2)
    slope = np.zeros((len(theta), TAU, p))
    slope[:, range(TAU), range(TAU)] = 1.0
    for term, exponent, unit in ((LOG_A, LOG_ALPHA, units.N), (LOG_B, LOG_BETA, units.D)):
        slope[:, term, exponent] = np.exp(theta[:, exponent]) * np.log(unit)
        told[:, term] &= told[:, exponent]
        told[:, LOG_E] &= told[:, exponent]  # what is left at infinite N and D is known no better than the way there
    deviation = np.sqrt(np.einsum("tip,tpk,tik->ti", slope, cov[:, :p, :p], slope))
    law = natural_arrays(theta, direct, units, runs.targets, runs.languages)
    if law.rates_by_source:
        of_rates = variance[:1, None, p + SOURCE_LAMBDA :][0]
        rate, known = np.sqrt(of_rates), repeated & (of_rates < _TELLING * hyperprior.repetition_sd**2)
    else:
        rate, known = deviation[:, LOG_LAMBDA, None], (told[:, LOG_LAMBDA] & repeated[: len(theta)])[:, None]
    end = TAU + law.tau.shape[1]
    spread = np.sqrt(variance[:, TAU:end])
    own = np.eye(*spread.shape, dtype=bool)
    hidden = confounded[:, None] & ~own
    tau = np.where(hidden, _UNKNOWN_TRANSFER[0], law.tau)
    columns = {
        name: _estimate(getattr(law, name), deviation[:, i], told[:, i], logarithmic=True)
        for name, i in (("E", LOG_E), ("A", LOG_A), ("alpha", LOG_ALPHA), ("B", LOG_B), ("beta", LOG_BETA))
    }
    columns["lam"] = _estimate(law.lam, rate, known, logarithmic=True)
    spread = np.where(own, 0.0, np.where(hidden, _UNKNOWN_TRANSFER[1], spread))
    columns["tau"] = _estimate(tau, spread, own | told[:, TAU:end] & ~hidden)
    if law.eta is not None:
        columns["eta"] = _estimate(law.eta, np.sqrt(variance[:, end]), told[:, end], logarithmic=True)
    capacity = variance[0, p + PHI]
    columns["phi"] = _estimate(law.phi, np.sqrt(capacity), capacity < _TELLING * hyperprior.capacity_sd**2)
    fields = ("value", "se", "low", "high", "identified")
    found = {
        field: dataclasses.replace(law, **{name: values[i] for name, values in columns.items()})
        for i, field in enumerate(fields)
    }
    _note_guesses(found["identified"], notes)
    return found


def _estimate(value: ArrayLike, deviation: ArrayLike, told: ArrayLike, logarithmic: bool = False) -> tuple:
    """Value, standard error, 90 % interval and verdict; of a positive parameter from the deviation of its logarithm."""
    if not logarithmic:
        return value, deviation, value - Z90 * deviation, value + Z90 * deviation, told
    middle = np.log(value)
    low, high = (np.exp(np.clip(middle + side * deviation, -_LARGEST, _LARGEST)) for side in (-Z90, Z90))
    return value, value * deviation, low, high, told


def _note_guesses(identified: JointLaw, notes: list[str]) -> None:
    guesses = [
        f"{target} from {source}"
        for target, row in zip(identified.targets, identified.tau, strict=True)
        for source, told in zip(identified.sources, row, strict=True)
        if not told
    ]
    if guesses:
        notes.append(f"{len(guesses)} transfer weights come from the prior, not from the runs: {_some(guesses)}")


def _some(names: list[str]) -> str:
    """The first names of a list that may be long.

    >>> _some(list("abcdefgh"))
    'a, b, c, d, e, f, …'
    """
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")


def _told(cov: np.ndarray, prior_variance: np.ndarray, sources: int, hyperprior: Hyperprior) -> np.ndarray:
    """[Lt, p] whether the data told each parameter of a block: its variance fell well below its prior's.

    The prior of an exponent, of η, and of a λ that the languages share, is the weak one before shrinkage: shrunk to
    the other languages it is still known. That of a τ is around the effect of its target: known pairs of the
    target do not make an unseen one known.
    """
    prior = prior_variance.copy()
    prior[:, [LOG_ALPHA, LOG_BETA]] = hyperprior.exponent_sd**2
    prior[:, LOG_LAMBDA] = hyperprior.repetition_sd**2
    prior[:, TAU + sources :] = hyperprior.substitution_sd**2
    return np.diagonal(cov, axis1=1, axis2=2)[:, : prior.shape[1]] < _TELLING * prior


def _repeated(runs: Runs, lambda_kind: str, notes: list[str]) -> np.ndarray:
    """[Ls] whether enough epochs were seen to tell λ of each language (of all, where they share it)."""
    epochs = runs.D / runs.U
    own = np.where(runs.target[:, None] == np.arange(len(runs.languages)), epochs, 0.0)
    most = {"source": epochs, "target": own, "shared": np.full_like(epochs, epochs.max())}[lambda_kind].max(0)
    names = {"source": runs.languages, "target": runs.targets, "shared": ("all languages",)}[lambda_kind]
    # Tokens of which no number of unique ones is known count no epochs.
    if unknown := [name for name, value in zip(names, most, strict=False) if value == 0]:
        notes.append(
            f"{', '.join(unknown)}: unique tokens not given, so lambda is not identified; 8 or more epochs tell it"
        )
    if few := {name: value for name, value in zip(names, most, strict=False) if 0 < value < _EPOCHS}:
        notes.append(
            f"{', '.join(few)}: at most {max(few.values()):.1f} epochs seen, so lambda is not identified; "
            "8 or more tell it"
        )
    return most >= _EPOCHS


def _judge_design(runs: Runs, t: int, told: np.ndarray, said: dict[str, list[str]]) -> bool:
    """Withdraws what the design of a target's runs leaves open, whatever the priors made of it.

    Returns whether B and the transfer weights are confounded; `said` gains the target under every verdict on it.
    """
    rows, name = runs.where(runs.target == t), runs.targets[t]
    shares = rows.shares[:, t]
    confounded = bool(shares.min() < 0.999 and np.ptp(shares) < _ALIKE)
    if confounded:
        told[[LOG_B, *range(TAU, len(told))]] = False
        verdict = (
            f"the own share is {shares.mean():.2f} in every run, so B and the transfer weights "
            "cannot be told apart; add a monolingual run or another proportion"
        )
        said.setdefault(verdict, []).append(name)
    for parameter, reason in diagnose_sizes({"N": rows.N, "D": rows.own(rows.D)}).items():
        told[{"E": LOG_E, "A": LOG_A, "alpha": LOG_ALPHA, "B": LOG_B, "beta": LOG_BETA}[parameter]] = False
        if parameter in ("alpha", "beta"):
            said.setdefault(f"{parameter} is not identified: {reason}", []).append(name)
    return confounded


def unsettled(rows: int, parameters: int, lowest_z: float, mixing: str) -> str:
    """What a fit says that did not settle, with what would mend it."""
    if rows < parameters:
        mend = f"{rows} rows are few for {parameters} parameters: add runs, or leave out sources"
    elif lowest_z < DISTORTED * GUARD and mixing == "sum":
        mend = "some runs are left next to no effective tokens: let languages substitute (--mixing=ces)"
    else:
        mend = "leave out runs whose losses contradict the others', or add runs on other mixtures"
    return f"the fit did not settle, so trust none of its numbers; {mend}"


def exponents_astray(state: State, hyperprior: Hyperprior, ces: bool = False) -> str:
    """Exponents whose middle over the targets is none that a law of losses has, in words; "" where there are none.

    >>> from types import SimpleNamespace as Space
    >>> theta = np.full((3, 7), np.log(0.33))
    >>> theta[:, LOG_BETA] = np.log(60.0)
    >>> exponents_astray(Space(x=Space(own=theta)), Hyperprior())
    'exponents ran off (beta to 60)'
    """
    middle, (usual, deviation) = np.median(state.x.own, 0), hyperprior.log_exponent
    alpha, beta, eta = middle[LOG_ALPHA], middle[LOG_BETA], middle[-1] if ces else 0.0
    near = {  # a NaN is not
        "alpha": (alpha, abs(alpha - usual) <= _ASTRAY * deviation),
        "beta": (beta, abs(beta - usual) <= _ASTRAY * deviation),
        "eta": (eta, eta <= _ETA_ASTRAY * hyperprior.substitution_sd),
    }
    far = [f"{name} to {np.exp(value):.3g}" for name, (value, is_near) in near.items() if not is_near]
    return f"exponents ran off ({', '.join(far)})" if far else ""


def sizes_astray(runs: Runs, weight: np.ndarray) -> str:
    """Sizes most of whose runs lost their weight, in words; "" where there are none.

    Of single runs some go astray. Where those of a size do together it is the law that misses them, and a fit without
    them would say the more surely how loss falls with N.
    """
    sizes = np.zeros(len(runs.run_ids))
    sizes[runs.run] = runs.N
    lost = np.asarray(weight)[: len(sizes)] < _LOST
    found = [N for N in np.unique(sizes[sizes > 0]) if (sizes == N).sum() >= _MANY and lost[sizes == N].mean() > 0.5]
    return ", ".join(f"{N:.6g}" for N in found)


def judge_runs(weights: dict[str, float], lowest_z: float, notes: list[str]) -> None:
    """Notes runs that lost their weight, and rows so low in effective tokens that the guard bends the law."""
    astray = [run for run, weight in weights.items() if weight < _LOST]
    if astray:
        notes.append(f"{len(astray)} runs do not follow the law of the others and lost their weight: {_some(astray)}")
    if lowest_z < DISTORTED * GUARD:
        notes.append(
            f"effective tokens fall to {lowest_z:.3g} of the tokens seen in some run: "
            "the law's guard distorts the fit there"
        )
