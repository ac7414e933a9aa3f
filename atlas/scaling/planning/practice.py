"""The practice of A Hitchhiker's Guide to Scaling Law Estimation (arXiv 2410.11840) as functions.

The warm-up cut and the guide's split are in atlas.scaling.holdout.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pandas as pd

from atlas.errors import UserError
from atlas.scaling.estimates import t_quantile
from atlas.scaling.holdout import after_warm_up, split_runs
from atlas.scaling.law import FLOPS_PER_PARAMETER_TOKEN
from atlas.scaling.single.bootstrap import refit
from atlas.scaling.single.fit import Fit, Prior, fit
from atlas.scaling.single.specification import Law
from atlas.scaling.table.runs import Runs, load_runs

_LEAST_SPREAD = 0.05  # of a parameter between families: three of them may agree by chance
_AGREEING = 1.1  # ratio of objectives up to which runs agree with a prior
_ENOUGH_SIZES = 5  # of models, from which the guide's errors fall to a few per cent


def family_prior(fits: Sequence[Fit], levels: bool = True) -> Prior:
    """What other families' fits of one law say about the next family: a joint prior on its parameters.

    Coefficients and exponents are known together, as the term's size at the families' own sizes and tokens;
    medians and the spread between families, so that one family that fits badly does not rule.

    Args:
      fits: of the same law to three families or more, whose losses have one unit.
      levels: whether to borrow the levels and coefficients too, which depend on data and tokenizer, or the
        exponents alone.

    Raises:
      UserError: fewer than three fits, several laws or several loss units.
    """
    laws, units = {f.law for f in fits}, {f.unit for f in fits if f.unit}
    if len(fits) < 3 or len(laws) > 1:
        raise UserError(f"a family prior needs three fits or more of one law, got {len(fits)} of {len(laws)} laws")
    if len(units) > 1:
        raise UserError(f"the families' losses have several units: {', '.join(sorted(units))}; convert them first")
    law = fits[0].model
    fitted = np.array([[np.log(e.value) if p.positive else e.value for p, e in _estimates(f)] for f in fits])
    to_terms = _to_terms(law, np.median(fitted, axis=0), fits)
    terms = fitted @ to_terms.T
    middle = np.median(terms, axis=0)
    spread = np.maximum(1.4826 * np.median(np.abs(terms - middle), axis=0), _LEAST_SPREAD)
    borrowed = [levels or p.role == "exponent" for p in law.parameters]
    precision = to_terms.T @ np.diag(borrowed * spread**-2.0) @ to_terms
    return Prior(np.linalg.solve(to_terms, middle), precision, unit=next(iter(units), ""))


def borrow(law: str, runs: Runs, fits: Sequence[Fit], **options: Any) -> Fit:
    """Fits a law to few runs with what other families say about its parameters, as far as the runs agree.

    The whole prior is used where the runs follow it nearly as closely as they follow the law without it;
    else the exponents alone (another corpus, tokenizer or unit moves the levels); else nothing.

    Args:
      law, runs, options: for `fit`.
      fits: see `family_prior`; the nearest families serve best, such as those of the same corpus.
    """
    plain = fit(law, runs, **options)
    notes = (
        "the runs contradict the other families' levels (unit, tokenizer or corpus): only exponents were borrowed",
    )
    for levels in (True, False):
        found = fit(law, runs, priors=family_prior(fits, levels), **options)
        if found.converged and found.objective <= _AGREEING * plain.objective:
            return found if levels else dataclasses.replace(found, warnings=found.warnings + notes)
    notes = ("the runs contradict the other families' parameters: nothing was borrowed",)
    return dataclasses.replace(plain, warnings=plain.warnings + notes)


def _estimates(fitted: Fit):
    return zip(fitted.model.parameters, fitted.parameters.values(), strict=True)


def _to_terms(law: Law, typical: np.ndarray, fits: Sequence[Fit]) -> np.ndarray:
    """[p, p] from fitted values to terms at the families' middle sizes: log A − α·log N, linear in log α."""
    matrix = np.eye(len(law.names))
    for i, parameter in enumerate(law.parameters):
        if parameter.scale is not None:
            column, exponent, multiple = parameter.scale
            j = law.names.index(exponent)
            middle = np.mean([np.log(f.problem.centre[column]) for f in fits])
            matrix[i, j] = -multiple * np.exp(typical[j]) * middle
    return matrix


