"""Size and tokens of least loss for a budget: one language, one law.

Units everywhere: N parameters, D and U tokens, C = 6·N·D FLOPs, loss in the unit of the law.
"""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from numpy.typing import ArrayLike

from atlas.scaling.law import FLOPS_PER_PARAMETER_TOKEN, chinchilla, saturation
from atlas.scaling.single.draws import band
from checked import UserError

_GRIDS, _POINTS = 8, 101  # of the search for the best N: each grid narrows it fiftyfold in log N


def compute_optimal(law: Mapping[str, ArrayLike], flops: float, unique_tokens: float = np.inf) -> dict[str, ArrayLike]:
    """N and D = C/(6N) of least loss E + A/N^α + B/S_λ(D; U)^β.

    Args:
      law: E, A, alpha, B, beta, and lambda where tokens repeat, each a number or [n]; loss as the law was
        fitted.
      flops: C, positive.
      unique_tokens: U; infinite for no repetition, where the optimum is in closed form.

    Returns:
      params N, tokens D, loss (predicted) and epochs D/U (0 where nothing repeats): floats, or [n] for n laws.

    Raises:
      UserError: the budget or U is not positive, or the law lacks a parameter.

    >>> law = dict(E=1.8, A=480.0, alpha=0.35, B=2100.0, beta=0.37)
    >>> best = compute_optimal(law, 6e21)
    >>> abs(6 * best["params"] * best["tokens"] / 6e21 - 1) < 1e-12
    True
    """
    if not (np.isfinite(flops) and flops > 0 and unique_tokens > 0):
        raise UserError(f"flops and unique tokens must be positive; got {flops} and {unique_tokens}")
    missing = {"E", "A", "alpha", "B", "beta"} | ({"lambda"} if np.isfinite(unique_tokens) else set())
    if missing := missing - set(law):
        given = ", ".join(law) or "none"
        raise UserError(f"the law lacks the parameter(s) {', '.join(sorted(missing))}; it has {given}")
    budget = flops / FLOPS_PER_PARAMETER_TOKEN
    alpha, beta = (np.asarray(law[name], float) for name in ("alpha", "beta"))
    # Laws that the runs leave open have optima beyond all numbers; in logarithms only the last step is.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        balance = np.log(alpha) + np.log(law["A"]) - np.log(beta) - np.log(law["B"])
        N = np.exp((balance + beta * np.log(budget)) / (alpha + beta))
        if np.any(budget / N > unique_tokens):
            # Repeated tokens are worth less, so the optimum only moves to more parameters.
            more = _minimise(lambda n: predicted_loss(law, n, budget / n, unique_tokens), N, np.maximum(N, budget))
            N = np.where(budget / N > unique_tokens, more, N)
        D = budget / N
        loss = predicted_loss(law, N, D, unique_tokens)
        found = {"params": N, "tokens": D, "loss": loss, "epochs": D / unique_tokens}
    return {name: values if np.ndim(values) else float(values) for name, values in found.items()}


def predicted_loss(law: Mapping[str, ArrayLike], N: ArrayLike, D: ArrayLike, U: float = np.inf) -> np.ndarray:
    """Loss of one language, float64, at N parameters and D tokens of U unique ones; the law as in `compute_optimal`."""
    own = [np.asarray(law[name], float) for name in ("E", "A", "alpha", "B", "beta")]
    with jax.enable_x64(True):
        return np.asarray(_loss(N, D, float(U), law.get("lambda", 0.0), *own))


@jax.jit
def _loss(N, D, U, lam, *own) -> jax.Array:
    return chinchilla(N, saturation(D, U, lam), *own)


def _minimise(function: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Least points [n] between low and high, by narrowing geometric grids: N to about 1e-12."""
    for _ in range(_GRIDS):
        grid = np.geomspace(low, high, _POINTS)
        best = np.argmin(function(grid), axis=0)
        low, high = (np.take_along_axis(grid, np.clip(best + i, 0, _POINTS - 1)[None], 0)[0] for i in (-1, 1))
    return np.sqrt(low * high)


def allocation_band(
    draws: Mapping[str, np.ndarray], flops: float, plan: Mapping[str, float], unique_tokens: float = np.inf
) -> dict[str, float]:
    """How far a compute-optimal plan is known: 90 % bands over laws that the runs allow, each planned anew.

    Args:
      draws: parameters [n] by name, as `law_draws` and `JointLaw.language` give them.
      flops, unique_tokens: as for `compute_optimal`.
      plan: what it gives for the point estimates.

    Returns:
      params_low and _high, tokens_low and _high (of the optimum), loss_low and _high (of the optimum), and
      regret_high: how much more loss than the optimum the plan has, at most, in 95 % of the draws. The plan may
      be good where its size is poorly known: the loss is flat around the optimum.
    """
    best = compute_optimal(draws, flops, unique_tokens)
    found: dict[str, float] = {}
    for name in ("params", "tokens", "loss"):
        found[f"{name}_low"], found[f"{name}_high"] = band(best[name])
    with np.errstate(invalid="ignore"):  # of laws without an optimum
        regret = predicted_loss(draws, plan["params"], plan["tokens"], unique_tokens) - best["loss"]
    return found | {"regret_high": float(np.nanquantile(regret, 0.95))}
