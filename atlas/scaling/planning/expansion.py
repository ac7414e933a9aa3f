"""From K to rK languages at the same loss: the iso-loss curve of the capacity law (ATLAS Eqs. 7 and 8).

Everything is a multiplier of a baseline: r of the number of languages K, s of parameters N, t of tokens per
language D_t, r·t of total tokens, r·s·t of compute C = 6·N·D_tot. The curve depends on the baseline only
through
w = (A·K^φ/N^α) / (A·K^φ/N^α + B·K^ψ/D_t^β), the share of the reducible loss that N is responsible for:

    r^φ · w · s^−α + r^ψ · (1 − w) · t^−β = 1

Name u the first term. Then s and t are explicit in u, and log(s·t) is least at u = β/(α+β) whatever w is: the
cheapest point is in closed form off the compute-optimal baseline too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from atlas.errors import UserError
from atlas.scaling.transfer.capacity import CapacityExponents

# φ and ψ are printed; α and β are not. 0.2427 = φ/α and 0.7277 = 1+ψ/β lie in the narrow range that rounds to
# all that Fig. 5 prints: the exponents 0.243 of N, 0.728 of total tokens and 0.970 of compute (0.243 + 0.728
# does not), and the eight multipliers, 7.52 among them.
PUBLISHED_EXPONENTS = CapacityExponents(alpha=0.11 / 0.2427, beta=0.04 / 0.2723, phi=0.11, psi=-0.04)


@dataclass(frozen=True)
class Expansion:
    """Multipliers of a baseline, floats or float64 arrays of one shape; NaN where the loss cannot be kept."""

    languages: np.ndarray | float
    params: np.ndarray | float
    tokens_per_language: np.ndarray | float

    @property
    def tokens(self) -> np.ndarray | float:
        """Of total tokens."""
        return self.languages * self.tokens_per_language

    @property
    def compute(self) -> np.ndarray | float:
        """Of FLOPs."""
        return self.tokens * self.params


def expand(
    r: np.ndarray | float, law: CapacityExponents = PUBLISHED_EXPONENTS, share: float | None = None
) -> Expansion:
    """The cheapest expansion from K to r·K languages that keeps the loss.

    Args:
      r: multiplier of K, positive.
      law: the exponents, by default the published ones.
      share: w of the baseline, in (0, 1); by default that of a compute-optimal baseline, for which the result
        is s = r^(φ/α), t = r^(ψ/β). With another share part of the gain is from moving to the optimum.

    >>> cheapest = expand(4.0)
    >>> round(cheapest.params, 2), round(cheapest.tokens, 2), round(cheapest.compute, 2)
    (1.4, 2.74, 3.84)
    """
    return iso_loss(r, law.optimal_share, law, share)


def iso_loss(
    r: np.ndarray | float,
    u: np.ndarray | float,
    law: CapacityExponents = PUBLISHED_EXPONENTS,
    share: float | None = None,
) -> Expansion:
    """The point of the iso-loss curve at which N answers for the part u of the reducible loss, 0 < u < 1."""
    w = _valid_share(law, share)
    if np.any(np.asarray(r) <= 0):
        raise UserError(f"the multiplier of the number of languages must be positive; got {r}")
    params = (r**law.phi * w / u) ** (1 / law.alpha)
    tokens = (r**law.psi * (1 - w) / (1 - u)) ** (1 / law.beta)
    return Expansion(r, params, tokens)


def keep_params(
    r: np.ndarray | float,
    law: CapacityExponents = PUBLISHED_EXPONENTS,
    share: float | None = None,
) -> Expansion:
    """The expansion that keeps N; NaN tokens where no amount of them suffices.

    >>> round(keep_params(2.0).tokens, 2)
    1.98
    """
    u = r**law.phi * _valid_share(law, share)
    return _scalar(iso_loss(r, np.where(u < 1, u, np.nan), law, share))


def keep_tokens(
    r: np.ndarray | float,
    law: CapacityExponents = PUBLISHED_EXPONENTS,
    share: float | None = None,
) -> Expansion:
    """The expansion that keeps all tokens, D_tot; NaN params where no size suffices.

    >>> round(keep_tokens(4.0).params, 1), keep_tokens(16.0).params
    (6.3, nan)
    """
    u = 1 - r**law.psi * (1 - _valid_share(law, share)) * r**law.beta
    return _scalar(iso_loss(r, np.where(u > 0, u, np.nan), law, share))


def expansion_table(
    multipliers: Sequence[float],
    law: CapacityExponents = PUBLISHED_EXPONENTS,
    share: float | None = None,
) -> pd.DataFrame:
    """What keeps the loss with r times as many evenly sampled languages.

    Args:
      multipliers: r, [n], positive.
      law, share: as for `expand`.

    Returns:
      A row per r. Multipliers of the baseline at the cheapest point: params, tokens (all languages),
      tokens_per_language, compute; then tokens_same_params and params_same_tokens, for one of both kept; NaN
      where that cannot keep the loss.

    >>> expansion_table([2, 4]).round(2)[["multiplier", "params", "tokens", "compute"]].values.tolist()
    [[2.0, 1.18, 1.66, 1.96], [4.0, 1.4, 2.74, 3.84]]
    """
    r = np.asarray(multipliers, np.float64)
    cheapest = expand(r, law, share)
    return pd.DataFrame(
        {
            "multiplier": r,
            "params": cheapest.params,
            "tokens": cheapest.tokens,
            "tokens_per_language": cheapest.tokens_per_language,
            "compute": cheapest.compute,
            "tokens_same_params": keep_params(r, law, share).tokens,
            "params_same_tokens": keep_tokens(r, law, share).params,
        }
    )


def _valid_share(law: CapacityExponents, share: float | None) -> float:
    if not (law.alpha > 0 and law.beta > 0):
        raise UserError(f"alpha and beta must be positive; got alpha={law.alpha}, beta={law.beta}")
    share = law.optimal_share if share is None else share
    if not 0 < share < 1:
        raise UserError(f"the share of N in the reducible loss lies between 0 and 1; got {share}")
    return share


def _scalar(expansion: Expansion) -> Expansion:
    """Zero-dimensional arrays, which np.where makes of numbers, as floats."""
    fields = (expansion.languages, expansion.params, expansion.tokens_per_language)
    return Expansion(*(float(x) if np.ndim(x) == 0 else x for x in fields))
