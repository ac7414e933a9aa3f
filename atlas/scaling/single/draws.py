"""Laws drawn from what a fit of one law leaves open, for bands around a plan.

A plan made from point estimates promises too much where the runs left the law open. Each draw is a law that
the runs allow; how a plan fares under each of them is its band.
"""

from collections.abc import Mapping

import numpy as np

# The coefficients of a law move with their exponents; the terms at the middle of the runs do not.
_LEVELS = ("E", "A", "B")
_TERMS = {"A": ("N", "alpha"), "B": ("D", "beta")}


def band(values: np.ndarray) -> tuple[float, float]:
    """5 % and 95 % quantiles of draws [n], those that are not numbers left out.

    >>> [round(bound, 6) for bound in band(np.arange(101.0))]
    [5.0, 95.0]
    """
    low, high = np.nanquantile(values, [0.05, 0.95])
    return float(low), float(high)


def law_draws(document: Mapping, count: int, seed: int = 0) -> dict[str, np.ndarray] | None:
    """Parameters [count] by name of laws drawn from the fit of one law, as its fit.json holds it.

    Student's t in the logarithms of positive parameters, but in the values of E and of the two terms at the middle
    of the runs: there the loss is linear in them, and what the runs fix together stays fixed.

    Args:
      document: with "parameters", and "covariance": its coordinates ("log A", …), the matrix over them, the
        centre (geometric means of the runs' N and D) and the degrees of freedom.
      count: number of draws.
      seed: of the draws.

    Returns:
      None where the document holds no covariance, or one that is not finite.
    """
    found = document.get("covariance")
    if not found or any(value is None for row in found["matrix"] for value in row):
        return None
    names = [name.removeprefix("log ") for name in found["coordinates"]]
    logged = np.array([name.startswith("log ") for name in found["coordinates"]])
    value = np.array([document["parameters"][name]["value"] for name in names], float)
    middle = np.where(logged, np.log(np.where(logged, value, 1.0)), value)
    pairs = _pairs(names, found["centre"])
    to_terms = np.eye(len(names))
    for i, j, unit in pairs:
        to_terms[i, j] = -value[j] * unit
        middle[i] -= value[j] * unit
    matrix = to_terms @ np.array(found["matrix"]) @ to_terms.T
    moved = _student(matrix, float(found["freedom"]), count, np.random.default_rng(seed))
    drawn = middle + np.where([name in _LEVELS for name in names], linear_in_value(moved), moved)
    for i, j, unit in pairs:
        drawn[:, i] += np.exp(drawn[:, j]) * unit
    return {name: np.exp(x) if log else x for name, x, log in zip(names, drawn.T, logged, strict=True)}


def linear_in_value(moved: np.ndarray) -> np.ndarray:
    """Change of a logarithm that changes its value by as much as the linearised one does; a tenth is left at least.

    E and the terms trade off against each other at a constant sum. Drawn in logarithms, the sum would rise with
    every draw, by the curvature of the exponential, and a band of the loss would lie above the data.
    """
    return np.log(np.maximum(1.0 + moved, 0.1))


def _pairs(names: list[str], centre: Mapping[str, float]) -> list[tuple[int, int, float]]:
    """(coefficient, its exponent, log of the column's middle) as indices; a law with one exponent ties both."""
    found = []
    for coefficient, (column, exponent) in _TERMS.items():
        exponent = exponent if exponent in names else "alpha"
        if coefficient in names and exponent in names and column in centre:
            found.append((names.index(coefficient), names.index(exponent), float(np.log(centre[column]))))
    return found


def _student(matrix: np.ndarray, freedom: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """[count, p] draws of a multivariate t around 0."""
    values, vectors = np.linalg.eigh(matrix)
    # Rounding may have left the covariance indefinite.
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    return rng.normal(size=(count, len(matrix))) @ root.T * np.sqrt(freedom / rng.chisquare(freedom, (count, 1)))
