"""Whether nominal 90 % intervals cover the truth nine times in ten, over hundreds of simulated studies.

Checkpoints are correlated within runs by 0.3 to 0.6, which the fits are not told. Of one language: Chinchilla's law
from 40 runs of 8 checkpoints, whose errors come from a model of the noise, and from 120 of 3, whose errors come from
the runs themselves. Of five: the joint fit to 37 runs of 8 checkpoints, phi being 0 or 0.11. Of five and of ten (80
runs): new runs by the joint fit, where its form is right, and where languages substitute one another, which it does not
know.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from atlas.scaling import Z90, Estimate, JointFit, bootstrap, fit, fit_joint, load_runs, simulation
from experiments.benchmarks import recovery
from experiments.benchmarks.studies import Outcome, outcomes

STUDIES = 500  # of each kind
LOW, HIGH = 0.86, 0.94
# Misfit is estimated from few runs, and widens the interval of a new run under a law that is right; of a joint law,
# whose studies are of many runs, by so much at most.
HIGH_RUN, HIGH_NEW = 1.0, 0.97
JOINT = recovery.Study((3, 1, 6, 6), languages=5, checkpoints=8)
NEW_RUNS = {
    f"{name}, {form}": dataclasses.replace(study, eta=eta)
    for name, study in {"37 runs": JOINT, "80 runs": recovery.STUDY_KINDS["S80 rho 0.3"]}.items()
    for form, eta in (("right form", None), ("wrong form", 0.6))
}
NEW_STUDIES = 60  # of each of these
_NEW = 20  # runs on new mixtures in each
_SERIES = {"40 runs": (40, 8), "120 runs": (120, 3)}
_RESAMPLES = 200
_LARGE = {"N": 1e11, "D": 2e12}  # ten times the largest run's parameters, and its tokens
_SIGMA = 0.005  # of the noise of a row's log loss

Score = tuple[bool, float, bool]


def run(workdir: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows with the columns

      fit, parameter     "loss" is that of a model larger than any run's by the law, "run" that of such a run, with its
                         noise; "mixture" of runs like those fitted, but on new mixtures (80 and 37 runs)
      coverage           part of the intervals that hold the truth
      bias, spread       median of (estimate − truth) / standard error, and its 90 % range over a normal's: ideally 0, 1
      told               part of the estimates that the fit calls identified
      told_coverage      coverage of these
      intervals, studies how many there were
      reached            whether the coverage lies between LOW and HIGH; of new runs between LOW and HIGH_RUN, or
                         HIGH_NEW where a joint law has the right form

    `workdir` keeps outcomes for another time.
    """
    tasks: dict[str, Callable[[int], Outcome]] = {}
    for name, design in _SERIES.items():
        for way in ("huber", "least_squares", "bootstrap"):
            tasks[f"{name}, {way}"] = functools.partial(measure_series, *design, way)
    tasks["joint"] = measure_joint
    found = {name: outcomes(name, task, STUDIES, workdir) for name, task in tasks.items()}
    for name, study in NEW_RUNS.items():
        found[name] = outcomes(name, functools.partial(measure_new, study), NEW_STUDIES, workdir)
    rows = [
        _row(name, parameter, [outcome[parameter] for outcome in scored])
        for name, scored in found.items()
        for parameter in scored[0]
    ]
    return rows, {"nominal": 0.9, "bar": f"{LOW:g} to {HIGH:g}"}


def correlation(seed: int) -> float:
    """Of the checkpoints of a run in this study."""
    return float(np.random.default_rng(seed).uniform(0.3, 0.6))


def measure_series(runs: int, checkpoints: int, way: str, seed: int) -> Outcome:
    """Scores of Chinchilla's parameters, of an extrapolated loss and of a new run's.

    way: the fit's objective; or "bootstrap": percentiles over resampled runs, with the objective "huber".
    """
    frame = simulation.series(runs, seed, checkpoints, _SIGMA, correlation(seed))
    # The simulated law holds from the first row on.
    found = fit("chinchilla", load_runs(frame), objective="huber" if way == "bootstrap" else way, warm_up=0)
    loss, deviation = found.predict(**_LARGE)
    if way == "bootstrap":
        resampled = bootstrap(found, _RESAMPLES, seed=seed)
        drawn = dict(zip(resampled.names, resampled.values.T, strict=True))
        parameters = {name: _resampled(found.values[name], values) for name, values in drawn.items()}
        extrapolated = _resampled(float(loss), np.asarray(found.model.loss(drawn, _LARGE)))
    else:
        parameters, bounds = found.parameters, found.interval(**_LARGE)
        extrapolated = Estimate(float(loss), float(deviation), *map(float, bounds), True)
    E, A, alpha, B, beta = simulation.CHINCHILLA.values()
    scores = {name: [score(parameters[name], truth)] for name, truth in simulation.CHINCHILLA.items()}
    expected = E + A / _LARGE["N"] ** alpha + B / _LARGE["D"] ** beta
    scores["loss"] = [score(extrapolated, expected)]
    if way != "bootstrap":
        low, high = map(float, found.run_interval(**_LARGE))
        run = Estimate(float(loss), float(np.log(high / low) / (2 * Z90) * loss), low, high, True)
        scores["run"] = [score(run, expected * np.exp(_SIGMA * np.random.default_rng([seed, runs]).normal()))]
    return scores


