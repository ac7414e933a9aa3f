"""Fits a scaling law to a runs table and says how far to trust it.

    python -m experiments.fit --runs=runs.csv --law=atlas --holdout=largest_n --workdir=DIR
    python -m experiments.fit --runs=runs.csv --law=atlas --labels=families.csv --lambda_kind=source --workdir=DIR
    python -m experiments.fit --runs=runs.csv --law=chinchilla --where='language == "fr"' --workdir=DIR
    python -m experiments.fit --runs=runs.csv --law=chinchilla --bootstrap=1000 --advise=1e20 --workdir=DIR

Prints parameters with 90 % intervals, held-out scores and warnings, and writes them to DIR/fit.json. A
240-row table takes seconds, nearly all of them compilation.
"""

import json
import pathlib

import pandas as pd
from absl import flags

from atlas.errors import UserError, unknown
from atlas.files import write_atomically
from atlas.scaling import Fit, JointFit, Runs, bootstrap, fit, fit_joint, heldout, load_runs
from atlas.scaling.holdout import SPLITS
from atlas.scaling.joint.prior import LAMBDA_KINDS, TAU_PRIORS
from atlas.scaling.planning.practice import advice
from atlas.scaling.single.fit import OBJECTIVES
from atlas.scaling.single.library import LAWS
from atlas.scaling.table.labels import labels, starting_tau
from experiments._app import require, run

_RUNS = flags.DEFINE_string("runs", "", "runs table: CSV or Parquet, one row an evaluation")
_LAW = flags.DEFINE_enum("law", "atlas", ["atlas", *LAWS], "law to fit; atlas fits all languages jointly")
_WORKDIR = flags.DEFINE_string("workdir", "", "directory that receives fit.json")
_FAMILY = flags.DEFINE_string("family", "", "keep the rows whose column family has this value")
_WHERE = flags.DEFINE_string("where", "", "keep the rows that satisfy this pandas query, e.g. 'num_params > 1e6'")
_OBJECTIVE = flags.DEFINE_enum("objective", None, list(OBJECTIVES), "loss of log residuals (default huber; not atlas)")
_DELTA = flags.DEFINE_float("delta", None, "corner of the Huber loss, in log loss (default 1e-3; not atlas)")
_HOLDOUT = flags.DEFINE_enum("holdout", "none", ["none", *SPLITS], "runs to hold out and predict")
_BOOTSTRAP = flags.DEFINE_integer("bootstrap", 0, "resamples of the runs that give errors and intervals (not atlas)")
_ADVISE = flags.DEFINE_float(
    "advise", None, "FLOPs to spend on further runs: print the plans that help most (not atlas)"
)
_LABELS = flags.DEFINE_string(
    "labels",
    None,
    "families and scripts whose pairs of languages resemble each other in transfer: published (default), none, or a "
    "CSV file with columns language, family, script (only atlas)",
)
_TAU_PRIOR = flags.DEFINE_enum(
    "tau_prior",
    None,
    TAU_PRIORS,
    "what transfer weights borrow: from related pairs and from the target's other pairs (targets, default), from "
    "related pairs, or nothing (only atlas)",
)
_LAMBDA_KIND = flags.DEFINE_enum(
    "lambda_kind", None, LAMBDA_KINDS, "whose the repetition rate is (default target; only atlas)"
)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the random split and of the resamples")


