"""Which runs to add so that a chosen prediction becomes sharper: greedy c-optimal design per FLOP.

    runs = load_runs("runs.csv")
    fit = fit_joint(runs)
    goal = goal_of(fit, runs, "sw", params=3e10, tokens=1e12, shares={"sw": 0.05, "en": 0.95})
    plan = next_runs(fit, goal, candidate_runs(fit, runs, goal), flops=1e20)

What a run would tell is known before its losses are: it depends on where it lies and on the noise. The law is
linearised at the fit, which can promise too much, and a law that is wrong in form is not improved by more runs of the
same kind.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from atlas.scaling.joint.fitted import JointFit
from atlas.scaling.joint.information import Information, PlannedRuns
from atlas.scaling.law import FLOPS_PER_PARAMETER_TOKEN
from atlas.scaling.planning.mixtures import by_language, untold
from atlas.scaling.table.runs import Runs
from checked import UserError, unknown

_SIZES, _TOKENS, _PARTNERS, _RANDOM = 5, 3, 10, 12  # of the pool: sizes, token counts, bilingual and random mixtures
_CONCENTRATION = 1.5  # of the Dirichlet distribution of random mixtures
_LEAST_GAIN = 1e-3  # relative fall of the variance below which no run is worth adding


class Goal(NamedTuple):
    """The prediction to sharpen: the loss of `target` at N parameters and D [Ls] tokens of U [Ls] unique ones."""

    N: float
    D: np.ndarray
    U: np.ndarray
    target: str


def goal_of(
    fit: JointFit,
    runs: Runs,
    target: str,
    params: float,
    tokens: float,
    shares: Mapping[str, float] | None = None,
    unique_tokens: Mapping[str, float] | None = None,
) -> Goal:
    """A goal in plain numbers.

    Args:
      fit, runs: the joint fit, and the table that it is of.
      target: language.
      params, tokens: N and total tokens, positive.
      shares: of the mixture, relative; the target alone by default.
      unique_tokens: U by language; those of the runs by default.
    """
    if target not in fit.targets:
        raise unknown("target language", target, fit.targets)
    if not (np.isfinite(params) and np.isfinite(tokens) and params > 0 and tokens > 0):
        raise UserError(f"the prediction needs positive parameters and tokens; got {params} and {tokens}")
    weight = by_language(shares or {target: 1.0}, fit.sources, 0.0, "source language")
    if weight.min() < 0 or weight[fit.sources.index(target)] <= 0:
        raise UserError(f"shares must not be negative, and {target}'s must be positive")
    known = runs.unique_tokens()
    had = [known.get(name, np.inf) for name in fit.sources]
    U = by_language(unique_tokens or {}, fit.sources, had, "source language")
    return Goal(float(params), tokens * weight / weight.sum(), U, target)


def candidate_runs(fit: JointFit, runs: Runs, goal: Goal, seed: int = 0) -> PlannedRuns:
    """Runs that could be trained: sizes and tokens that the table has seen, on mixtures of its languages.

    Mixtures are the target alone, half and half with other languages (those of the goal first, then those whose
    transfer is known least), all evenly, and random ones, which tell most about transfer. N, D and D/N stay
    within what the runs have seen: an optimal design would use any bound that it is not given.

    Args:
      fit, runs: as for `goal_of`.
      goal: the prediction.
      seed: of the random mixtures.
    """
    trained = (runs.aligned(fit.sources)[0] > 0).any(0)
    mixtures = _mixtures(fit, goal, np.flatnonzero(trained), np.random.default_rng(seed))
    ends = runs.evaluations().groupby("run", sort=False)[["num_params", "tokens"]].max().set_axis(["N", "D"], axis=1)
    sizes, ratio = _spread(ends.N, _SIZES), ends.D / ends.N
    tokens = np.geomspace(ends.D.min(), ends.D.max(), _TOKENS)
    shapes = [(n, d) for n in sizes for d in tokens if 0.99 * ratio.min() <= d / n <= 1.01 * ratio.max()]
    shapes = shapes or list(zip(ends.N, ends.D, strict=True))[:_SIZES]
    N = np.array([n for n, _ in shapes for _ in mixtures])
    D = np.array([d * shares for _, d in shapes for shares in mixtures])
    return PlannedRuns(N, D, np.broadcast_to(goal.U, D.shape), _checkpoints(runs))


def _checkpoints(runs: Runs) -> tuple[float, ...]:
    """Parts of a run after which it is evaluated: as many, from as early, as in the runs at hand."""
    rows = runs.evaluations().groupby(["run", "language"]).tokens
    count, first = int(rows.size().median()), float((rows.min() / rows.max()).median())
    return tuple(np.geomspace(first, 1.0, count).tolist()) if count > 1 else (1.0,)


def _spread(values: pd.Series, count: int) -> np.ndarray:
    """About `count` of the sizes that exist, from the smallest to the largest."""
    sizes = np.unique(values)
    return sizes[np.unique(np.round(np.linspace(0, len(sizes) - 1, count)).astype(int))]


def _mixtures(fit: JointFit, goal: Goal, trained: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Mixtures [Ls] of the sources of these indices, which some run trained."""
    count, t = len(trained), fit.sources.index(goal.target)
    one = np.eye(len(fit.sources))
    doubt = fit.estimates["se"].tau[t]
    order = sorted(trained, key=lambda s: (goal.D[s] == 0, -doubt[s]))
    partners = [s for s in order if s != t][:_PARTNERS]
    mixtures = [one[t], *(0.5 * (one[t] + one[s]) for s in partners)]
    if count > 1:
        mixtures.append(one[trained].mean(0))
        mixtures += list(rng.dirichlet(np.full(count, _CONCENTRATION), _RANDOM) @ one[trained])
    return mixtures


