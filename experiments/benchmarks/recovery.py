"""How well the joint fit recovers known laws: simulated studies, and the bars that their fits must reach.

Ten languages, log losses with 0.5 % noise, 10 checkpoints a run. Designs by number of runs: M160 has 5 monolingual
runs of every language, 2 of every pair and 20 even mixtures; S80 has 3, 1 and 5; XS40 has 2, a third of the pairs and
5, with 20 checkpoints. The bars are those that a prototype reached with a margin.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from atlas.scaling import Estimate, JointFit, Runs, fit, fit_joint, load_runs, simulation
from experiments.benchmarks import joint_speed, optimum
from experiments.benchmarks.studies import Outcome, judged, outcomes

STUDIES = 20  # of each kind
_FEW = 4  # studies of what hardly differs between them
_LARGE_N, _LARGE_D = 3e10, 1e12
_UNSEEN_RUNS = 40
_LOST = 0.2  # weight below which a run counts as left out


@dataclasses.dataclass(frozen=True)
class Study:
    """A kind of simulated study and of fit.

    Attributes:
      design: monolingual runs of every language, runs of every pair, even and Dirichlet mixtures; or "pairs" (all
        at 50/50) or "even" (all languages in every run), which cannot tell τ.
      unseen: whether predictions of runs on new mixtures are scored, beside the data-constrained law's.
    """

    design: tuple[int, float, int, int] | str
    languages: int = 10
    checkpoints: int = 10
    sigma: float = 0.005
    rho: float = 0.0
    phi: float = 0.0
    diverged: float = 0.0
    unseen: bool = False


_M160, _S80, _XS40 = (5, 2, 20, 0), (3, 1, 5, 0), (2, 1 / 3, 5, 0)
STUDY_KINDS = {
    **{f"M160 rho {rho}": Study(_M160, rho=rho) for rho in (0.0, 0.3, 0.6)},
    **{f"S80 rho {rho}": Study(_S80, rho=rho) for rho in (0.0, 0.3, 0.6)},
    "50 mono + 110 Dirichlet": Study((5, 0, 0, 110)),
    "XS40": Study(_XS40, checkpoints=20),
    "M160 phi 0.11": Study(_M160, rho=0.5, phi=0.11, unseen=True),
    "M160 phi 0": Study(_M160, rho=0.5, unseen=True),
    "M160 10% diverged": Study(_M160, rho=0.3, diverged=0.1),
    "pairs at 50/50 only": Study("pairs"),
    "even mixtures only": Study("even"),
    "M160 without noise": Study(_M160, sigma=0.0),
}


class Bar(NamedTuple):
    """What a statistic of the studies' outcomes must reach: from `low` to `high`, bounds included."""

    line: str
    study: str
    key: str
    statistic: str
    low: float = -np.inf
    high: float = np.inf


_STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "median": np.median,
    "mean": np.mean,
    "largest": np.max,
    "smallest": np.min,
}


