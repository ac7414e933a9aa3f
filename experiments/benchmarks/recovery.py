"""How well the joint fit recovers known laws: simulated studies, and the bars that their fits must reach.

Ten languages, log losses with 0.5 % noise, 10 checkpoints a run. Designs by number of runs: M160 has 5 monolingual
runs of every language, 2 of every pair and 20 even mixtures; S80 has 3, 1 and 5; XS40 has 2, a third of the pairs and
5, with 20 checkpoints. Studies of mixtures are 200 runs of one size and one number of tokens, each on an uneven mixture
of half of 20 languages. The bars are those that a prototype reached with a margin.
"""

import dataclasses
import functools
import itertools
import pathlib
from typing import Any

import numpy as np
import pandas as pd

from atlas.scaling import Z90, Estimate, JointFit, Runs, fit, fit_joint, load_runs, simulation
from experiments.benchmarks import joint_speed, optimum
from experiments.benchmarks.studies import Outcome, judged, outcomes

STUDIES = 20  # of each kind
_FEW = 4  # studies of what hardly differs between them
_LARGE_N, _LARGE_D = 3e10, 1e12
_UNSEEN_RUNS = 40
_LOST = 0.2  # weight below which a run counts as left out
_BARS = pathlib.Path(__file__).with_name("recovery_bars.csv")


@dataclasses.dataclass(frozen=True)
class Study:
    """A kind of simulated study and of fit.

    Attributes:
      design: monolingual runs of every language, runs of every pair, even and Dirichlet mixtures; or "pairs" (all
        at 50/50) or "even" (all languages in every run), which cannot tell τ.
      eta: mean exponent of substitution of the true law, of which the fit does not know: it has a wrong form.
      unseen: whether predictions of runs on new mixtures are scored, beside the data-constrained law's.
    """

    design: tuple[int, float, int, int] | str
    languages: int = 10
    checkpoints: int = 10
    sigma: float = 0.005
    rho: float = 0.0
    phi: float = 0.0
    eta: float | None = None
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


_STATISTICS = {"median": np.median, "mean": np.mean, "largest": np.max, "smallest": np.min}


# Studies of mixtures: what the law is drawn with, how the fit makes effective tokens, and runs. Of sixty a language has
# hardly more losses than parameters.
MIXTURE_KINDS = {
    "20 languages, sparse": ({}, "sum", 200),
    "20 languages, sparse, negative transfer": ({"against": 0.3}, "sum", 200),
    "20 languages, sparse, substitution": ({"eta": 0.6}, "ces", 200),
    "20 languages, sparse, substitution unknown to the fit": ({"eta": 0.6}, "sum", 200),
    "20 languages, sparse, 60 runs": ({}, "sum", 60),
    "20 languages, sparse, 60 runs, substitution": ({"eta": 0.6}, "ces", 60),
}


