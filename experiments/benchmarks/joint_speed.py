"""Times of the joint fit with 10 and 40 languages, in CPU seconds, compilation apart."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from atlas.scaling import JointFit, fit_joint, influence, load_runs, plan_mixture, simulation
from experiments.benchmarks.studies import judged
from experiments.benchmarks.timing import seconds

# Languages -> monolingual runs of each, runs of every pair, even and Dirichlet mixtures; rounds; and the bars of a fit
# and of one descent in seconds.
_SIZES = {10: ((5, 2, 20, 0), 5, 5.0, 0.3), 40: ((5, 1, 20, 280), 1, 30.0, 6.0)}
_PLANNED = 10  # languages of the study that is also planned for, and resampled
_COMPILE, _PLAN, _REFITS = 15.0, 1.0, 10.0  # bars
_RESAMPLES = 150
_SETTLED = 1e-2  # shift that ends a refit, in posterior standard deviations
_FLOPS = 3e21


def run() -> list[dict[str, Any]]:
    """Rows as `judged` gives them, in CPU seconds, with the column wall."""
    return [row for L, size in tqdm(_SIZES.items(), desc="times", leave=False) for row in _times(L, *size)]


def _times(L: int, design: tuple[int, ...], times: int, fit_bar: float, descent_bar: float) -> Iterator[dict]:
    truth = simulation.truth(L, 0)
    plan = simulation.mixtures(L, *design, np.random.default_rng(0))
    runs = load_runs(simulation.table(truth, plan, 0, rho=0.3))

    def fitted() -> JointFit:
        return fit_joint(runs, truth.families)

    def row(line: str, bar: float, spent: tuple[float, float], times: int = times) -> dict[str, Any]:
        cpu, wall = spent
        study = f"{L} languages, {len(runs)} rows"
        return judged(line, study, "CPU seconds", cpu, times, high=bar) | {"wall": wall}

    jax.clear_caches()
    first, later, found = seconds(fitted), seconds(fitted, times), fitted()
    yield row("fit: priors, noise and law", fit_bar, later)
    yield row("compiling it", _COMPILE, np.subtract(first, later).tolist(), 1)
    descend = functools.partial(influence.descend, found)
    descend()  # compiles
    yield row("one descent, noise and priors known", descent_bar, seconds(descend, times))
    if L == _PLANNED:
        weight = np.array(found.record.state.noise.run_weight)
        random, count = np.random.default_rng(0), len(runs.run_ids)

        def resample() -> None:
            for _ in range(_RESAMPLES):
                drawn = np.bincount(random.integers(count, size=count), minlength=len(weight))
                influence.refit(found, run_weight=weight * drawn, settled=_SETTLED)

        # Here and below the first of several rounds may compile: their median does not see it.
        yield row("plan of a mixture", _PLAN, seconds(lambda: plan_mixture(found.law, runs, _FLOPS), times))
        yield row(f"{_RESAMPLES} resamples of the runs, refitted", _REFITS, seconds(resample), 1)
