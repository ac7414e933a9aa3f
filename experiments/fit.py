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
from checked import UserError
from checked.files import write_atomically
from experiments import _app

_RUNS = flags.DEFINE_string("runs", "", "runs table: CSV or Parquet, one row an evaluation")
_COLUMNS = _app.define_columns()
_LAW = flags.DEFINE_enum("law", "atlas", ["atlas", *scaling.LAWS], "law to fit; atlas fits all languages jointly")
_WORKDIR = flags.DEFINE_string("workdir", "", "directory that receives fit.json")
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
    runs = scaling.load_runs(_RUNS.value, _COLUMNS())
    runs = (runs.where(_WHERE.value) if _WHERE.value else runs).comparable()
    split = None if _HOLDOUT.value == "none" else _HOLDOUT.value
    how = {"resamples": _BOOTSTRAP.value, "advise": _ADVISE.value, "seed": _SEED.value}
    document, text = scaling.fit_document(runs, _LAW.value, _options(runs), split, **how)
    print(text)
    path = pathlib.Path(_WORKDIR.value) / "fit.json"
    write_atomically(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    print(f"wrote {path}")


def _options(runs: scaling.Runs) -> dict:
    joint = _LAW.value == "atlas"
    for flag in (_OBJECTIVE, _DELTA, _BOOTSTRAP, _ADVISE) if joint else (_LABELS, _TAU_PRIOR, _LAMBDA_KIND):
        if flag.value:
            why = ", which estimates its own noise" if joint else ": only to atlas"
            raise UserError(f"--{flag.name} does not apply to the {_LAW.value} law{why}; drop it")
    own = (_TAU_PRIOR, _LAMBDA_KIND) if joint else (_OBJECTIVE, _DELTA)
    given = {flag.name: flag.value for flag in own if flag.value is not None}
    if not joint:
        return given
    # The flat prior knows no related pairs: labels that nobody asked for are not a contradiction.
    source = _LABELS.value or ("none" if _TAU_PRIOR.value == "flat" else "published")
    return scaling.labels(runs.languages, source) | {"initial_tau": scaling.starting_tau(runs)} | given


if __name__ == "__main__":
    _app.run(main)
