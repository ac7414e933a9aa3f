"""Times of the joint fit with 10 and 40 languages, in CPU seconds, compilation apart."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from atlas.scaling import JointFit, fit_joint, load_runs, plan_mixture, refit, simulation
from experiments.benchmarks.timing import seconds

# Languages -> monolingual runs of each, runs of every pair, even and Dirichlet mixtures; and the bars in seconds.
_SIZES = {10: (5, 2, 20, 0), 40: (5, 1, 20, 280)}
_BARS = {10: {"one descent": 0.3, "fit": 5.0}, 40: {"one descent": 6.0, "fit": 30.0}}
_COMPILE, _PLAN, _REFITS = 15.0, 1.0, 10.0
_ROUNDS = {10: 5, 40: 1}
_PLANNED = (10,)  # sizes that are also planned for, and resampled
_RESAMPLES = 150
_SETTLED = 1e-2  # shift that ends a refit, in posterior standard deviations
_FLOPS = 3e21


def run(languages: tuple[int, ...] = tuple(_SIZES)) -> list[dict[str, Any]]:
    """Rows with the columns line, study, statistic, bar, measured (CPU seconds), seconds (wall), studies, reached."""
    return [row for L in tqdm(languages, desc="times", leave=False) for row in _times(L, _SIZES[L], _ROUNDS[L])]


def _times(L: int, design: tuple[int, ...], times: int) -> Iterator[dict[str, Any]]:
    truth = simulation.truth(L, 0)
    plan = simulation.mixtures(L, *design, np.random.default_rng(0))
    runs = load_runs(simulation.table(truth, plan, 0, rho=0.3))
    study = f"{L} languages, {len(runs)} rows"
    jax.clear_caches()
    first = seconds(lambda: fit_joint(runs, truth.families))
    fits = [seconds(lambda: fit_joint(runs, truth.families)) for _ in range(times)]
    found = fit_joint(runs, truth.families)
    yield _row("fit: priors, noise and law", study, _BARS[L]["fit"], fits)
    yield _row("compiling it", study, _COMPILE, [_minus(first, fits)])
    yield _row(
        "one descent, noise and priors known",
        study,
        _BARS[L]["one descent"],
        _warm(lambda: refit(found, anew=True), times),
    )
    if L in _PLANNED:
        yield _row("plan of a mixture", study, _PLAN, _warm(_planner(found), times))
        yield _row(f"{_RESAMPLES} resamples of the runs, refitted", study, _REFITS, _warm(_resampler(found), 1))


def _planner(found: JointFit) -> Callable[[], Any]:
    return lambda: plan_mixture(found.law, found.record.runs, _FLOPS)


def _resampler(found: JointFit) -> Callable[[], Any]:
    weight = np.array(found.record.state.noise.run_weight)
    random, count = np.random.default_rng(0), len(found.record.runs.run_ids)

    def resample() -> None:
        for _ in range(_RESAMPLES):
            drawn = np.bincount(random.integers(count, size=count), minlength=len(weight))
            refit(found, run_weight=weight * drawn, settled=_SETTLED)

    return resample


def _warm(function: Callable[[], Any], times: int) -> list[tuple[float, float]]:
    if times > 1:
        function()
    return [seconds(function) for _ in range(times)]


def _minus(first: tuple[float, float], later: list[tuple[float, float]]) -> tuple[float, float]:
    return tuple(a - statistics.median(b) for a, b in zip(first, zip(*later, strict=True), strict=True))


def _row(line: str, study: str, bar: float, times: list[tuple[float, float]]) -> dict[str, Any]:
    cpu, wall = np.median(times, 0).tolist()
    return {
        "line": line,
        "study": study,
        "statistic": "CPU seconds",
        "bar": f"<= {bar:g}",
        "measured": cpu,
        "wall": wall,
        "studies": len(times),
        "reached": "yes" if cpu <= bar else "no",
    }
