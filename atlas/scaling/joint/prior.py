"""Priors of the joint fit: what the law of one language may borrow from the laws of the others.

A transfer weight is drawn to μ + what a common family adds + what a common script adds + the effect of its target,
which moves all weights of the target together (in the published transfer matrix the target alone explains 83 % of
the variance). Pairs within and across families keep to that with a spread of their own. Means and additions are shared
parameters of the fit; every spread, and how far an addition may go from 0, is estimated from the runs (empirical
Bayes), so labels that tell nothing cost little.
"""

from collections.abc import Mapping

import numpy as np

from atlas.errors import UserError, unknown
from atlas.scaling.joint import system as posterior
from atlas.scaling.joint.rounds import Spreads
from atlas.scaling.joint.system import LOG_ALPHA, LOG_BETA, LOG_LAMBDA, TAU
from atlas.scaling.table.runs import Runs

TAU_PRIORS = ("targets", "pairs", "flat")
LAMBDA_KINDS = ("target", "shared", "source")
EXPONENT = (np.log(0.33), 0.7)  # of the mean log exponents
CAPACITY = 0.15  # of φ, around 0
LAMBDA = (np.log(0.1), 0.7)  # of the mean log λ, or of each where they belong to the sources
_PINNED = 1e-10  # prior variance of a parameter that is known
_LEVEL = {"log E": 0.7, "a": 1.5, "b": 1.5}  # prior standard deviations of the three terms' logs
_TRANSFER = (0.1, 0.2)  # of the mean τ
_CONTRAST = (0.0, 0.2)  # of what a common family or script adds to it
_FLAT = 2.0  # standard deviation of τ around 0 where nothing is borrowed
_EXPONENT_SPREAD = (2.0, 0.15)  # pseudo-observations and standard deviation that each spread is drawn to
_LAMBDA_SPREAD = (2.0, 0.7)
_TRANSFER_SPREAD = (3.0, 0.15)
_KIND_SPREAD = (12.0, np.nan)  # drawn to the spread of all kinds together
_CONTRAST_SPREAD = (0.3, 0.03)
_EFFECT_SPREAD = (2.0, 0.05)
_START_SPREAD = 0.3
_START_EFFECT = 0.1


def joint_prior(
    runs: Runs,
    families: Mapping[str, str] | None,
    scripts: Mapping[str, str] | None,
    tau_prior: str,
    lambda_kind: str,
    capacity: bool,
) -> tuple[posterior.Prior, Spreads]:
    """The prior before the runs have told its spreads, and which of them they shall tell; see `fit_joint`."""
    Lt, Ls = len(runs.targets), len(runs.languages)
    kinds = _kinds(runs, families) if tau_prior != "flat" else np.empty((0, Lt, Ls))
    labels = [*kinds[1:], *([_same(runs, scripts)] if tau_prior != "flat" and scripts else [])]
    pairs = np.array([kinds.sum(0), *labels]) if len(kinds) else kinds
    means = _means(pairs, lambda_kind)
    direct = _direct(Ls, lambda_kind, capacity)
    base, variance = _blocks(runs, tau_prior, lambda_kind)
    other = ~np.eye(Lt, Ls, dtype=bool)
    effect = np.zeros((Lt, TAU + Ls))
    effect[:, TAU:] = other & (tau_prior == "targets")
    shared = np.concatenate([direct, means[1]])
    prior = posterior.Prior(
        base, means[0], variance, effect, np.float64(_START_EFFECT**2), shared[:, 0], shared[:, 1] ** -2.0
    )
    return prior, _spreads(kinds, Lt, Ls, np.arange(len(shared)) >= len(shared) - len(labels), lambda_kind)


def check_options(
    languages: tuple[str, ...],
    families: Mapping[str, str] | None,
    scripts: Mapping[str, str] | None,
    tau_prior: str,
    lambda_kind: str,
) -> None:
    """Raises a UserError for labels of an unknown language, or an unknown kind of prior."""
    for labels in (families, scripts):
        for name in set(labels or {}) - set(languages):
            raise unknown("language", name, languages)
    for what, value, known in (("tau prior", tau_prior, TAU_PRIORS), ("kind of lambda", lambda_kind, LAMBDA_KINDS)):
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


def _means(pairs: np.ndarray, lambda_kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Selector [Lt, p, k] of the means that blocks are drawn to, and mean and deviation [k, 2] of each."""
    count, Lt, Ls = pairs.shape
    rates = int(lambda_kind != "source")
    selector = np.zeros((Lt, TAU + Ls, 2 + rates + count))
    selector[:, LOG_ALPHA, 0] = selector[:, LOG_BETA, 1] = 1.0
    selector[:, LOG_LAMBDA, 2 : 2 + rates] = 1.0
    selector[:, TAU:, 2 + rates :] = np.moveaxis(pairs, 0, -1)
    of_pairs = [_TRANSFER] + [_CONTRAST] * (count - 1) if count else []
    return selector, np.array([EXPONENT, EXPONENT] + [LAMBDA] * rates + of_pairs)


def _direct(Ls: int, lambda_kind: str, capacity: bool) -> np.ndarray:
    """[h, 2] mean and deviation of φ, and of log λ of every source where repetition belongs to the sources."""
    phi = (0.0, CAPACITY if capacity else _PINNED**0.5)
    return np.array([phi] + [LAMBDA] * (Ls if lambda_kind == "source" else 0))


def _blocks(runs: Runs, tau_prior: str, lambda_kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Centre and variance [Lt, p] of what is not drawn to a mean."""
    Lt, Ls = len(runs.targets), len(runs.languages)
    base, deviation = np.zeros((Lt, TAU + Ls)), np.full((Lt, TAU + Ls), _START_SPREAD)
    for t in range(Lt):
        losses = runs.loss[runs.target == t]
        base[t, posterior.LOG_E] = np.log(0.6 * losses.min())
        base[t, [posterior.LOG_A, posterior.LOG_B]] = np.log(0.2 * np.median(losses))
    deviation[:, [posterior.LOG_E, posterior.LOG_A, posterior.LOG_B]] = list(_LEVEL.values())
    # Around the mean of all, or tied to it; idle where repetition belongs to the sources.
    rate = {"target": (0.0, _LAMBDA_SPREAD[1]), "shared": (0.0, _PINNED**0.5), "source": LAMBDA}
    base[:, LOG_LAMBDA], deviation[:, LOG_LAMBDA] = rate[lambda_kind]
    if tau_prior == "flat":
        deviation[:, TAU:] = _FLAT
    own = np.arange(Lt)
    base[own, TAU + own], deviation[own, TAU + own] = 1.0, _PINNED**0.5
    return base, deviation**2


def _spreads(kinds: np.ndarray, Lt: int, Ls: int, contrast: np.ndarray, lambda_kind: str) -> Spreads:
    member = np.zeros((Lt, TAU + Ls, 3 + len(kinds)))
    member[:, LOG_ALPHA, 0] = member[:, LOG_BETA, 1] = 1.0
    member[:, LOG_LAMBDA, 2] = lambda_kind == "target"
    member[:, TAU:, 3:] = np.moveaxis(kinds, 0, -1)
    drawn = np.array([_EXPONENT_SPREAD] * 2 + [_LAMBDA_SPREAD] + [_KIND_SPREAD] * len(kinds))
    alike = np.arange(len(drawn)) >= 3
    return Spreads(
        member,
        drawn,
        alike.astype(float),
        np.array(_TRANSFER_SPREAD),
        np.array(_EFFECT_SPREAD),
        contrast.astype(float),
        np.array(_CONTRAST_SPREAD),
    )