def next_runs(
    fit: JointFit, goal: Goal, candidates: PlannedRuns, flops: float | None = None, count: int = 6
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Runs that lower the variance of a prediction most, for a budget.

    Chosen one by one, twice: by the fall of the variance per FLOP, and by the fall alone among what the budget
    still affords; the better end counts (neither rule alone has a guarantee under a budget; the better of
    both does, Leskovec et al. 2007).

    Args:
      fit: of the runs at hand.
      goal: the prediction.
      candidates: runs that could be trained; one may be chosen again, with another seed.
      flops: budget Σ 6·N·D; by default that of `count` middling candidates.
      count: most runs, 1 or more.

    Returns:
      A row per run, in order: params, tokens, mixture (as "en:0.5,sw:0.5"), flops, deviation expected once it and
      those before it are trained. And facts: the loss predicted, its standard deviation before (of the law, without
      a run's own noise), the budget and the number of candidates.

    Raises:
      UserError: the budget affords no candidate, or no law tells the goal.
    """
    cost = FLOPS_PER_PARAMETER_TOKEN * candidates.N * candidates.D.sum(1)
    budget = float(count * np.median(cost)) if flops is None else flops
    if not cost.min() <= budget:
        raise UserError(f"{budget:g} FLOPs afford no run: the cheapest candidate takes {cost.min():.3g}")
    loss, deviation = map(float, fit.predict(*goal))
    if not np.isfinite(deviation):
        raise untold([goal.target])
    knowledge = Information.of(fit)
    plans = [_greedy(knowledge, goal, candidates, cost, budget, count, power) for power in (1.0, 0.0)]
    chosen, variance = min(plans, key=lambda plan: plan[1][-1] if plan[1] else np.inf)
    rows = [
        (candidates.N[i], candidates.D[i].sum(), _text(fit.sources, candidates.D[i]), cost[i], loss * np.sqrt(v))
        for i, v in zip(chosen, variance, strict=True)
    ]
    table = pd.DataFrame(rows, columns=["params", "tokens", "mixture", "flops", "deviation"])
    facts = {"loss": loss, "deviation_before": deviation, "budget": budget, "candidates": len(candidates)}
    return table, facts


def _greedy(
    knowledge: Information,
    goal: Goal,
    candidates: PlannedRuns,
    cost: np.ndarray,
    budget: float,
    count: int,
    power: float,
) -> tuple[list[int], list[float]]:
    """Candidates chosen by gain / cost^power, and the variance of the goal's log loss after each."""
    now, chosen, found = float(knowledge.variance(*goal)[0]), [], []
    for _ in range(count):
        after = knowledge.expected_variance(candidates, *goal)[:, 0]
        gain = np.where(cost <= budget, now - after, -np.inf)
        best = int(np.argmax(gain / cost**power))
        if not gain[best] > _LEAST_GAIN * now:
            break
        knowledge = knowledge.adding(candidates.take([best]))
        now, budget = float(after[best]), budget - cost[best]
        chosen.append(best)
        found.append(now)
    return chosen, found


def _text(languages: tuple[str, ...], D: np.ndarray) -> str:
    """A mixture as the configs name it."""
    shares = D / D.sum()
    return ",".join(f"{name}:{share:.3g}" for name, share in zip(languages, shares, strict=True) if share > 0)