def run(workdir: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows as `judged` gives them, with p95 over the studies. `workdir` keeps outcomes for another time."""
    tasks = {name: (functools.partial(measure, study), STUDIES) for name, study in STUDY_KINDS.items()}
    tasks["XS40 by prior"] = functools.partial(measure_priors, STUDY_KINDS["XS40"]), STUDIES
    tasks["M160 at its optimum"] = functools.partial(measure_optimum, STUDY_KINDS["M160 rho 0.3"]), _FEW
    found = {name: outcomes(name, *task, workdir) for name, task in tasks.items()}
    settled = np.mean([outcome["converged"] for name in STUDY_KINDS for outcome in found[name]])
    rows = [_row(bar, found[bar.study]) for bar in _bars()] + joint_speed.run()
    return rows, {"converged": float(settled)}


def measure(study: Study, seed: int) -> Outcome:
    """Errors of a fit to the study with this seed: root mean squares over languages or pairs, and coverage."""
    truth, frame = simulate(study, seed)
    runs = load_runs(frame)
    found = fit_joint(runs, truth.families)
    outcome = _errors(found, truth) | _coverage(found, truth) | {"converged": float(found.converged)}
    if study.diverged:
        outcome |= _detected(found, frame)
    if study.unseen:
        outcome |= _unseen(found, runs, truth, seed, study.rho)
    return outcome


def measure_priors(study: Study, seed: int) -> Outcome:
    """What the prior of τ is worth: its error under wrong families over that under none, and under no prior over that
    under the true families."""
    truth, frame = simulate(study, seed)
    runs, random = load_runs(frame), np.random.default_rng(seed)
    shuffled = dict(zip(truth.languages, random.permutation(list(truth.families.values())).tolist(), strict=True))
    fits = (
        fit_joint(runs, truth.families),
        fit_joint(runs, shuffled),
        fit_joint(runs),
        fit_joint(runs, tau_prior="flat"),
    )
    true, wrong, none, flat = (_errors(found, truth)["tau"] for found in fits)
    return {"wrong over none": wrong / none, "flat over true": flat / true}


def measure_optimum(study: Study, seed: int) -> Outcome:
    """How exact the optimum and its derivatives are."""
    truth, frame = simulate(study, seed)
    found = fit_joint(load_runs(frame), truth.families)
    N, D, target = _large(truth)
    point = {"N": N, "D": D, "U": truth.U, "target": target}
    return optimum.derivatives(found, point, seed) | {"objective gap": optimum.objective_gap(found)}


def simulate(study: Study, seed: int) -> tuple[simulation.Truth, pd.DataFrame]:
    """The law of a study and its runs table."""
    truth = simulation.truth(study.languages, seed, study.phi)
    plan = _plan(study, np.random.default_rng(seed))
    noise = study.checkpoints, study.sigma, study.rho, study.diverged
    return truth, simulation.table(truth, plan, seed, *noise)


def _errors(found: JointFit, truth: simulation.Truth) -> Outcome:
    """Root mean square errors of τ, alpha, beta, log E, and the errors of φ and ρ̂."""
    law, off = truth.law, _off_diagonal(truth)
    return {
        "tau": _rms((found.law.tau - law.tau)[off]),
        "alpha": _rms(found.law.alpha - law.alpha),
        "beta": _rms(found.law.beta - law.beta),
        "log E": _rms(np.log(found.law.E / law.E)),
        "phi error": abs(float(found.law.phi - law.phi)),
        "rho": found.rho,
        "told": float(found.estimates["identified"].tau[off].mean()),
        "flagged": float(np.mean([any(_confounds(w, name) for w in found.warnings) for name in law.targets])),
    }


def _coverage(found: JointFit, truth: simulation.Truth) -> Outcome:
    """Parts of the τ and of the losses of a large run on all languages that lie inside their 90 % intervals."""
    low, tau, high = (law.tau for law in (found.estimates["low"], truth.law, found.estimates["high"]))
    inside = ((low <= tau) & (tau <= high))[_off_diagonal(truth)]
    losses = [estimate.low <= loss <= estimate.high for estimate, loss in large_run(found, truth)]
    return {"tau inside": float(inside.mean()), "loss inside": float(np.mean(losses))}


def _off_diagonal(truth: simulation.Truth) -> np.ndarray:
    """[L, L] where a target is not its own source."""
    return ~np.eye(len(truth.languages), dtype=bool)


def large_run(found: JointFit, truth: simulation.Truth) -> list[tuple[Estimate, float]]:
    """Losses predicted for a run larger than any fitted one, on all languages evenly, each with its true loss."""
    N, D, target = _large(truth)
    loss, deviation = found.predict(N, D, truth.U, target)
    estimates = [Estimate.lognormal(np.log(x), s / x, True) for x, s in zip(loss, deviation, strict=True)]
    return list(zip(estimates, truth.loss(N, D, target).tolist(), strict=True))


def _large(truth: simulation.Truth) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """N [L], D [L, L] and targets [L] of a run on all languages evenly, seen from each of them."""
    L = len(truth.languages)
    return np.full(L, _LARGE_N), np.full((L, L), _LARGE_D / L), np.arange(L)


def _plan(study: Study, rng: np.random.Generator) -> list[simulation.Mixture]:
    L = study.languages
    if study.design == "pairs":
        every = list(itertools.combinations(range(L), 2)) * 4
        return [("bilingual", np.eye(L)[list(pair)].mean(0)) for pair in every]
    if study.design == "even":
        return [("uniform", np.full(L, 1.0 / L))] * 160
    return simulation.mixtures(L, *study.design, rng)


def _confounds(warning: str, name: str) -> bool:
    return warning.startswith(f"{name}:") and "cannot be told apart" in warning


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _detected(found: JointFit, frame: pd.DataFrame) -> Outcome:
    bad = frame.groupby("run")["diverged"].first()
    lost = np.array([found.run_weights[name] < _LOST for name in bad.index])
    return {"detected": float(lost[bad].mean()) if bad.any() else 1.0, "false alarms": float(lost[~bad].mean())}


def _unseen(found: JointFit, runs: Runs, truth: simulation.Truth, seed: int, rho: float) -> Outcome:
    """R² on mixtures unlike any in training, within languages: ours, and by how much it exceeds that of the
    data-constrained law, fitted to each language by itself."""
    plan = simulation.mixtures(len(truth.languages), 0, 0, 0, _UNSEEN_RUNS, np.random.default_rng(10_000 + seed))
    held, scores = load_runs(simulation.table(truth, plan, 10_000 + seed, rho=rho)), []
    for target in range(len(held.targets)):
        alone = fit("data_constrained", runs.where(runs.target == target))
        of_target = held.where(held.target == target)
        errors = [law.predict_runs(of_target)[0] - of_target.loss for law in (found, alone)]
        scores.append([1.0 - np.mean(error**2) / np.var(of_target.loss) for error in errors])
    ours, theirs = np.mean(scores, 0).tolist()
    return {"unseen r2": ours, "gain in r2": ours - theirs}


def _bars() -> Iterator[Bar]:
    for key, high in (("tau", 0.020), ("alpha", 0.005), ("beta", 0.006), ("log E", 0.010)):
        yield Bar(f"{key}, root mean square error", "M160 rho 0.0", key, "median", high=high)
    yield Bar("tau, root mean square error", "S80 rho 0.0", "tau", "median", high=0.040)
    yield Bar("tau, root mean square error", "50 mono + 110 Dirichlet", "tau", "median", high=0.007)
    for design, rho in itertools.product(("M160", "S80"), (0.0, 0.3, 0.6)):
        study = f"{design} rho {rho}"
        yield Bar("tau, checkpoints correlated", study, "tau", "median", high={"M160": 0.032, "S80": 0.058}[design])
        yield Bar("estimated correlation", study, "rho", "median", rho - 0.15, rho + 0.15)
        yield Bar("90 % intervals that cover tau", study, "tau inside", "mean", 0.84, 0.95)
        yield Bar("90 % intervals that cover a large run's losses", study, "loss inside", "mean", 0.82, 0.96)
    yield Bar("tau, few runs", "XS40", "tau", "median", high=0.09)
    yield Bar("tau under wrong families over none", "XS40 by prior", "wrong over none", "largest", high=1.1)
    yield Bar("tau without a prior over true families", "XS40 by prior", "flat over true", "median", low=3.0)
    yield Bar("phi, error", "M160 phi 0.11", "phi error", "median", high=0.01)
    yield Bar("phi, error", "M160 phi 0", "phi error", "median", high=0.02)
    for study in ("M160 phi 0.11", "M160 phi 0"):
        yield Bar("R2 on unseen mixtures", study, "unseen r2", "median", low=0.99)
        yield Bar("R2 above the data-constrained law's", study, "gain in r2", "median", low=0.15)
    yield Bar("tau, some runs diverged", "M160 10% diverged", "tau", "median", high=0.040)
    yield Bar("diverged runs found", "M160 10% diverged", "detected", "mean", low=0.90)
    yield Bar("false alarms", "M160 10% diverged", "false alarms", "mean", high=0.05)
    for study in ("pairs at 50/50 only", "even mixtures only"):
        yield Bar("tau claimed though the design hides it", study, "told", "largest", high=0.0)
        yield Bar("languages whose tau is said to be hidden", study, "flagged", "smallest", low=1.0)
    yield Bar("tau, no noise", "M160 without noise", "tau", "largest", high=1e-4)
    for line, key, statistic, low, high in (
        ("objective, against L-BFGS-B", "objective gap", "largest", -np.inf, 1e-6),
        ("gradients, against refits", "gradient error", "largest", -np.inf, 1e-4),
        ("influence of runs, against refits", "influence correlation", "smallest", 0.99, np.inf),
        ("the same, worst of ten languages", "worst influence correlation", "smallest", 0.99, np.inf),
    ):
        yield Bar(line, "M160 at its optimum", key, statistic, low, high)


def _row(bar: Bar, found: list[Outcome]) -> dict[str, Any]:
    values = np.array([outcome[bar.key] for outcome in found])
    measured = float(_STATISTICS[bar.statistic](values))
    row = judged(bar.line, bar.study, bar.statistic, measured, len(values), bar.low, bar.high)
    return row | {"p95": float(np.quantile(values, 0.95))}
