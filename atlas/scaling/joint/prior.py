"""Priors of the joint fit: what the law of one language may borrow from the laws of the others.

A transfer weight is drawn to μ + what a common family adds + what a common script adds + the effect of its target,
which moves all weights of the target together (in the published transfer matrix the target alone explains 83 % of
the variance). Pairs within and across families keep to that with a spread of their own. Means and additions are shared
parameters of the fit; every spread, and how far an addition may go from 0, is estimated from the runs (empirical
Bayes), so labels that tell nothing cost little.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from atlas.scaling.joint.rounds import Spreads
from atlas.scaling.joint.system import LOG_A, LOG_ALPHA, LOG_B, LOG_BETA, LOG_E, LOG_LAMBDA, TAU, Prior
from atlas.scaling.table.runs import Runs
from checked import UserError, unknown

TAU_PRIORS = ("targets", "pairs", "flat")
LAMBDA_KINDS = ("target", "shared", "source")
MIXINGS = ("sum", "ces")
_PINNED = 1e-10  # prior variance of a parameter that is known: far below any posterior's, far above rounding
# Where the variances that the runs estimate begin; the rounds leave them at once.
_START_SPREAD, _START_EFFECT = 0.3, 0.1


@dataclasses.dataclass(frozen=True)
class Hyperprior:
    """The numbers of the prior. `_sd` are standard deviations; each `_spread` is a standard deviation between
    languages or pairs that the runs estimate, drawn to the value given here as if `_pseudo` observations had shown it.
    """

    # Fits to published families give exponents between .15 and .75; a factor of two either way.
    exponent: float = 0.33
    exponent_sd: float = 0.7  # of the mean log exponents
    # R* = 15 (Muennighoff et al. 2023) is λ = .065, and few epochs tell little; a factor of two either way.
    repetition: float = 0.1
    repetition_sd: float = 0.7  # of the mean log λ, or of each where they belong to the sources
    # η = 1 is the plain sum; domains of one language give .5 to .8.
    substitution_sd: float = 0.5  # of the mean log η, around 0
    # Published φ is .11; within it a doubling of K costs 18 % of N.
    capacity_sd: float = 0.15  # of φ, around 0
    # Levels start from the losses themselves: E from the least one, the terms from the median.
    floor_sd: float = 0.7  # of log E
    term_sd: float = 1.5  # of log A/N0^α and log B/D0^β
    # Published bilingual scores imply a mean τ of .1, and families that differ by as much.
    transfer: float = 0.1
    transfer_sd: float = 0.2  # of the mean τ
    contrast_sd: float = 0.2  # of what a common family or script adds to it
    flat_sd: float = 2.0  # of τ around 0 where nothing is borrowed
    # Exponents of languages differ by 6 to 8 % in published families; rates by half.
    exponent_spread: float = 0.15
    exponent_pseudo: float = 2.0
    repetition_spread: float = 0.7
    repetition_pseudo: float = 2.0
    substitution_spread: float = 0.2
    substitution_pseudo: float = 2.0
    transfer_spread: float = 0.15
    transfer_pseudo: float = 3.0
    kind_pseudo: float = 12.0  # of pairs within and across families, each drawn to the spread of all pairs together
    contrast_spread: float = 0.03  # small: labels that tell nothing must cost little
    contrast_pseudo: float = 0.3
    effect_spread: float = 0.05  # of what a target adds to all of its τ
    effect_pseudo: float = 2.0

    @property
    def log_exponent(self) -> tuple[float, float]:
        """Mean and standard deviation of the mean log exponents."""
        return float(np.log(self.exponent)), self.exponent_sd

    @property
    def log_repetition(self) -> tuple[float, float]:
        """Mean and standard deviation of the mean log λ."""
        return float(np.log(self.repetition)), self.repetition_sd


HYPERPRIOR = Hyperprior()


def joint_prior(
    runs: Runs,
    families: Mapping[str, str] | None = None,
    scripts: Mapping[str, str] | None = None,
    tau_prior: str = "targets",
    lambda_kind: str = "target",
    mixing: str = "sum",
    hyperprior: Hyperprior = HYPERPRIOR,
) -> tuple[Prior, Spreads]:
    """The prior before the runs have told its spreads, and which of them they shall tell; see `fit_joint`."""
    Lt, Ls = len(runs.targets), len(runs.languages)
    kinds = _kinds(runs, families) if tau_prior != "flat" else np.empty((0, Lt, Ls))
    labels = [*kinds[1:], *([_same(runs, scripts)] if tau_prior != "flat" and scripts else [])]
    pairs = np.array([kinds.sum(0), *labels]) if len(kinds) else kinds
    ces = int(mixing == "ces")
    selector, means = _means(pairs, lambda_kind, ces, hyperprior)
    rates = [hyperprior.log_repetition] * (Ls if lambda_kind == "source" else 0)
    shared = np.array([(0.0, hyperprior.capacity_sd), *rates, *means])
    base, variance = _blocks(runs, tau_prior, lambda_kind, ces, hyperprior)
    effect = np.zeros((Lt, TAU + Ls + ces))
    effect[:, TAU : TAU + Ls] = ~np.eye(Lt, Ls, dtype=bool) & (tau_prior == "targets")
    prior = Prior(base, selector, variance, effect, np.float64(_START_EFFECT**2), shared[:, 0], shared[:, 1] ** -2.0)
    contrast = np.arange(len(shared)) >= len(shared) - len(labels)
    return prior, _spreads(kinds, ces, contrast, lambda_kind, hyperprior)


def check_options(
    languages: tuple[str, ...],
    families: Mapping[str, str] | None,
    scripts: Mapping[str, str] | None,
    tau_prior: str,
    lambda_kind: str,
    mixing: str,
) -> None:
    """Raises a UserError for labels of an unknown language, or an unknown kind of prior."""
    for labels in (families, scripts):
        for name in set(labels or {}) - set(languages):
            raise unknown("language", name, languages)
    kinds = (tau_prior, TAU_PRIORS), (lambda_kind, LAMBDA_KINDS), (mixing, MIXINGS)
    for what, (value, known) in zip(("tau prior", "kind of lambda", "mixing"), kinds, strict=True):
        if value not in known:
            raise unknown(what, value, known)
    if tau_prior == "flat" and (families or scripts):
        raise UserError("labels of families or scripts mean nothing to the flat tau prior; drop them or use 'pairs'")


def _same(runs: Runs, labels: Mapping[str, str] | None) -> np.ndarray:
    """[Lt, Ls] whether two different languages have one label; languages without a label share it with none."""
    labels = labels or {}
    label = [labels.get(name) for name in runs.languages]
    pairs = [[a is not None and a == b and s != t for s, b in enumerate(label)] for t, a in enumerate(label)]
    return np.array(pairs, float)[: len(runs.targets)]


def _kinds(runs: Runs, families: Mapping[str, str] | None) -> np.ndarray:
    """[k, Lt, Ls] membership of pairs: across families (or all of them), then within one if there are any."""
    within = _same(runs, families)
    across = 1.0 - within - np.eye(*within.shape)
    return np.stack([across, within] if within.any() else [across])


def _means(pairs: np.ndarray, lambda_kind: str, ces: int, hyperprior: Hyperprior) -> tuple[np.ndarray, list]:
    """Selector [Lt, p, k] of the means that blocks are drawn to, and (mean, deviation) of each."""
    count, Lt, Ls = pairs.shape
    rates = int(lambda_kind != "source")
    before = 2 + rates + ces
    selector = np.zeros((Lt, TAU + Ls + ces, before + count))
    selector[:, LOG_ALPHA, 0] = selector[:, LOG_BETA, 1] = 1.0
    selector[:, LOG_LAMBDA, 2 : 2 + rates] = selector[:, TAU + Ls :, 2 + rates : before] = 1.0
    selector[:, TAU : TAU + Ls, before:] = np.moveaxis(pairs, 0, -1)
    of_pairs = [(hyperprior.transfer, hyperprior.transfer_sd)] + [(0.0, hyperprior.contrast_sd)] * (count - 1)
    own = [hyperprior.log_exponent] * 2 + [hyperprior.log_repetition] * rates
    return selector, own + [(0.0, hyperprior.substitution_sd)] * ces + of_pairs[:count]


def _blocks(
    runs: Runs, tau_prior: str, lambda_kind: str, ces: int, hyperprior: Hyperprior
) -> tuple[np.ndarray, np.ndarray]:
    """Centre and variance [Lt, p] of what is not drawn to a mean."""
    Lt, Ls = len(runs.targets), len(runs.languages)
    base, deviation = np.zeros((Lt, TAU + Ls + ces)), np.full((Lt, TAU + Ls + ces), _START_SPREAD)
    for t in range(Lt):
        losses = runs.loss[runs.target == t]
        # Part of the least loss seen, and of the median one, that E and each term make up in common studies.
        base[t, LOG_E] = np.log(0.6 * losses.min())
        base[t, [LOG_A, LOG_B]] = np.log(0.2 * np.median(losses))
    deviation[:, [LOG_E, LOG_A, LOG_B]] = hyperprior.floor_sd, hyperprior.term_sd, hyperprior.term_sd
    # Around the mean of all, or tied to it; idle where repetition belongs to the sources.
    rate = {
        "target": (0.0, hyperprior.repetition_spread),
        "shared": (0.0, _PINNED**0.5),
        "source": hyperprior.log_repetition,
    }
    base[:, LOG_LAMBDA], deviation[:, LOG_LAMBDA] = rate[lambda_kind]
    if tau_prior == "flat":
        deviation[:, TAU : TAU + Ls] = hyperprior.flat_sd
    own = np.arange(Lt)
    base[own, TAU + own], deviation[own, TAU + own] = 1.0, _PINNED**0.5
    return base, deviation**2


def _spreads(kinds: np.ndarray, ces: int, contrast: np.ndarray, lambda_kind: str, hyperprior: Hyperprior) -> Spreads:
    h, (count, Lt, Ls) = hyperprior, kinds.shape
    member = np.zeros((Lt, TAU + Ls + ces, 3 + ces + count))
    member[:, LOG_ALPHA, 0] = member[:, LOG_BETA, 1] = 1.0
    member[:, LOG_LAMBDA, 2] = lambda_kind == "target"
    member[:, TAU + Ls :, 3 : 3 + ces] = 1.0
    member[:, TAU : TAU + Ls, 3 + ces :] = np.moveaxis(kinds, 0, -1)
    own = [(h.exponent_pseudo, h.exponent_spread)] * 2 + [(h.repetition_pseudo, h.repetition_spread)]
    own += [(h.substitution_pseudo, h.substitution_spread)] * ces
    drawn = np.array(own + [(h.kind_pseudo, np.nan)] * len(kinds))  # to the spread of all kinds together
    return Spreads(
        member,
        drawn,
        (np.arange(len(drawn)) >= len(own)).astype(float),
        np.array([h.transfer_pseudo, h.transfer_spread]),
        np.array([h.effect_pseudo, h.effect_spread]),
        contrast.astype(float),
        np.array([h.contrast_pseudo, h.contrast_spread]),
    )
