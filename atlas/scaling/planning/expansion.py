"""From K to rK languages at the same loss: the iso-loss curve of the capacity law (ATLAS Eqs. 7 and 8).

Everything is a multiplier of a compute-optimal baseline: r of the number of languages K, s of parameters N, t of tokens
per language D_t, r·t of total tokens, r·s·t of compute C = 6·N·D_tot. There N is responsible for the part
w = β/(α+β) of the reducible loss, and the curve is

    r^φ · w · s^−α + r^ψ · (1 − w) · t^−β = 1

Name u the first term. Then s and t are explicit in u, and log(s·t) is least at u = w: s = r^(φ/α), t = r^(ψ/β).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from atlas.scaling.transfer.capacity import CapacityExponents
from checked import UserError

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


def iso_loss(
    r: np.ndarray | float, u: np.ndarray | float | None = None, law: CapacityExponents = PUBLISHED_EXPONENTS
) -> Expansion:
    """The point of the iso-loss curve at which N answers for the part u of the reducible loss.

    Args:
      r: times as many languages, positive.
      u: between 0 and 1; by default that of the cheapest point, where compute is least.
      law: whose exponents they are.

    Raises:
      UserError: r, or α or β of the law, is not positive.

    >>> cheapest = iso_loss(4.0)
    >>> round(cheapest.params, 2), round(cheapest.tokens, 2), round(cheapest.compute, 2)
    (1.4, 2.74, 3.84)
    """
    if np.any(np.asarray(r) <= 0):
        raise UserError(f"the multiplier of the number of languages must be positive; got {r}")
    if not (law.alpha > 0 and law.beta > 0):
        raise UserError(f"alpha and beta must be positive; got alpha={law.alpha}, beta={law.beta}")
    w = law.optimal_share
    u = w if u is None else u
    params = (r**law.phi * w / u) ** (1 / law.alpha)
    tokens = (r**law.psi * (1 - w) / (1 - u)) ** (1 / law.beta)
    return Expansion(r, params, tokens)


def expansion_table(multipliers: Sequence[float], law: CapacityExponents = PUBLISHED_EXPONENTS) -> pd.DataFrame:
    """What keeps the loss with r times as many evenly sampled languages; multipliers r [n], positive.

    Returns:
      A row per r. Multipliers of the baseline at the cheapest point: params, tokens (all languages),
      tokens_per_language, compute; then tokens_same_params and params_same_tokens, for one of both kept; NaN
      where that cannot keep the loss.

    >>> expansion_table([2, 4]).round(2)[["multiplier", "params", "tokens", "compute"]].values.tolist()
    [[2.0, 1.18, 1.66, 1.96], [4.0, 1.4, 2.74, 3.84]]
    """
    r, w = np.asarray(multipliers, np.float64), law.optimal_share
    cheapest = iso_loss(r, law=law)
    u_params = r**law.phi * w
    u_tokens = 1 - r ** (law.psi + law.beta) * (1 - w)
    return pd.DataFrame(
        {
            "multiplier": r,
            "params": cheapest.params,
            "tokens": cheapest.tokens,
            "tokens_per_language": cheapest.tokens_per_language,
            "compute": cheapest.compute,
            "tokens_same_params": iso_loss(r, np.where(u_params < 1, u_params, np.nan), law).tokens,
            "params_same_tokens": iso_loss(r, np.where(u_tokens > 0, u_tokens, np.nan), law).params,
        }
    )