def run(workdir: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows as `judged` gives them, with p95 over the studies. `workdir` keeps outcomes for another time."""
    tasks = {name: (functools.partial(measure, study), STUDIES) for name, study in STUDY_KINDS.items()}
    tasks["XS40 by prior"] = functools.partial(measure_priors, STUDY_KINDS["XS40"]), STUDIES
    tasks["M160 at its optimum"] = functools.partial(measure_optimum, STUDY_KINDS["M160 rho 0.3"]), _FEW
    tasks |= {name: (functools.partial(measure_mixtures, *kind), _FEW) for name, kind in MIXTURE_KINDS.items()}
    found = {name: outcomes(name, *task, workdir) for name, task in tasks.items()}
    settled = np.mean([outcome["converged"] for name in (*STUDY_KINDS, *MIXTURE_KINDS) for outcome in found[name]])
    rows = [_row(found[bar["study"]], **bar) for bar in _bars().to_dict("records")] + joint_speed.run()
    return rows, {"converged": float(settled)}


def measure(study: Study, seed: int) -> Outcome:
    """Errors of a fit to the study with this seed: root mean squares over languages, for τ over pairs; ρ̂; parts of
    the τ that the fit claims, and of the languages whose τ it calls hidden; parts of the τ, and of the losses of a
    large run on all languages, inside their 90 % intervals; parts of the runs, diverged or not, that it leaves out."""
    truth, frame = simulate(study, seed)
    runs = load_runs(frame)
    found = fit_joint(runs, truth.families)
    low, tau, high = (law.tau for law in (found.estimates["low"], truth.law, found.estimates["high"]))
    said = [warning.partition(":")[0] for warning in found.warnings if "cannot be told apart" in warning]
    hidden = [name for names in said for name in names.split(", ")]
    off = _off_diagonal(truth)
    outcome = {
        "tau": _rms((found.law.tau - tau)[off]),
        "alpha": _rms(found.law.alpha - truth.law.alpha),
        "beta": _rms(found.law.beta - truth.law.beta),
        "log E": _rms(np.log(found.law.E / truth.law.E)),
        "phi error": abs(float(found.law.phi - truth.law.phi)),
        "rho": found.rho,
        "told": float(found.estimates["identified"].tau[off].mean()),
        "flagged": float(np.isin(truth.languages, hidden).mean()),
        "tau inside": float(((low <= tau) & (tau <= high))[off].mean()),
        "loss inside": float(np.mean([x.low <= loss <= x.high for x, loss in large_run(found, truth)])),
        "converged": float(found.converged),
    }
    if study.diverged:
        bad = frame.groupby("run")["diverged"].first()
        lost = np.array([found.run_weights[name] < _LOST for name in bad.index])
        outcome |= {"detected": float(lost[bad].mean()), "false alarms": float(lost[~bad].mean())}
    if study.unseen:
        outcome |= _unseen(found, runs, truth, seed, study.rho)
    return outcome


def measure_mixtures(law: dict[str, float], mixing: str, runs: int, seed: int, L: int = 20) -> Outcome:
    """Whether a fit to a study of mixtures settles, how far it misses the losses of as many unseen mixtures, median and
    most, in parts of them, and how many of its 90 % intervals hold them."""
    truth = simulation.truth(L, seed, **law)
    truth = dataclasses.replace(truth, U=np.full(L, np.inf))
    tables = []
    for start, sigma in ((seed, 0.005), (10_000 + seed, 0.0)):
        plan = simulation.mixtures(L, 0, 0, 0, 0, np.random.default_rng(start), sparse=runs)
        tables.append(simulation.table(truth, plan, start, checkpoints=1, sigma=sigma, same=True))
    found, held = fit_joint(load_runs(tables[0]), truth.families, mixing=mixing), load_runs(tables[1])
    loss, deviation = found.predict_runs(held)
    error = np.abs(np.log(loss / held.loss))
    return {
        "converged": float(found.converged),
        "median error": float(np.median(error)),
        "largest error": float(error.max()),
        "inside": float(np.mean(error <= Z90 * deviation / loss)),
    }


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
    true, wrong, none, flat = (_rms((found.law.tau - truth.law.tau)[_off_diagonal(truth)]) for found in fits)
    return {"wrong over none": wrong / none, "flat over true": flat / true}


def measure_optimum(study: Study, seed: int) -> Outcome:
    """How exact the optimum and its derivatives are."""
    truth, frame = simulate(study, seed)
    found = fit_joint(load_runs(frame), truth.families)
    return optimum.derivatives(found, large(truth), seed) | {"objective gap": optimum.objective_gap(found)}


def simulate(study: Study, seed: int) -> tuple[simulation.Truth, pd.DataFrame]:
    """The law of a study and its runs table."""
    truth = simulation.truth(study.languages, seed, study.phi, study.eta)
    plan = _plan(study, np.random.default_rng(seed))
    noise = study.checkpoints, study.sigma, study.rho, study.diverged
    return truth, simulation.table(truth, plan, seed, *noise)


def _off_diagonal(truth: simulation.Truth) -> np.ndarray:
    """[L, L] where a target is not its own source."""
    return ~np.eye(len(truth.languages), dtype=bool)


def large_run(found: JointFit, truth: simulation.Truth) -> list[tuple[Estimate, float]]:
    """Losses predicted for a run larger than any fitted one, on all languages evenly, each with its true loss."""
    point = large(truth)
    loss, deviation = found.predict(**point)
    estimates = [Estimate.lognormal(np.log(x), s / x, True) for x, s in zip(loss, deviation, strict=True)]
    return list(zip(estimates, np.asarray(truth.law.loss(**point)).tolist(), strict=True))


def large(truth: simulation.Truth) -> dict[str, np.ndarray]:
    """N [L], D [L, L], U [L] and targets [L] of a run on all languages evenly, seen from each of them."""
    L = len(truth.languages)
    return {"N": np.full(L, _LARGE_N), "D": np.full((L, L), _LARGE_D / L), "U": truth.U, "target": np.arange(L)}


def _plan(study: Study, rng: np.random.Generator) -> list[simulation.Mixture]:
    L = study.languages
    if study.design == "pairs":
        every = list(itertools.combinations(range(L), 2)) * 4
        return [("bilingual", np.eye(L)[list(pair)].mean(0)) for pair in every]
    if study.design == "even":
        return [("uniform", np.full(L, 1.0 / L))] * 160
    return simulation.mixtures(L, *study.design, rng)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _unseen(found: JointFit, runs: Runs, truth: simulation.Truth, seed: int, rho: float) -> Outcome:
    """R² on mixtures unlike any in training, within languages: ours, and by how much it exceeds that of the
    data-constrained law, fitted to each language by itself."""
    plan = simulation.mixtures(len(truth.languages), 0, 0, 0, _UNSEEN_RUNS, np.random.default_rng(10_000 + seed))
    held, scores = load_runs(simulation.table(truth, plan, 10_000 + seed, rho=rho)), []
    for target in range(len(held.targets)):
        # Simulated runs have no warm-up, and to choose its cut takes seven fits.
        alone = fit("data_constrained", runs.where(runs.target == target), warm_up=0.0)
        of_target = held.where(held.target == target)
        errors = [law.predict_runs(of_target)[0] - of_target.loss for law in (found, alone)]
        scores.append([1.0 - np.mean(error**2) / np.var(of_target.loss) for error in errors])
    ours, theirs = np.mean(scores, 0).tolist()
    return {"unseen r2": ours, "gain in r2": ours - theirs}


def _bars() -> pd.DataFrame:
    """What a statistic of each study's outcomes `key` must reach: from `low` to `high`."""
    return pd.read_csv(_BARS).fillna({"low": -np.inf, "high": np.inf})


def _row(found: list[Outcome], line: str, study: str, key: str, statistic: str, **bounds: float) -> dict[str, Any]:
    values = np.array([outcome[key] for outcome in found])
    measured = float(_STATISTICS[statistic](values))
    row = judged(line, study, statistic, measured, len(values), **bounds)
    return row | {"p95": float(np.quantile(values, 0.95))}
