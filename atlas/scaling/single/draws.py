"""Laws drawn from what a fit of one law leaves open, for bands around a plan.

A plan made from point estimates promises too much where the runs left the law open. Each draw is a law that
the runs allow; how a plan fares under each of them is its band.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from atlas.scaling.estimates import Z90
from atlas.scaling.single.library import law_named
from checked import UserError

Seed = int | Sequence[int]

_BITS = 30  # of Sobol's points, which lie in the middle of their cells: none is at 0


def band(values: np.ndarray) -> tuple[float, float]:
    """5 % and 95 % quantiles of draws [n], those that are not numbers left out.

    >>> [round(bound, 6) for bound in band(np.arange(101.0))]
    [5.0, 95.0]
    """
    # Between an infinite value and another there is none.
    method = "nearest" if np.isinf(values).any() else "linear"
    low, high = np.nanquantile(values, [0.05, 0.95], method=method)
    return float(low), float(high)


def run_band(loss: float, low: float, high: float, noise: float) -> tuple[float, float]:
    """The 90 % band of a new run from that of the law, and a new run's deviation from it in log loss.

    >>> low, high = run_band(2.0, 2.0, 2.0, 0.01 / Z90)
    >>> round(2.0 / low, 6) == round(high / 2.0, 6) == round(float(np.exp(0.01)), 6)
    True
    """
    below, above = np.hypot(np.log([loss / low, high / loss]), Z90 * noise)
    return float(loss * np.exp(-below)), float(loss * np.exp(above))


def law_draws(document: Mapping, count: int, seed: Seed = 0, even: bool = False) -> dict[str, np.ndarray] | None:
    """Parameters [count] by name of laws drawn from the fit of one law, as its fit.json holds it.

    Student's t in the logarithms of positive parameters, but in the values of E and of the terms at the middle of the
    runs: there the loss is linear in them, and what the runs fix together stays fixed.

    Args:
      document: with "law", "parameters", and "covariance": the matrix over the fitted values, the centre (geometric
        means of the runs' N and D) and the degrees of freedom.
      count: number of draws.
      seed: of the draws.
      even: spread them evenly, by Sobol's points in random digits (best for powers of two): what is averaged over them
        is known as well as over hundreds of times as many independent ones.

    Returns:
      None where the document holds no covariance, or one that is not finite.

    Raises:
      UserError: what it holds is no covariance of the law's parameters.
    """
    found = document.get("covariance")
    if not found or "law" not in document:
        return None
    law = law_named(document["law"])
    try:
        value = np.array([document["parameters"][name]["value"] for name in law.names], float)
        matrix, freedom = np.array(found["matrix"], float), float(found["freedom"])
        centre = {column: float(found["centre"][column]) for _, _, column in law.terms()}
        if matrix.shape != 2 * value.shape or not freedom >= 1.0:
            raise ValueError(f"{matrix.shape} numbers and {freedom:g} degrees of freedom")
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__} {error}"
        raise UserError(f"the fit has no covariance of its parameters ({reason}); fit its runs again") from None
    if not (np.isfinite(matrix).all() and np.isfinite(value).all()):
        return None
    middle = np.log(value, where=[p.positive for p in law.parameters], out=value.copy())
    to_terms = law.to_terms(middle, centre)
    moved = (_evenly if even else _independently)(to_terms @ matrix @ to_terms.T, freedom, count, seed)
    linear = [p.role == "level" or p.scale is not None for p in law.parameters]
    drawn = middle + np.where(linear, linear_in_value(moved), moved)
    with np.errstate(over="ignore"):  # of exponents that the runs leave open
        # Coefficients move with their exponents; the terms at the middle of the runs do not.
        for i, j, column in law.terms():
            drawn[:, i] += np.log(centre[column]) * (np.exp(drawn[:, j]) - np.exp(middle[j]))
        return {p.name: np.exp(x) if p.positive else x for p, x in zip(law.parameters, drawn.T, strict=True)}


def _independently(covariance: np.ndarray, freedom: float, count: int, seed: Seed) -> np.ndarray:
    """[count, p] of Student's t."""
    rng = np.random.default_rng(seed)
    # Rounding may have left the covariance indefinite: its validity is not checked.
    moved = rng.multivariate_normal(np.zeros(len(covariance)), covariance, count, check_valid="ignore", method="eigh")
    return moved * np.sqrt(freedom / rng.chisquare(freedom, (count, 1)))


def _evenly(covariance: np.ndarray, freedom: float, count: int, seed: Seed) -> np.ndarray:
    """The same, from points of the unit cube: its first axis is the scale, the next are the widest directions."""
    from scipy.special import chdtri, ndtri  # with scipy.stats a second to import, which other fits need not wait for
    from scipy.stats.qmc import Sobol

    points = Sobol(1 + len(covariance), bits=_BITS, seed=np.random.default_rng(seed)).random(count) + 0.5**_BITS / 2
    variance, directions = np.linalg.eigh(covariance)
    widths = np.sqrt(np.maximum(variance[::-1], 0.0))
    moved = ndtri(points[:, 1:]) * widths @ directions[:, ::-1].T
    return moved * np.sqrt(freedom / chdtri(freedom, points[:, :1]))


def linear_in_value(moved: np.ndarray) -> np.ndarray:
    """Change of a logarithm that changes its value by as much as the linearised one does; a tenth is left at least.

    E and the terms trade off against each other at a constant sum. Drawn in logarithms, the sum would rise with
    every draw, by the curvature of the exponential, and a band of the loss would lie above the data.
    """
    return np.log(np.maximum(1.0 + moved, 0.1))