def predict_target(
    runs: Runs, fraction: float, law: str = "chinchilla", *, level: float = 0.9, **options: Any
) -> dict[str, float]:
    """Predicts the end of the largest model's run from its first part and the smaller models.

    Args:
      runs: rows of one target language, with checkpoints of the largest model.
      fraction: of the largest model's tokens that have been trained, 0 for none, below 0.7.
      law, options: for `fit`; `priors=family_prior(…)` where few sizes exist.

    Returns:
      {"loss", "predicted", "low", "high", "are"}: the mean observed and predicted loss over the last 30 % of
      the run, bounds on the latter at `level`, and the mean absolute relative error.
    """
    if not 0.0 <= fraction < 0.7:
        raise UserError(f"the fraction of the target's run must be from 0 to below 0.7, got {fraction:g}")
    _, test = split_runs(runs, "guide")
    largest = 0.99 * runs.N.max() < runs.N
    seen = runs.total_tokens <= fraction * test.total_tokens.max()
    fitted = fit(law, runs.where((~largest | seen) & after_warm_up(runs)), **options)
    predicted, deviation = fitted.predict_runs(test)
    reach = t_quantile(0.5 + 0.5 * level, fitted.freedom) * float(np.mean(deviation))
    middle = float(np.mean(predicted))
    return {
        "loss": float(np.mean(test.loss)),
        "predicted": middle,
        "low": middle - reach,
        "high": middle + reach,
        "are": float(np.mean(np.abs(predicted / test.loss - 1.0))),
    }


def number_against_size(runs: Runs, law: str = "chinchilla", **options: Any) -> pd.DataFrame:
    """Held-out error of the largest model from k of the smaller ones, for every k and largest one among them.

    Returns:
      A row per choice: models (k neighbouring sizes, 3 or more), largest (its N), scale_up (the target's N
      over it), are.
    """
    train, test = split_runs(runs, "guide")
    sizes = np.unique(train.N)
    rows = []
    for last in range(2, len(sizes)):
        for first in range(last - 1):
            part = train.where((sizes[first] <= train.N) & (sizes[last] >= train.N))
            predicted, _ = fit(law, part, **options).predict_runs(test)
            are = float(np.mean(np.abs(predicted / test.loss - 1.0)))
            rows.append((last - first + 1, sizes[last], float(test.N.max() / sizes[last]), are))
    if not rows:
        raise UserError(f"{len(sizes)} sizes below the largest cannot be compared; 3 or more can")
    return pd.DataFrame(rows, columns=["models", "largest", "scale_up", "are"])


def seed_deviation(runs: Runs) -> float:
    """Standard deviation of log loss between runs that differ in their seed alone (same N, D and language).

    Raises:
      UserError: no two rows share all of these.
    """
    key = pd.MultiIndex.from_arrays([runs.N, runs.total_tokens, runs.target])
    groups = pd.Series(np.log(runs.loss)).groupby(key)
    freedom = int((groups.size() - 1).sum())
    if not freedom:
        raise UserError("no two runs of the table share size, tokens and language; train some with other seeds")
    return float(np.sqrt((groups.var(ddof=0) * groups.size()).sum() / freedom))


@dataclasses.dataclass(frozen=True)
class ExpectedError:
    """Absolute relative error that a design leads to: its mean, median and 90 % quantile over simulations."""

    mean: float
    median: float
    high: float


