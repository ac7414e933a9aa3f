"""What further models would tell of a larger one, by simulated fits: the practice of A Hitchhiker's Guide to Scaling
Law Estimation (arXiv 2410.11840), whose warm-up cut and split are in atlas.scaling.table.splits."""

import dataclasses
from typing import Any

import numpy as np
import pandas as pd

from atlas.scaling.law import FLOPS_PER_PARAMETER_TOKEN
from atlas.scaling.single.bootstrap import losses_of, refit
from atlas.scaling.single.fit import fit
from atlas.scaling.single.fitted import Fit
from atlas.scaling.table.runs import Runs, load_runs
from atlas.scaling.table.splits import past_warm_up
from checked import UserError

_ENOUGH_SIZES = 5  # of models, from which the guide's errors fall to a few per cent
_CORRELATED = 0.3  # within a run: from here ten checkpoints tell no more than three independent ones
_AHEAD = 30.0  # times the compute of the largest run, for which a plan is judged: beyond any that the budget affords
_LEAST_SIZE, _BISECTIONS = 1e-3, 60  # of the smallest model, where a search for affordable sizes begins; it ends exact
_FIRST = 0.2  # part of a planned run after which it is evaluated first: behind the warm-up
_MODELS, _RATIOS = (1, 3, 5), (20.0, 100.0)  # planned models, and their tokens per parameter: optimal and over-trained


def expected_errors(
    design: pd.DataFrame, target: dict[str, float], truth: Fit, *, count: int = 64, seed: int = 0, **options: Any
) -> np.ndarray:
    """Absolute relative errors [count] of predicting a target from planned runs, by simulating and fitting them.

    Args:
      design: the planned runs table without losses: num_params, tokens, run, …
      target: columns of the law at which to predict, such as {"N": 1e10, "D": 2e11}.
      truth: the fit to take for the truth; its residuals and their correlation within runs are the noise.
      count: simulations.
      options: for `fit`.
    """
    random = np.random.default_rng(seed)
    exact = load_runs(design.assign(loss=1.0, row=np.arange(len(design))))
    exact = dataclasses.replace(exact, loss=truth.predict_runs(exact)[0])
    start = fit(truth.model, exact, tokens=truth.tokens, **options | {"warm_up": 0.0})
    sigma, rho = truth.diagnostics.sigma, truth.diagnostics.correlation
    shared = random.normal(size=(count, len(exact.run_ids)))[:, exact.run]
    single = random.normal(size=(count, len(exact)))
    observed = np.tile(start.problem.observed, (count, 1))
    observed[:, : len(exact)] += sigma * (np.sqrt(rho) * shared + np.sqrt(1.0 - rho) * single)
    weight = np.broadcast_to(start.problem.weight, observed.shape)
    ends, _ = refit(start, np.broadcast_to(start.x, (count, len(start.x))), weight, observed)
    losses = losses_of(start, ends, start.batch(**target))
    return np.abs(losses / truth.predict(**target)[0] - 1.0).ravel()


def advice(runs: Runs, budget: float, law: str = "chinchilla", **options: Any) -> tuple[pd.DataFrame, list[str]]:
    """What to train for `budget` FLOPs so that a law fitted to all predicts a larger run best, and cautions.

    The target has 30 times the compute of the largest run, at its tokens per parameter. Plans add one, three
    or five models, at 20 and at 100 tokens per parameter, of sizes from the smallest in the table to what the
    budget affords, each with as many evaluations as a run of the table has.

    Args:
      runs: rows of one target language.
      budget: C = Σ 6·N·D in FLOPs.
      law, options: for `fit`.

    Returns:
      A row per plan, best first: models, tokens_per_param, largest (N), flops, expected_are (median),
      high_are (90 % quantile); the first plan trains nothing. And sentences on the table.
    """
    if not (np.isfinite(budget) and budget > 0):
        raise UserError(f"the budget must be a positive number of FLOPs, got {budget:g}")
    kept, options = past_warm_up(runs, options.get("warm_up")), options | {"warm_up": 0.0}
    fitted = fit(law, kept, **options)
    compute = kept.N * kept.total_tokens
    top = int(np.argmax(compute))
    scale = np.sqrt(_AHEAD)
    target = {"N": kept.N[top] * scale, "D": kept.total_tokens[top] * scale}
    here = pd.DataFrame({"num_params": kept.N, "tokens": kept.own(kept.D), "run": kept.run})
    rows_each = max(round(len(kept) / len(kept.run_ids)), 1)
    rows = []
    for models, ratio in [(0, 0.0)] + [(models, ratio) for models in _MODELS for ratio in _RATIOS]:
        sizes = _affordable(models, ratio, budget, kept.N.min())
        design = pd.concat([here, *(_planned(i, N, ratio, rows_each) for i, N in enumerate(sizes))], ignore_index=True)
        middle, high = np.quantile(expected_errors(design, target, fitted, **options), [0.5, 0.9])
        cost = float(np.sum(FLOPS_PER_PARAMETER_TOKEN * ratio * sizes**2))
        rows.append((models, ratio, sizes.max(initial=0.0), cost, middle, high))
    names = ["models", "tokens_per_param", "largest", "flops", "expected_are", "high_are"]
    table = pd.DataFrame(rows, columns=names).sort_values("expected_are", ignore_index=True)
    return table, [*_cautions(runs, kept, fitted), *fitted.warnings]


def _affordable(models: int, ratio: float, budget: float, smallest: float) -> np.ndarray:
    """Sizes, spaced evenly in log N, whose runs at `ratio` tokens per parameter use the budget."""
    if not models:
        return np.zeros(0)
    low, high = _LEAST_SIZE * smallest, np.sqrt(budget / (FLOPS_PER_PARAMETER_TOKEN * ratio))
    for _ in range(_BISECTIONS):
        middle = np.sqrt(low * high)
        sizes = np.geomspace(middle, min(smallest, middle), models)[::-1]
        low, high = (middle, high) if np.sum(FLOPS_PER_PARAMETER_TOKEN * ratio * sizes**2) <= budget else (low, middle)
    return sizes


def _planned(index: int, N: float, ratio: float, rows: int) -> pd.DataFrame:
    tokens = N * ratio * np.linspace(1.0, _FIRST, rows)[::-1]
    return pd.DataFrame({"num_params": N, "tokens": tokens, "run": f"planned {index}"})


def _cautions(runs: Runs, kept: Runs, fitted: Fit) -> list[str]:
    found = []
    if dropped := len(runs) - len(kept):
        found.append(f"{dropped} of {len(runs)} rows lie in the warm-up and were left out")
    sizes = len(np.unique(kept.N))
    if sizes < _ENOUGH_SIZES:
        found.append(f"{sizes} sizes: with {_ENOUGH_SIZES} or more, published families are predicted to a few per cent")
    if len(kept) == len(kept.run_ids):
        found.append("one evaluation a run: intermediate checkpoints after the warm-up would sharpen the fit for free")
    if fitted.diagnostics.correlation > _CORRELATED:
        found.append(
            f"checkpoints of a run correlate ({fitted.diagnostics.correlation:.2f}): {len(kept)} rows tell as much as "
            f"{fitted.diagnostics.independent_rows:.0f} independent ones; more runs help, more checkpoints do not"
        )
    return found