def main(_) -> None:
    require(runs=_RUNS.value, workdir=_WORKDIR.value)
    runs = _select(load_runs(_RUNS.value))
    options = _joint_options(runs) if _LAW.value == "atlas" else _options()
    law = fit_joint(runs, **options) if _LAW.value == "atlas" else fit(_LAW.value, runs, **options)
    scores = _scores(runs, options) if _HOLDOUT.value != "none" else None
    document = law.to_json(scores)
    if _BOOTSTRAP.value:
        document |= _resampled(law, document["parameters"])
    _print(document, law)
    if _ADVISE.value is not None:
        document["advice"] = _advise(runs, options)
    path = pathlib.Path(_WORKDIR.value) / "fit.json"
    write_atomically(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {path}")


def _select(runs: Runs) -> Runs:
    if _FAMILY.value:
        families = runs.frame["family"].astype(str).unique() if "family" in runs.frame else []
        if _FAMILY.value not in families:
            raise unknown("family", _FAMILY.value, families)
        runs = runs.where((runs.frame["family"].astype(str) == _FAMILY.value).to_numpy())
    return runs.where(_WHERE.value) if _WHERE.value else runs


def _options() -> dict:
    given = {"objective": _OBJECTIVE.value, "delta": _DELTA.value}
    given = {name: value for name, value in given.items() if value is not None}
    for flag in (_LABELS, _TAU_PRIOR, _LAMBDA_KIND):
        if flag.value is not None:
            raise UserError(f"--{flag.name} applies to the atlas law only, not to {_LAW.value}; drop it")
    if _BOOTSTRAP.value < 0:
        raise UserError(f"--bootstrap must be a number of resamples, got {_BOOTSTRAP.value}; 1000 are usual")
    return given


def _joint_options(runs: Runs) -> dict:
    for flag in (_OBJECTIVE, _DELTA, _BOOTSTRAP, _ADVISE):
        if flag.value:
            raise UserError(f"--{flag.name} does not apply to the atlas law, which estimates its own noise; drop it")
    kinds = {"tau_prior": _TAU_PRIOR.value or TAU_PRIORS[0], "lambda_kind": _LAMBDA_KIND.value or LAMBDA_KINDS[0]}
    # The flat prior knows no related pairs: labels that nobody asked for are not a contradiction.
    source = _LABELS.value or ("none" if kinds["tau_prior"] == "flat" else "published")
    return kinds | labels(runs.languages, source) | {"initial_tau": starting_tau(runs.frame)}


def _scores(runs: Runs, options: dict) -> dict:
    law = "chinchilla_own" if _LAW.value == "chinchilla" else _LAW.value
    return heldout(runs, _HOLDOUT.value, law, seed=_SEED.value, **options)


def _resampled(law: Fit, parameters: dict) -> dict:
    """Errors and intervals of the resamples in place of those of the formula."""
    found = bootstrap(law, _BOOTSTRAP.value, seed=_SEED.value)
    interval, error = found.interval(), found.se
    for name, estimate in parameters.items():
        estimate |= {"se": error[name], "low": interval[name][0], "high": interval[name][1]}
    return {"bootstrap": {"resamples": _BOOTSTRAP.value, "converged": found.converged}}


def _advise(runs: Runs, options: dict) -> dict:
    table, sentences = advice(runs, _ADVISE.value, _LAW.value, **options)
    print(f"with {_ADVISE.value:.3g} more FLOPs, to predict 30 times the compute of the largest run:")
    print(table.to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    for sentence in sentences:
        print(f"note: {sentence}")
    return {"flops": _ADVISE.value, "plans": _records(table), "notes": sentences}


def _records(table: pd.DataFrame) -> list[dict]:
    return json.loads(table.to_json(orient="records", double_precision=15))


def _print(document: dict, law: Fit | JointFit) -> None:
    print(f"{document['law']} law: {law.n_rows} rows of {law.n_runs} runs, objective {law.objective:.9g}")
    print(f"{'parameter':<20}{'value':>12}{'se':>11}   90 % interval")
    for name, e in document["parameters"].items():
        verdict = "" if e["identified"] else "   not identified"
        low, high = _text(e["low"]), _text(e["high"])
        print(f"{name:<20}{_text(e['value'], 12)}{_text(e['se'], 11, 3)}   {low} … {high}{verdict}")
    if isinstance(law, Fit):
        print(f"{law.starts_agreeing:.0%} of the starts reach this optimum; error in sample {law.diagnostics.are:.2%}")
    if scores := document["holdout"]:
        r2 = "undefined" if scores["r2"] is None else f"{scores['r2']:.3f}"
        print(f"held out {scores['split']}: {scores['n_heldout']} rows, R² {r2}, relative error {scores['are']:.2%}")
    for warning in law.warnings:
        print(f"warning: {warning}")


def _text(value: float | None, width: int = 0, digits: int = 5) -> str:
    """A number; JSON holds none that is infinite."""
    return f"{'∞' if value is None else format(value, f'.{digits}g'):>{width}}"


if __name__ == "__main__":
    run(main)