def expected_are(
    design: pd.DataFrame,
    target: dict[str, float],
    truths: Sequence[Fit],
    *,
    count: int = 64,
    seed: int = 0,
    sigma: float | None = None,
    correlation: float | None = None,
    **options: Any,
) -> ExpectedError:
    """Error of predicting a target from planned runs, by simulating and fitting them.

    Args:
      design: the planned runs table without losses: num_params, tokens, run, …
      target: columns of the law at which to predict, such as {"N": 1e10, "D": 2e11}.
      truths: fits to take for the truth in turn: of the table at hand, or of several families.
      count: simulations per truth.
      sigma, correlation: noise of a row's log loss and its correlation within a run; each truth's own by default.
      options: for `fit`.
    """
    random, errors = np.random.default_rng(seed), []
    for truth in truths:
        exact = load_runs(design.assign(loss=1.0, row=np.arange(len(design))))
        exact = dataclasses.replace(exact, loss=truth.predict_runs(exact)[0])
        start = fit(truth.model, exact, tokens=truth.tokens, **options)
        own = truth.diagnostics
        noise = own.sigma if sigma is None else sigma
        rho = own.correlation if correlation is None else correlation
        shared = random.normal(size=(count, len(exact.run_ids)))[:, exact.run]
        single = random.normal(size=(count, len(exact)))
        response = np.tile(np.asarray(start.problem.response), (count, 1))
        response[:, : len(exact)] += noise * (np.sqrt(rho) * shared + np.sqrt(1.0 - rho) * single)
        weight = np.broadcast_to(start.problem.weight, response.shape)
        ends, _ = refit(start, np.broadcast_to(start.x, (count, len(start.x))), weight, response)
        batch = start.batch(**target)
        with jax.enable_x64(True):
            losses = np.array([truth.model.predict(x, start.problem.centre, batch) for x in ends])
        errors.append(np.abs(losses / truth.predict(**target)[0] - 1.0).ravel())
    errors = np.concatenate(errors)
    return ExpectedError(float(np.mean(errors)), float(np.median(errors)), float(np.quantile(errors, 0.9)))


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
    kept = runs.where(after_warm_up(runs))
    fitted = fit(law, kept, **options)
    compute = kept.N * kept.total_tokens
    top = int(np.argmax(compute))
    scale = np.sqrt(30.0)
    target = {"N": kept.N[top] * scale, "D": kept.total_tokens[top] * scale}
    here = pd.DataFrame({"num_params": kept.N, "tokens": kept.own(kept.D), "run": kept.run})
    rows_each = max(round(len(kept) / len(kept.run_ids)), 1)
    rows = []
    for models, ratio in [(0, 0.0)] + [(models, ratio) for models in (1, 3, 5) for ratio in (20.0, 100.0)]:
        sizes = _affordable(models, ratio, budget, kept.N.min())
        design = pd.concat([here, *(_planned(i, N, ratio, rows_each) for i, N in enumerate(sizes))], ignore_index=True)
        error = expected_are(design, target, [fitted], **options)
        cost = float(np.sum(FLOPS_PER_PARAMETER_TOKEN * ratio * sizes**2))
        rows.append((models, ratio, sizes.max(initial=0.0), cost, error.median, error.high))
    names = ["models", "tokens_per_param", "largest", "flops", "expected_are", "high_are"]
    table = pd.DataFrame(rows, columns=names).sort_values("expected_are", ignore_index=True)
    return table, [*_cautions(runs, kept, fitted), *fitted.warnings]


def _affordable(models: int, ratio: float, budget: float, smallest: float) -> np.ndarray:
    """Sizes, spaced evenly in log N, whose runs at `ratio` tokens per parameter use the budget."""
    if not models:
        return np.zeros(0)
    low, high = 1e-3 * smallest, np.sqrt(budget / (FLOPS_PER_PARAMETER_TOKEN * ratio))
    for _ in range(60):
        middle = np.sqrt(low * high)
        sizes = np.geomspace(min(smallest, middle), middle, models) if models > 1 else np.array([middle])
        low, high = (middle, high) if np.sum(FLOPS_PER_PARAMETER_TOKEN * ratio * sizes**2) <= budget else (low, middle)
    return sizes


def _planned(index: int, N: float, ratio: float, rows: int) -> pd.DataFrame:
    tokens = N * ratio * np.linspace(0.2, 1.0, rows) if rows > 1 else np.array([N * ratio])
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
    if fitted.diagnostics.correlation > 0.3:
        found.append(
            f"checkpoints of a run correlate ({fitted.diagnostics.correlation:.2f}): {len(kept)} rows tell as much as "
            f"{fitted.diagnostics.independent_rows:.0f} independent ones; more runs help, more checkpoints do not"
        )
    return found
