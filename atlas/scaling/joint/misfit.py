"""How far the joint law misses runs unlike those that it is fitted to, beyond what the fit owns to.

Noise and posterior know no error of form: what the law bends to follow passes for noise, or for parameters. So the
runs of most compute, and those of most languages, are predicted by the others, with noise, priors and weights as
fitted: a few Newton steps each from where the fit ended. What the losses lie off by, beyond noise and the deviation of
that prediction, is misfit.
"""

from collections.abc import Iterator

import jax
import numpy as np

from atlas.scaling.joint import rounds, system
from atlas.scaling.joint.system import Rows, State
from atlas.scaling.noise import HUBER_VARIANCE

_PART = 0.2  # of the runs are predicted by the others, as splits of a table hold out
_DECIMALS = 2  # of logarithms: what differs by less than a percent is alike, and not predicted from the others
_SETTLED = 0.05  # posterior standard deviations: finer than the misfit can be told
_KEPT = 0.5  # of a language's runs: where fewer remain, its prediction says little of the law's form
_END = 1.0 - 1e-9  # of a run's tokens: only its last rows count, since the others repeat them
_WINSOR, _STEPS = 3.0, 30  # expected deviations at which an error is winsorised, and steps of the fixed point


def misfit(rows: Rows, state: State, spreads: rounds.Spreads) -> float:
    """Standard deviation, in log loss, of what the law misses of unlike runs; 0 where nothing tells.

    The larger of what is missed of the runs of most compute and of those of most languages, runs that lost their weight
    included: whether one diverged or the form misses it cannot be told, and a new run can do either. Few runs tell it,
    so that a standard error is added: an interval too narrow misleads, one too wide does not.

    Args:
      rows, state, spreads: of a fit at its optimum.
    """
    weight, sigma2 = np.asarray(state.noise.run_weight), float(state.noise.variance) / HUBER_VARIANCE
    with jax.enable_x64(True):
        linear = system.linearise(state, rows)
        found = [0.0]
        for held in _unlike(rows, weight):
            others = state._replace(noise=state.noise._replace(run_weight=np.where(held, 0.0, weight)))
            end = rounds.settle(others, linear, rows, spreads, _SETTLED)
            asked = _asked(rows, held)
            error = (rows.log_loss - np.asarray(end.linear.log_loss))[asked]
            slope, target = np.asarray(end.linear.jacobian)[asked], np.nonzero(asked)[0]
            variance = np.einsum("np,npk,nk->n", slope, np.asarray(end.covariance)[target], slope)
            found.append(_excess(error, variance + sigma2, _runs_of(rows)[asked]))
    return float(np.sqrt(max(found)))


def _unlike(rows: Rows, weight: np.ndarray) -> Iterator[np.ndarray]:
    """[runs] bool: at most a fifth of the runs, those of strictly most compute, then those of most languages."""
    on, run = np.asarray(rows.weight) > 0, _runs_of(rows)
    for size in (np.log(rows.N * np.sum(rows.D, -1)), np.log(rows.languages)):
        most = np.full(len(weight), -np.inf)
        np.maximum.at(most, run[on], np.round(size[on], _DECIMALS))
        ordered = np.sort(most[np.isfinite(most)])[::-1]
        held = most > ordered[int(_PART * len(ordered))]
        if held.any():
            yield held


def _runs_of(rows: Rows) -> np.ndarray:
    """[t, r] the run of every row."""
    return np.take_along_axis(np.asarray(rows.group_run), np.asarray(rows.group), 1)


def _asked(rows: Rows, held: np.ndarray) -> np.ndarray:
    """[t, r] whether a row ends a held run, in a language of which the other runs tell enough."""
    on, run, tokens = np.asarray(rows.weight) > 0, _runs_of(rows), np.sum(rows.D, -1)
    last = np.zeros(len(held))
    np.maximum.at(last, run[on], tokens[on])
    present = np.asarray(rows.group_size) > 0
    kept = np.sum(present & ~held[rows.group_run], 1) >= _KEPT * np.sum(present, 1)
    return on & held[run] & (tokens >= _END * last[run]) & kept[:, None]


def _excess(error: np.ndarray, variance: np.ndarray, run: np.ndarray) -> float:
    """Mean square of errors [n] beyond their variances [n], with a standard error from the runs [n]; 0 or more.

    >>> _excess(np.array([3.0, -3.0, 3.0, -3.0]), np.ones(4), np.arange(4))
    8.0
    """
    ids, run = np.unique(run, return_inverse=True)
    if len(ids) < 2:
        return 0.0
    excess = 0.0
    for _ in range(_STEPS):
        beyond = np.minimum(error**2, _WINSOR**2 * (variance + excess)) - variance
        excess = max(float(np.mean(beyond)), 0.0)
    by_run = np.bincount(run, beyond - np.mean(beyond))
    doubt = float(np.sqrt(np.sum(by_run**2) * len(ids) / (len(ids) - 1))) / len(error)
    total = float(np.mean(beyond)) + doubt
    return total if np.isfinite(total) and total > 0 else 0.0