def measure_joint(seed: int) -> Outcome:
    """Scores of every parameter of a joint fit, and of the losses of a large run."""
    truth, frame = recovery.simulate(dataclasses.replace(JOINT, rho=correlation(seed), phi=(0.0, 0.11)[seed % 2]), seed)
    found = fit_joint(load_runs(frame), truth.families)
    outcome: Outcome = {}
    for name, value in truth.law.named().items():
        kind = name.partition("[")[0]
        scored = score(found.parameters[name], float(value), positive=kind not in ("tau", "phi"))
        outcome.setdefault(kind, []).append(scored)
    return outcome | {"loss": [score(estimate, loss) for estimate, loss in recovery.large_run(found, truth)]}


def measure_new(study: recovery.Study, seed: int) -> Outcome:
    """Scores of losses of new runs, with their noise: a large one on all languages, and some on new mixtures."""
    truth, frame = recovery.simulate(dataclasses.replace(study, rho=correlation(seed), phi=(0.0, 0.11)[seed % 2]), seed)
    found, rng = fit_joint(load_runs(frame), truth.families), np.random.default_rng([seed, study.languages])
    plan = simulation.mixtures(study.languages, 0, 0, 0, _NEW, rng)
    new = load_runs(simulation.table(truth, plan, 10_000 + seed, checkpoints=1, sigma=_SIGMA))
    large = recovery.large(truth)
    noisy = truth.law.loss(**large) * np.exp(_SIGMA * rng.normal(size=study.languages))
    mixed = dict(zip("NDU", (new.N, *new.aligned(found.sources)), strict=True))
    mixed["target"] = np.asarray(new.languages)[new.target]
    return {"run": _new_runs(found, noisy, large), "mixture": _new_runs(found, new.loss, mixed)}


def _new_runs(found: JointFit, losses: np.ndarray, points: dict[str, np.ndarray]) -> list[Score]:
    value, (low, high) = found.predict(**points)[0], found.run_interval(**points)
    unit = np.log(high / value) / Z90
    estimates = itertools.starmap(Estimate, zip(value, value * unit, low, high, itertools.repeat(True), strict=False))
    return list(map(score, estimates, losses))


def score(estimate: Estimate, truth: float, positive: bool = True) -> Score:
    """Whether the interval holds the truth; the error in standard errors; whether the fit calls it identified.

    Errors of positive parameters are those of their logarithms, in which the standard errors are taken.
    """
    error, unit = estimate.value - truth, estimate.se
    if positive:
        error, unit = np.log(estimate.value / truth), estimate.se / estimate.value
    return bool(estimate.low <= truth <= estimate.high), float(error / unit), estimate.identified


def _resampled(value: float, drawn: np.ndarray) -> Estimate:
    low, high = np.quantile(drawn, [0.05, 0.95])
    return Estimate(value, float(np.std(drawn)), float(low), float(high), True)


def _row(name: str, parameter: str, scores: list[list[Score]]) -> dict[str, Any]:
    inside, error, told = np.array(list(itertools.chain(*scores)), float).T
    coverage = float(inside.mean())
    low, middle, high = np.quantile(error, [0.05, 0.5, 0.95]).tolist()
    most = HIGH if parameter not in ("run", "mixture") else HIGH_NEW if "right form" in name else HIGH_RUN
    return {
        "fit": name,
        "parameter": parameter,
        "coverage": coverage,
        "bias": middle,
        "spread": (high - low) / (2 * Z90),
        "told": float(told.mean()),
        "told_coverage": float(inside[told > 0].mean()) if told.any() else float("nan"),
        "intervals": len(inside),
        "studies": len(scores),
        "reached": "yes" if LOW <= coverage <= most else "no",
    }
