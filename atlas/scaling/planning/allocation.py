"""What to train: expansion to more languages, pretrain or finetune, size and tokens for a budget.

Units everywhere: N parameters, D and U tokens, C = 6·N·D FLOPs, loss in the unit of the law. Mixtures are
planned in atlas.scaling.planning.mixtures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from atlas.errors import UserError, unknown
from atlas.scaling.law import FLOPS_PER_PARAMETER_TOKEN
from atlas.scaling.planning.expansion import (
    PUBLISHED_EXPONENTS,
    CapacityExponents,
    expand,
    keep_params,
    keep_tokens,
)
from atlas.scaling.single.draws import band
from atlas.scaling.table import published


def expansion_table(
    multipliers: Sequence[float],
    law: CapacityExponents = PUBLISHED_EXPONENTS,
    share: float | None = None,
) -> pd.DataFrame:
    """What keeps the loss with r times as many evenly sampled languages.

    Args:
      multipliers: r, [n], positive.
      law, share: see `atlas.scaling.planning.expansion.expand`.

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


@dataclass(frozen=True)
class CrossoverFormula:
    """C = coefficient · N^exponent at which pretraining overtakes finetuning, as one place prints it."""

    source: str
    coefficient: float
    exponent: float
    consistent: bool  # with the crossovers of the paper's own 2e9-parameter curves

    def flops(self, params: np.ndarray | float) -> np.ndarray | float:
        """C in FLOPs at N parameters."""
        return self.coefficient * params**self.exponent


# The three places disagree. At N = 2.03e9 the measured crossovers span 1.76e21 to 3.45e21 FLOPs; the
# caption's mix of one place's coefficient with the other's exponent gives 2.35e22. The text prints "log(C)"
# for C.
CROSSOVER_FORMULAS = (
    CrossoverFormula("Fig. 7 legend", 10_283_128, 1.54, True),
    CrossoverFormula("section 6 text", 1_113_708, 1.65, True),
    CrossoverFormula("Fig. 7 caption", 10_283_128, 1.65, False),
)


def crossover(params: float, language: str | None = None) -> pd.DataFrame:
    """Tokens and compute after which training from scratch beats continuing the multilingual checkpoint.

    Args:
      params: N.
      language: scales each formula by its published crossover at 2.03e9 parameters (Fig. 6); the paper gives
        no size dependence per language, so at other sizes this assumes that all languages share one.

    Returns:
      A row per printed formula: source, flops, tokens = flops / 6N, consistent. Use the rows that are
      consistent: their spread is what the paper leaves open. No repetition of data is accounted for.

    >>> crossover(2_034_422_912).query("consistent").tokens.div(1e9).round(0).tolist()
    [182.0, 209.0]
    """
    if not (np.isfinite(params) and params > 0):
        raise UserError(f"the number of parameters must be positive; got {params}")
    rows = []
    for formula in CROSSOVER_FORMULAS:
        flops = float(formula.flops(params)) * _language_factor(formula, language)
        tokens = flops / (FLOPS_PER_PARAMETER_TOKEN * params)
        rows.append((formula.source, flops, tokens, formula.consistent))
    return pd.DataFrame(rows, columns=["source", "flops", "tokens", "consistent"])


def _language_factor(formula: CrossoverFormula, language: str | None) -> float:
    measured = published.table("crossover_tokens").set_index("language")
    if language is not None and language not in measured.index:
        raise unknown("language with a published crossover", language, measured.index)
    if language is None or not formula.consistent:
        return 1.0
    params, tokens = measured.loc[language]
    return float(FLOPS_PER_PARAMETER_TOKEN * params * tokens / formula.flops(params))


@dataclass(frozen=True)
class Allocation:
    """Size and tokens for a budget: N, D, predicted loss, epochs D/U (0 where nothing repeats).

    Floats, or float64 arrays [n] for n laws.
    """

    params: np.ndarray | float
    tokens: np.ndarray | float
    loss: np.ndarray | float
    epochs: np.ndarray | float


def compute_optimal(law: Mapping[str, ArrayLike], flops: float, unique_tokens: float = np.inf) -> Allocation:
    """N and D = C/(6N) of least loss E + A/N^α + B/S_λ(D; U)^β.

    Args:
      law: E, A, alpha, B, beta, and lambda where tokens repeat, each a number or [n]; loss as the law was
        fitted.
      flops: C, positive.
      unique_tokens: U; infinite for no repetition, where the optimum is in closed form.

    >>> law = dict(E=1.8, A=480.0, alpha=0.35, B=2100.0, beta=0.37)
    >>> best = compute_optimal(law, 6e21)
    >>> abs(6 * best.params * best.tokens / 6e21 - 1) < 1e-12
    True
    """
    if not (np.isfinite(flops) and flops > 0 and unique_tokens > 0):
        raise UserError(f"flops and unique tokens must be positive; got {flops} and {unique_tokens}")
    missing = {"E", "A", "alpha", "B", "beta"} | ({"lambda"} if np.isfinite(unique_tokens) else set())
    if missing := missing - set(law):
        raise UserError(f"the law lacks the parameter(s) {', '.join(sorted(missing))}; it has {', '.join(law)}")
    budget = flops / FLOPS_PER_PARAMETER_TOKEN
    balance = law["alpha"] * law["A"] / (law["beta"] * law["B"])
    N = np.asarray((balance * budget ** law["beta"]) ** (1 / (law["alpha"] + law["beta"])))
    if np.any(budget / N > unique_tokens):
        # Repeated tokens are worth less, so the optimum only moves to more parameters.
        more = _minimise(lambda n: predicted_loss(law, n, budget / n, unique_tokens), N, np.maximum(N, budget))
        N = np.where(budget / N > unique_tokens, more, N)
    D = budget / N
    found = (N, D, predicted_loss(law, N, D, unique_tokens), D / unique_tokens)
    return Allocation(*(float(x) if np.ndim(x) == 0 else x for x in found))


def predicted_loss(law: Mapping[str, ArrayLike], N: ArrayLike, D: ArrayLike, U: float = np.inf) -> np.ndarray:
    """Loss of one language at N parameters and D tokens of U unique ones; the law as in `compute_optimal`."""
    if np.isfinite(U):
        excess = np.maximum(D / U - 1, 0)
        D = np.minimum(D, U) + U * -np.expm1(-law["lambda"] * excess) / law["lambda"]
    return law["E"] + law["A"] / N ** law["alpha"] + law["B"] / D ** law["beta"]


def _minimise(function: Callable[[np.ndarray], np.ndarray], low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Least points [n] between low and high, by narrowing geometric grids."""
    for _ in range(8):
        grid = np.geomspace(low, high, 101)
        best = np.argmin(function(grid), axis=0)
        low, high = (np.take_along_axis(grid, np.clip(best + i, 0, 100)[None], 0)[0] for i in (-1, 1))
    return np.sqrt(low * high)


def allocation_band(
    draws: Mapping[str, np.ndarray], flops: float, plan: Allocation, unique_tokens: float = np.inf
) -> dict[str, float]:
    """How far a compute-optimal plan is known: 90 % bands over laws that the runs allow, each planned anew.

    Args:
      draws: parameters [n] by name, as `atlas.scaling.joint.draws` gives them.
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
        found[f"{name}_low"], found[f"{name}_high"] = band(getattr(best, name))
    regret = predicted_loss(draws, plan.params, plan.tokens, unique_tokens) - best.loss
    return found | {"regret_high": float(np.nanquantile(regret, 0.95))}
