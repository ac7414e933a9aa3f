"""Which law: held-out error and information criteria of several laws on the same rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from atlas.scaling.estimates import quantile95, r2, relative_error
from atlas.scaling.single.fit import fit, reading, warm_up_for
from atlas.scaling.single.fitted import Fit
from atlas.scaling.single.specification import Law
from atlas.scaling.table.runs import Runs
from atlas.scaling.table.splits import past_warm_up, split_runs
from checked import UserError


def compare(
    laws: Sequence[str | Law], runs: Runs, split: str = "top_compute", *, seed: int = 0, **options: Any
) -> pd.DataFrame:
    """Fits laws to all runs, and to the runs that a split leaves, and ranks them.

    All laws are fitted to the same rows, behind the longest warm-up that one of them asks for on the rows left by the
    split. A law whose held-out error exceeds the least by no more than its standard error over runs counts as good as
    the best, and so does each where one run is held out, which has no such error; among those the lower BIC ranks
    first. The criteria take the residuals' density to be the one that the Huber loss stands for, with its scale
    estimated, and divide the likelihood by how far rows of a run repeat each other under the law of most parameters,
    as QAIC divides by the dispersion of the global model.

    Args:
      laws: of one language, by name or themselves, two or more.
      runs: rows of one target language.
      split, seed: see `split_runs`.
      options: for `fit`.

    Returns:
      A row per law, best first: law, are (held-out mean absolute relative error), r2, excess (are less the least),
      excess_se, excess_low and excess_high (its 90 % interval, paired by row, Student's over runs; NaN of one run),
      aicc, bic (less the least of each), parameters, converged, agreeing, warm_up (the part of each run left out).

    >>> compare(["chinchilla"], None)  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    checked.UserError: a comparison needs two laws or more
    """
    if len(laws) < 2:
        raise UserError("a comparison needs two laws or more")
    train, test = split_runs(runs, split, seed=seed)
    test = past_warm_up(test, options.get("warm_up"))
    for law in laws:
        reading(law, runs, **options)  # of all rows: the parts may hide what is refused, such as several languages
    options |= {"warm_up": max(warm_up_for(law, train, **options) for law in laws)}
    fits = [fit(law, runs, **options) for law in laws]
    effective = max(fits, key=lambda found: len(found.x)).diagnostics.independent_rows
    rows, errors = [], []
    for law, whole in zip(laws, fits, strict=True):
        predicted = predict_others(law, train, test, **options)
        errors.append(relative_error(test.loss, predicted))
        aicc, bic = criteria(whole, effective)
        rows.append(
            {
                "law": whole.law,
                "are": float(errors[-1].mean()),
                "r2": r2(test.loss, predicted),
                "aicc": aicc,
                "bic": bic,
                "parameters": len(whole.x),
                "converged": whole.converged,
                "agreeing": whole.starts_agreeing,
                "warm_up": options["warm_up"],
            }
        )
    table = pd.DataFrame(rows)
    best = errors[int(np.argmin(table["are"]))]
    table.insert(3, "excess", [float(np.mean(error - best)) for error in errors])
    table.insert(4, "excess_se", [_standard_error(error - best, test.run) for error in errors])
    quantile = quantile95(max(len(np.unique(test.run)) - 1.0, 1.0))
    for at, (name, sign) in enumerate((("excess_low", -1.0), ("excess_high", 1.0)), 5):
        table.insert(at, name, table["excess"] + sign * quantile * table["excess_se"])
    for name in ("aicc", "bic"):
        table[name] -= table[name].min()
    tied = ~(table["excess"] > table["excess_se"])  # an error that is not known tells none apart
    order = np.lexsort((np.where(tied, table["bic"], table["are"]), ~tied))
    return table.iloc[order].reset_index(drop=True)


def predict_others(law: str | Law, train: Runs, test: Runs, **options: Any) -> np.ndarray:
    """[n] losses of the rows of `test` by a law of one language, fitted to that language's rows of `train`.

    NaN for languages that `train` lacks. Options are those of `fit`.
    """
    predicted = np.full(len(test), np.nan)
    for language in np.intersect1d(train.target, test.target):
        rows = test.target == language
        fitted = fit(law, train.where(train.target == language), **options)
        predicted[rows] = fitted.predict_runs(test.where(rows))[0]
    return predicted


def _standard_error(difference: np.ndarray, run: np.ndarray) -> float:
    """Of the mean of differences [n], those of one run together; NaN of one run."""
    by_run = pd.Series(difference - difference.mean()).groupby(run).sum().to_numpy()
    count = len(by_run)
    return float(np.sqrt(np.sum(by_run**2) * count / (count - 1)) / len(difference)) if count > 1 else float("nan")


def criteria(fitted: Fit, effective: float) -> tuple[float, float]:
    """AICc and BIC of a fit: less is better, comparable between laws on the same rows and objective.

    effective: how many independent rows tell as much, the same for all laws: by its own number each would weigh the
    unit of the losses otherwise.
    """
    free = len(fitted.x) + 1
    deviance = -2.0 * _log_likelihood(fitted) * effective / fitted.n_rows
    correction = 2.0 * free * (free + 1) / max(effective - free - 1, 1.0)
    return deviance + 2.0 * free + correction, deviance + free * float(np.log(effective))


# The scale at which the likelihood is highest is looked for on a grid: neighbours differ by 1 %, so that the likelihood
# of n rows is within n·3e-5 of its maximum.
_SCALES = np.geomspace(1e-14, 1e2, 3000)
_NODES = 200  # of Gauss and Legendre, exact to rounding for the middle of the density
_REACH = 12.0  # standard deviations, beyond which a normal density is 0 to rounding


def _log_likelihood(fitted: Fit) -> float:
    """Of the losses, by the density exp(−huber(r)/s)/Z(s) of their residuals at the scale s that maximises it."""
    corner = float(fitted.problem.corner)
    # Z = ∫ exp(−huber(r)/s) dr, its quadratic middle by quadrature and its exponential tails in closed form.
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    reach = np.minimum(corner, _REACH * np.sqrt(_SCALES))
    r = 0.5 * reach * (nodes[:, None] + 1.0)
    middle = np.sum(weights[:, None] * reach * np.exp(-(r**2) / (2.0 * _SCALES)), axis=0)
    tails = 2.0 * _SCALES / corner * np.exp(-(corner**2) / (2.0 * _SCALES))
    best = float(np.max(-fitted.objective / _SCALES - fitted.n_rows * np.log(middle + tails)))
    # A density of log losses is one of losses once divided by them.
    return best - float(fitted.problem.weight @ fitted.problem.observed) if fitted.model.residual == "log" else best
