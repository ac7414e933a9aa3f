"""Fits a scaling law to a runs table and says how far to trust it.

    python -m experiments.fit --runs=runs.csv --law=atlas --holdout=largest_n --workdir=DIR
    python -m experiments.fit --runs=runs.csv --law=atlas --labels=families.csv --lambda_kind=source --workdir=DIR
    python -m experiments.fit --runs=runs.csv --law=chinchilla --where='language == "fr"' --workdir=DIR
    python -m experiments.fit --runs=runs.csv --law=chinchilla --bootstrap=1000 --advise=1e20 --workdir=DIR

Fits the ends of cooldowns of runs from scratch, where the table tells them. Prints parameters with 90 % intervals,
held-out scores and warnings, and writes them to DIR/fit.json. A 240-row table takes seconds, nearly all of them
compilation.
"""

import json
import pathlib

from absl import flags

from atlas import scaling
from atlas.errors import UserError, unknown
from atlas.files import write_atomically
from experiments import _app

_RUNS = flags.DEFINE_string("runs", "", "runs table: CSV or Parquet, one row an evaluation")
_LAW = flags.DEFINE_enum("law", "atlas", ["atlas", *scaling.LAWS], "law to fit; atlas fits all languages jointly")
_WORKDIR = flags.DEFINE_string("workdir", "", "directory that receives fit.json")
_FAMILY = flags.DEFINE_string("family", "", "keep the rows whose column family has this value")
_WHERE = flags.DEFINE_string("where", "", "keep the rows that satisfy this pandas query, e.g. 'num_params > 1e6'")
_OBJECTIVE = flags.DEFINE_enum(
    "objective", None, list(scaling.OBJECTIVES), "loss of log residuals (default huber; not atlas)"
)
_DELTA = flags.DEFINE_float("delta", None, "corner of the Huber loss, in log loss (default 1e-3; not atlas)")
_HOLDOUT = flags.DEFINE_enum("holdout", "none", ["none", *scaling.SPLITS], "runs to hold out and predict")
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
    scaling.TAU_PRIORS,
    "what transfer weights borrow: from related pairs and from the target's other pairs (targets, default), from "
    "related pairs, or nothing (only atlas)",
)
_LAMBDA_KIND = flags.DEFINE_enum(
    "lambda_kind", None, scaling.LAMBDA_KINDS, "whose the repetition rate is (default target; only atlas)"
)
_SEED = flags.DEFINE_integer("seed", 0, "seed of the random split and of the resamples")


def main(_) -> None:
    """Fits, prints and writes."""
    _app.require(runs=_RUNS.value, workdir=_WORKDIR.value)
    runs = _select(scaling.load_runs(_RUNS.value)).comparable()
    options = _joint_options(runs) if _LAW.value == "atlas" else _options()
    split = None if _HOLDOUT.value == "none" else _HOLDOUT.value
    document, text = scaling.fit_document(
        runs, _LAW.value, options, split, resamples=_BOOTSTRAP.value, advise=_ADVISE.value, seed=_SEED.value
    )
    print(text)
    path = pathlib.Path(_WORKDIR.value) / "fit.json"
    write_atomically(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {path}")


def _select(runs: scaling.Runs) -> scaling.Runs:
    if _FAMILY.value:
        families = runs.frame["family"].astype(str).unique() if "family" in runs.frame else []
        if _FAMILY.value not in families:
            raise unknown("family", _FAMILY.value, families)
        runs = runs.where((runs.frame["family"].astype(str) == _FAMILY.value).to_numpy())
    return runs.where(_WHERE.value) if _WHERE.value else runs


def _options() -> dict:
    for flag in (_LABELS, _TAU_PRIOR, _LAMBDA_KIND):
        if flag.value is not None:
            raise UserError(f"--{flag.name} applies to the atlas law only, not to {_LAW.value}; drop it")
    given = {"objective": _OBJECTIVE.value, "delta": _DELTA.value}
    return {name: value for name, value in given.items() if value is not None}


def _joint_options(runs: scaling.Runs) -> dict:
    for flag in (_OBJECTIVE, _DELTA, _BOOTSTRAP, _ADVISE):
        if flag.value:
            raise UserError(f"--{flag.name} does not apply to the atlas law, which estimates its own noise; drop it")
    given = {"tau_prior": _TAU_PRIOR.value, "lambda_kind": _LAMBDA_KIND.value}
    # The flat prior knows no related pairs: labels that nobody asked for are not a contradiction.
    source = _LABELS.value or ("none" if _TAU_PRIOR.value == "flat" else "published")
    known = scaling.labels(runs.languages, source) | {"initial_tau": scaling.starting_tau(runs)}
    return known | {name: value for name, value in given.items() if value is not None}


if __name__ == "__main__":
    _app.run(main)
