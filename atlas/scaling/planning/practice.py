"""What further models would tell of a larger one: the practice of A Hitchhiker's Guide to Scaling
Law Estimation (arXiv 2410.11840), whose warm-up cut and split are in atlas.scaling.table.splits."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from atlas.scaling.estimates import Z90
from atlas.scaling.law import FLOPS_PER_PARAMETER_TOKEN
from atlas.scaling.noise import LEAST_VARIANCE, shrinkage
from atlas.scaling.single.draws import law_draws
from atlas.scaling.single.fit import fit
from atlas.scaling.single.fitted import Fit, columns_of, loss_and_slope
from atlas.scaling.single.library import law_named
from atlas.scaling.single.specification import Law
from atlas.scaling.table.runs import Runs, load_runs
from atlas.scaling.table.splits import past_warm_up
from checked import UserError

_ENOUGH_SIZES = 5  # of models, from which the guide's errors fall to a few per cent
_CORRELATED = 0.3  # within a run: from here ten checkpoints tell no more than three independent ones
_AHEAD = 30.0  # times the compute of the largest run, for which a plan is judged: beyond any that the budget affords
_LEAST_SIZE, _BISECTIONS = 1e-3, 60  # of the smallest model, where a search for affordable sizes begins; it ends exact
_LAWS, _PARTS = 1024, 8  # under which plans are judged: errors are then known to 0.3 %, their ratios to 0.1 %
_SURE = 0.95  # of the laws, that must find a plan worse than the first lest the two count as equal
_ALIKE = 0.02  # relative: errors so near are one, whatever the draw of laws tells
_OPEN = 100.0  # standard deviation of a fitted value that nothing determines
_FIRST = 0.2  # part of a planned run after which it is evaluated first: behind the warm-up
_MODELS, _RATIOS = (1, 3, 5), (20.0, 100.0)  # planned models, and their tokens per parameter: optimal and over-trained


def expected_errors(
    here: pd.DataFrame, additions: Sequence[pd.DataFrame], target: dict[str, float], truth: Fit, laws: np.ndarray
) -> np.ndarray:
    """Expected absolute relative errors [plans, laws] of predicting a target from fits to runs here and planned ones.

    Every plan is judged under the same laws. At each of them the fit is linearised, with the fit's noise and prior, so
    that nothing is left to chance but the choice of laws. The rows of a run weigh as their correlation deserves, and
    more runs never tell less; `fit` weighs them equally, and its errors are these where rows do not correlate, and
    larger where they do.

    Args:
      here: the runs table without losses: num_params, tokens, run, …
      additions: the runs that each plan adds, alike; none of its runs is here.
      target: columns of the law at which to predict, such as {"N": 1e10, "D": 2e11}.
      truth: the fit whose noise and correlation within runs are taken.
      laws: fitted values [laws, p]; of one under which some error is not a number, all are NaN.

    Raises:
      UserError: no law gives an error that is a number.
    """
    tables = [load_runs(t.assign(loss=1.0, row=np.arange(len(t)))) for t in (here, *additions) if len(t)]
    columns = [columns_of(truth.model, runs, truth.tokens) for runs in tables]
    at = truth.batch(**target)
    rows = {name: np.concatenate([*(found[name] for found in columns), at[name].ravel()]) for name in at}
    part = np.cumsum([bool(len(addition)) for addition in additions]) * [bool(len(a)) for a in additions]
    errors = np.array([_linearised(truth, tables, part, *loss_and_slope(truth.model, law, rows)) for law in laws]).T
    errors[:, ~np.isfinite(errors).all(0)] = np.nan
    if np.isnan(errors).all():
        raise UserError("the runs leave the law so open that no plan can be judged; add runs of other sizes and tokens")
    return errors


def _allowed(truth: Fit, seed: int) -> np.ndarray:
    """Fitted values [laws, p] of laws that the runs allow, evenly spread, one independent part of them after the other;
    the fitted law alone where the fit does not say."""
    document, parts = truth.to_json(), []
    for part in range(_PARTS):
        with np.errstate(divide="ignore"):  # of exponents that the runs leave open
            drawn = law_draws(document, _LAWS // _PARTS, (seed, part), even=True)
            if drawn is None:
                return truth.fitted[None]
            values = [np.log(drawn[p.name]) if p.positive else drawn[p.name] for p in truth.model.parameters]
        parts.append(np.stack(values, -1))
    return np.concatenate(parts)


def _linearised(
    truth: Fit, tables: Sequence[Runs], part: np.ndarray, loss: np.ndarray, slope: np.ndarray
) -> list[float]:
    """The expected error after each plan, which adds the table of its `part` to the first one, or none where that is 0.

    loss [n] and slope [n, p] are of all their rows, and the target's.
    """
    sigma, rho = max(truth.diagnostics.sigma, LEAST_VARIANCE**0.5), truth.diagnostics.correlation
    variance = sigma**2 * _excess(float(truth.problem.corner) / sigma)
    scaled, aim = slope / loss[:, None] if truth.model.residual == "log" else slope, slope[-1] / loss[-1]
    told, first = [], 0
    for runs in tables:
        jacobian, first = scaled[first : first + len(runs)], first + len(runs)
        by_run = np.zeros((len(runs.run_ids), len(aim)))
        np.add.at(by_run, runs.run, jacobian)
        shrink = shrinkage(np.bincount(runs.run), rho)[:, None]
        told.append((jacobian.T @ jacobian - by_run.T @ (shrink * by_run)) / (variance * (1.0 - rho)))
    known = told[0] + truth.problem.precision + np.eye(len(aim)) / _OPEN**2
    after = [known + told[i] if i else known for i in part]
    return [np.sqrt(2.0 / np.pi * (aim @ np.linalg.solve(matrix, aim))) for matrix in after]


def _excess(corner: float) -> float:
    """Variance of a Huber estimate over that of least squares under normal noise, by the corner in σ.

    >>> [round(_excess(corner), 3) for corner in (1e-3, 1.345, 10.0)]
    [1.57, 1.053, 1.0]
    """
    inside = math.erf(corner / math.sqrt(2.0))
    square = inside - corner * math.sqrt(2.0 / math.pi) * math.exp(-(corner**2) / 2.0) + corner**2 * (1.0 - inside)
    return square / inside**2


def check_advice(budget: float, law: str | Law) -> None:
    """Raises UserError for a budget that is no positive number, and for a law of which N and D make no plan."""
    if not (np.isfinite(budget) and budget > 0):
        raise UserError(f"the budget must be a positive number of FLOPs, got {budget:g}")
    model = law_named(law) if isinstance(law, str) else law
    columns = {column.name for column in model.columns}
    if not {"N", "D"} <= columns <= {"N", "D", "U"}:
        raise UserError(f"advice plans by N and D, and the {model.name} law takes {', '.join(sorted(columns))}")


def advice(
    runs: Runs, budget: float, law: str = "chinchilla", *, seed: int = 0, **options: Any
) -> tuple[pd.DataFrame, list[str]]:
    """What to train for `budget` FLOPs so that a law fitted to all predicts a larger run best, and cautions.

    The target has 30 times the compute of the largest run, at its tokens per parameter. Plans add nothing, or one,
    three or five models, at 20 and at 100 tokens per parameter, of sizes from the smallest in the table to what the
    budget affords, each with as many evaluations as a run of the table has. Tokens are those that the law means, and
    planned runs repeat as many unique ones as the table knows.

    Args:
      runs: rows of one target language.
      budget: C = Σ 6·N·D in FLOPs.
      law, options: for `fit`.
      seed: of the laws under which plans are judged, see `expected_errors`.

    Returns:
      A row per plan, best first: models (0: nothing is trained), tokens_per_param, largest (N), flops; rank, which
      plans share that the draw of laws does not tell apart; expected_are, the geometric mean of its errors under the
      laws that the runs allow, its monte_carlo standard error, and high_are, their 90 % quantile; beaten, the part of
      the laws under which the first plan predicts better. And sentences on the table, and on which plans are equal.
    """
    check_advice(budget, law)
    fitted = fit(law, runs, **options)
    kept = past_warm_up(runs, fitted.warm_up)
    here, available = _here(kept, fitted)
    top = here.loc[(here["num_params"] * here["tokens"]).idxmax()]
    target = {"N": top["num_params"] * np.sqrt(_AHEAD), "D": top["tokens"] * np.sqrt(_AHEAD)}
    target |= {"U": available} if "unique_tokens" in here else {}
    rows_each = max(round(len(kept) / len(kept.run_ids)), 1)
    designs, plans = [], []
    for models, ratio in [(0, 0.0)] + [(models, ratio) for models in _MODELS for ratio in _RATIOS]:
        sizes = _affordable(models, ratio, budget, kept.N.min())
        if models and not len(sizes):
            continue
        added = [_planned(i, N, ratio, rows_each).assign(unique_tokens=available) for i, N in enumerate(sizes)]
        designs.append(pd.concat(added, ignore_index=True) if added else here[:0])
        cost = float(np.sum(FLOPS_PER_PARAMETER_TOKEN * ratio * sizes**2))
        plans.append((models, ratio, sizes.max(initial=0.0), cost))
    if len(plans) == 1:
        raise UserError(f"{budget:.3g} FLOPs train no model of a {1 / _LEAST_SIZE:g}th of the smallest; give more")
    table = pd.DataFrame(plans, columns=["models", "tokens_per_param", "largest", "flops"])
    table = _ranked(table, expected_errors(here, designs, target, fitted, _allowed(fitted, seed)))
    equal = table[(table["rank"] == 1) | (table["beaten"] < _SURE)][1:]
    notes = _cautions(runs, kept, fitted)
    if len(equal):
        named = ", ".join(f"{p.models:g} at {p.tokens_per_param:g}" if p.models else "none" for p in equal.itertuples())
        notes.append(f"the runs do not tell the first plan from these, in models at tokens per parameter: {named}")
    return table, [*notes, *fitted.warnings]


def _here(runs: Runs, fitted: Fit) -> tuple[pd.DataFrame, float]:
    """The runs as a table of one language whose tokens are those that the law means, and how many unique ones there
    are, infinite where the runs do not tell."""
    columns = columns_of(fitted.model, runs, fitted.tokens)
    here = pd.DataFrame({"num_params": columns["N"], "tokens": columns["D"], "run": runs.run})
    if "U" not in columns:
        return here, np.inf
    known = runs.own(runs.U) if fitted.tokens == "own" else runs.U.sum(1)
    return here.assign(unique_tokens=columns["U"]), float(known.max())


def _ranked(plans: pd.DataFrame, errors: np.ndarray) -> pd.DataFrame:
    """The plans by their errors [plans, laws], best first; those that differ by no more than the draw of laws share a
    rank."""
    logs = np.log(errors)
    middle, by_part = np.nanmean(logs, 1), _by_part(logs)
    ranks, first, order = np.zeros(len(plans), int), None, np.argsort(middle, kind="stable")
    for plan in order:
        apart = middle[plan] - middle[plan if first is None else first]
        error = Z90 * _deviation(by_part[plan] - by_part[plan if first is None else first])
        if first is None or apart > max(error, _ALIKE):
            first, rank = plan, ranks.max() + 1
        ranks[plan] = rank
    middle = np.exp(middle)
    scores = {"rank": ranks, "expected_are": middle, "monte_carlo": middle * _deviation(by_part)}
    scores |= {"high_are": np.nanquantile(errors, 0.9, 1)}
    known = errors[:, ~np.isnan(errors[0])]
    beaten = (known > known[order[0]]).mean(1)
    return plans.assign(**scores, beaten=beaten).iloc[order].reset_index(drop=True)


def _by_part(logs: np.ndarray) -> np.ndarray:
    """[plans, parts] means over each independent part of the laws that has any."""
    parts = np.split(logs, min(_PARTS, logs.shape[1]), 1)
    return np.stack([np.nanmean(part, 1) for part in parts if not np.isnan(part[0]).all()], 1)


def _deviation(by_part: np.ndarray) -> np.ndarray:
    """Standard error of the mean over parts, the last axis; 0 of a single one, whose law is not drawn."""
    count = by_part.shape[-1]
    return by_part.std(-1, ddof=1) / np.sqrt(count) if count > 1 else np.zeros(by_part.shape[:-1])


def _affordable(models: int, ratio: float, budget: float, smallest: float) -> np.ndarray:
    """Sizes, spaced evenly in log N, whose runs at `ratio` tokens per parameter use the budget; none if it is short."""
    low = _LEAST_SIZE * smallest
    if not models or models * FLOPS_PER_PARAMETER_TOKEN * ratio * low**2 > budget:
        return np.zeros(0)
    high = np.sqrt(budget / (FLOPS_PER_PARAMETER_TOKEN * ratio))
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
