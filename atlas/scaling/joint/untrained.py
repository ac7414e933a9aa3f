"""Losses of languages that a run does not train, which the joint law leaves out.

They start from a level of their own: a trained language's first tokens gain what no other language gives, and more
tokens of others may raise the loss of a language that is not trained. So every target has a law of its own for them,
log L = level + a·log N + d·log D + Σ γ_s·√share_s, with a noise of its own: a regression whose slopes have wide normal
priors. It is the data mixing law (arXiv 2403.16952) without its constant, which so few rows do not tell, but for the
root: the first tokens of a language tell most, here as where the joint law lets languages substitute for one another,
and held-out rows of RegMix and of our own studies are predicted better by roots than by shares.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from atlas.scaling.joint.system import Units
from atlas.scaling.table.runs import Runs

_LEVEL, _SLOPE, _SHARE = 10.0, 0.5, 1.0  # prior standard deviations, in log loss: of exponents, and of a share of 1
_LEAST = 8  # runs that tell a target's
_FLOOR = 1e-8  # of a variance of log losses
_STEPS = 20  # of the noise's fixed point


class Untrained(NamedTuple):
    """The regressions of all targets; of those that too few runs tell, nothing."""

    mean: np.ndarray  # [Lt, 3 + Ls] level, slopes of log N, of log D and of the roots of shares
    covariance: np.ndarray  # [Lt, 3 + Ls, 3 + Ls]
    noise: np.ndarray  # [Lt] standard deviation of log losses
    told: np.ndarray  # [Lt] bool

    def applies(self, D: np.ndarray, target: np.ndarray) -> np.ndarray:
        """[m] whether points of tokens [m, Ls] leave out their target, of which a regression is known."""
        return self.told[target] & (D[np.arange(len(D)), target] == 0)

    def predict(self, N: np.ndarray, D: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log losses [m] and their standard deviations, without noise; N [m] and D [m, Ls] in the fit's units."""
        x = _columns(N, D)
        spread = np.einsum("mq,mqk,mk->m", x, self.covariance[target], x)
        return np.einsum("mq,mq->m", x, self.mean[target]), np.sqrt(spread)


def fit_untrained(runs: Runs, targets: Sequence[str], sources: Sequence[str], units: Units) -> Untrained:
    """The regressions of all targets, from those rows of a whole table that their runs do not train."""
    left_out, D = runs.own(runs.D) == 0, runs.aligned(sources)[0]
    x, y = _columns(runs.N / units.N, D / units.D), np.log(runs.loss)
    language = np.asarray(runs.languages)[runs.target]
    found = [_regression(x[rows], y[rows], runs.run[rows]) for rows in (left_out & (language == t) for t in targets)]
    return Untrained(*map(np.stack, zip(*found, strict=True)))


def _columns(N: np.ndarray, D: np.ndarray) -> np.ndarray:
    total = D.sum(-1)
    return np.column_stack([np.ones(len(N)), np.log(N), np.log(total), np.sqrt(D / total[:, None])])


def _regression(x: np.ndarray, y: np.ndarray, run: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean, covariance, noise and whether told, of rows [n, q] and [n]; the rows of a run count as one."""
    count = len(np.unique(run))
    prior = 1.0 / np.array([_LEVEL, _SLOPE, _SLOPE, *[_SHARE] * (x.shape[1] - 3)]) ** 2
    mean, covariance, variance = np.zeros(x.shape[1]), np.diag(1.0 / prior), np.inf
    if count >= _LEAST:
        weight = 1.0 / np.bincount(run)[run]
        square, variance = x.T @ (weight[:, None] * x), max(float(np.var(y)), _FLOOR)
        for _ in range(_STEPS):
            covariance = np.linalg.inv(square / variance + np.diag(prior))
            mean = covariance @ (x.T @ (weight * y)) / variance
            used = np.trace(covariance @ square) / variance
            variance = max(float(weight @ (y - x @ mean) ** 2 / max(count - used, 1.0)), _FLOOR)
    return mean, covariance, np.sqrt(variance), np.array(count >= _LEAST)
