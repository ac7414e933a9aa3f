"""What a fit reports: estimates with intervals and verdicts, and the document made of them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Z90 = 1.6448536269514722  # a normal lies within ± this many standard deviations with probability 90 %
_NODES = 24  # of a Gauss rule, which is exact to rounding on so smooth an integrand
_NEWTON = 30  # steps, of which the fewest degrees of freedom need most


def quantile95(freedom: float) -> float:
    """What Student's t with these degrees of freedom, 1 or more, exceeds with probability 5 %.

    With t = √ν·tan θ its density is c·cos^{ν−1} θ, so that Newton's steps rise from the normal's quantile without
    passing the root. scipy.special.stdtrit gives the same, and costs a process half a second of imports.

    >>> [round(quantile95(freedom), 6) for freedom in (1.0, 4.5, 1e6)]
    [6.313752, 2.065576, 1.644855]
    """
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    theta = math.atan(Z90 / math.sqrt(freedom))
    for _ in range(_NEWTON):
        area = theta / 2 * float(weights @ np.cos(theta / 2 * (1 + nodes)) ** (freedom - 1))
        theta += (0.45 / constant - area) / math.cos(theta) ** (freedom - 1)
    return math.sqrt(freedom) * math.tan(theta)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A parameter: its value, standard error, 90 % interval, and whether the data determine it."""

    value: float
    se: float
    low: float
    high: float
    identified: bool

    @classmethod
    def normal(cls, value: float, deviation: float, identified: bool, quantile: float = Z90) -> "Estimate":
        reach = quantile * deviation
        return cls(float(value), float(deviation), float(value - reach), float(value + reach), bool(identified))

    @classmethod
    def lognormal(cls, log_value: float, deviation: float, identified: bool, quantile: float = Z90) -> "Estimate":
        """A positive parameter whose logarithm is estimated: the interval is symmetric in the logarithm."""
        value, low, high = np.exp(np.clip(log_value + deviation * np.array([0.0, -quantile, quantile]), -700.0, 700.0))
        return cls(float(value), float(value * deviation), float(low), float(high), bool(identified))


def r2(loss: np.ndarray, predicted: np.ndarray) -> float:
    """Coefficient of determination of losses [n]; NaN where they are all alike.

    >>> r2(np.array([1.0, 2.0]), np.array([1.0, 2.0])), r2(np.ones(1), np.ones(1))
    (1.0, nan)
    """
    spread = np.sum((loss - np.mean(loss)) ** 2)
    return float(1.0 - np.sum((loss - predicted) ** 2) / spread) if spread > 0 else float("nan")


def relative_error(loss: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """[n] absolute errors over the losses [n]; over their mean size where losses of any sign are among them."""
    unit = loss if np.all(loss > 0) else np.mean(np.abs(loss))
    return np.abs(predicted - loss) / unit


_DISTINCT, _DECIMALS = 3, 2  # values that an exponent needs; sizes within 1 % of one another count as one
_RATIO_SPREAD = 0.03  # of log D/N: below it the two terms of a power law are one


def diagnose_sizes(batch: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Parameters of E + A/N^α + B/D^β that N and D [n] leave open even without noise, with the reason.

    >>> sorted(diagnose_sizes({"N": np.array([1.0, 2.0, 1.0, 2.0]), "D": np.array([1.0, 2.0, 3.0, 4.0])}))
    ['A', 'E', 'alpha']
    """
    found: dict[str, str] = {}
    N, D = batch["N"], batch["D"]
    for values, names, what in ((N, ("E", "A", "alpha"), "model sizes"), (D, ("E", "B", "beta"), "token counts")):
        distinct = len(np.unique(np.log(values).round(_DECIMALS)))
        if distinct < _DISTINCT:
            reason = f"{distinct} distinct {what} cannot give an exponent; {_DISTINCT} or more can"
            found |= {name: found.get(name, reason) for name in names}
    if not found and np.std(np.log(D / N)) < _RATIO_SPREAD:
        found = dict.fromkeys(("A", "alpha", "B", "beta"), "tokens are always the same multiple of parameters; vary it")
    return found


def document(law: str, fit: Any, holdout: Mapping | None) -> dict:
    """A fit as plain values, ready for json.dumps; a number that is not finite becomes None."""
    parameters = {name: dataclasses.asdict(estimate) for name, estimate in fit.parameters.items()}
    plain = {
        "law": law,
        "objective": fit.objective,
        "converged": fit.converged,
        "n_rows": fit.n_rows,
        "n_runs": fit.n_runs,
        "parameters": parameters,
        "holdout": dict(holdout or {}),
        "warnings": list(fit.warnings),
    }
    return finite(plain)


def finite(value: Any) -> Any:
    """A tree of plain values with None for every number that JSON cannot hold."""
    if isinstance(value, Mapping):
        return {key: finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [finite(child) for child in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
