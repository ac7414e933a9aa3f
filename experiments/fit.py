"""Fits a scaling law to a runs table and says how far to trust it.

    python -m experiments.fit --runs=runs.csv --law=atlas --holdout=largest_n --workdir=DIR
    python -m experiments.fit --runs=runs.csv --law=atlas --labels=families.csv --lambda_kind=source --workdir=DIR
    python -m experiments.fit --runs=runs.csv --law=chinchilla --where='language == "fr"' --workdir=DIR
    python -m experiments.fit --runs=runs.csv --law=chinchilla --bootstrap=1000 --advise=1e20 --workdir=DIR
    python -m experiments.fit --runs=runs.csv --compare=chinchilla,data_constrained,farseer --workdir=DIR
    python -m experiments.fit --runs=export.csv --columns=loss=val_loss,num_params=n --law=my_laws.py:moe --workdir=DIR

Fits the ends of cooldowns of runs from scratch, where the table tells them. Prints parameters with 90 % intervals,
held-out scores and warnings, writes them to DIR/fit.json, parameters.csv and parameters.tex, and draws the fit. A
240-row table takes seconds, nearly all of them compilation.
"""

import json
import pathlib

from absl import flags

from atlas import scaling
from checked import UserError
from checked.files import write_atomically
from checked.processes import compile_lean
from experiments import _app

_RUNS = flags.DEFINE_string("runs", "", "runs table: CSV or Parquet, one row an evaluation")
_COLUMNS = _app.define_columns()
_LAW = flags.DEFINE_string(
    "law", "", f"atlas (all languages jointly; default), {', '.join(scaling.LAWS)}, or FILE.py:NAME of your own"
)
_COMPARE = flags.DEFINE_list("compare", [], "laws to rank by held-out error and criteria; the best is fitted")
_FIGURES = flags.DEFINE_bool("figures", True, "draw the fit beside fit.json")
_WORKDIR = flags.DEFINE_string("workdir", "", "directory that receives fit.json")
_WHERE = flags.DEFINE_string("where", "", "keep the rows that satisfy this pandas query, e.g. 'num_params > 1e6'")
_OBJECTIVE = flags.DEFINE_enum(
    "objective", None, list(scaling.OBJECTIVES), "loss of log residuals (default huber; not atlas)"
)
_RESIDUAL = flags.DEFINE_enum(
    "residual", None, scaling.RESIDUALS, "of log losses (default), or of raw ones, which may have any sign (not atlas)"
)
_WARM_UP = flags.DEFINE_float(
    "warm_up",
    None,
    "part of each run's tokens to leave out at its start; 0 keeps all (default: chosen on the data; not atlas)",
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
_MIXING = flags.DEFINE_enum(
    "mixing",
    None,
    scaling.MIXINGS,
    "how tokens of several languages make effective ones: their weighted sum (default) or with constant elasticity of "
    "substitution, ces (only atlas)",
)
_SMALL = 512  # rows times languages, up to which one fit takes less time than to optimise its code
_SEED = flags.DEFINE_integer("seed", 0, "seed of the random split, of the resamples and of advice", lower_bound=0)


def main(_) -> None:
    """Fits, prints and writes."""
    _app.require(runs=_RUNS.value, workdir=_WORKDIR.value)
    _app.check_outputs(_WORKDIR.value)
    runs = scaling.load_runs(_RUNS.value, _COLUMNS(), **_reading())
    runs = (runs.where(_WHERE.value) if _WHERE.value else runs).comparable()
    split = None if _HOLDOUT.value == "none" else _HOLDOUT.value
    if len(runs) * len(runs.languages) <= _SMALL and not (_BOOTSTRAP.value or _ADVISE.value or _COMPARE.value):
        compile_lean(leanest=True)
    how = {"resamples": _BOOTSTRAP.value, "advise": _ADVISE.value, "seed": _SEED.value, "laws": _COMPARE.value}
    with _app.said_if_slow("fitting: seconds of compilation, or longer for a long table or several laws"):
        document, text, found = scaling.fit_document(runs, _law(), _options(runs), split, **how)
    table = {"runs": str(pathlib.Path(_RUNS.value).resolve()), "columns": _COLUMNS(), "where": _WHERE.value}
    document["source"] = table  # which plans of several languages read again
    print(text)
    workdir = pathlib.Path(_WORKDIR.value)
    files = {"fit.json": json.dumps(document, indent=1, ensure_ascii=False) + "\n"}
    files |= scaling.parameter_tables(document)
    if _FIGURES.value:
        from atlas import report  # matplotlib takes a second, which a fit without figures need not wait for

        files |= report.draw_fit(found, runs)
    for name, content in files.items():
        write_atomically(workdir / name, content)
    print(f"wrote {', '.join(files)} in {workdir}")


def _law() -> str:
    """The law to fit; "" for the best of those compared."""
    return _LAW.value or ("" if _COMPARE.value else "atlas")


def _reading() -> dict:
    """What the laws ask of the table."""
    laws = [scaling.law_named(name) for name in {_law(), *_COMPARE.value} - {"", "atlas"}]
    if not laws:
        return {}
    needs = dict.fromkeys(name for law in laws for name in law.needs)
    return {"needs": tuple(needs), "signed": all((_RESIDUAL.value or law.residual) == "raw" for law in laws)}


def _options(runs: scaling.Runs) -> dict:
    joint = _law() == "atlas"
    if joint and _COMPARE.value:
        raise UserError("--compare ranks laws of one language; drop --law=atlas")
    of_all = (_LABELS, _TAU_PRIOR, _LAMBDA_KIND, _MIXING)
    for flag in (_OBJECTIVE, _RESIDUAL, _WARM_UP, _DELTA, _BOOTSTRAP, _ADVISE) if joint else of_all:
        if flag.value != flag.default:
            why = ", which estimates its own noise" if joint else ": only to atlas"
            raise UserError(f"--{flag.name} does not apply to the {_law()} law{why}; drop it")
    own = (_TAU_PRIOR, _LAMBDA_KIND, _MIXING) if joint else (_OBJECTIVE, _DELTA, _RESIDUAL, _WARM_UP)
    given = {flag.name: flag.value for flag in own if flag.value is not None}
    if not joint:
        return given
    # The flat prior knows no related pairs: labels that nobody asked for are not a contradiction.
    source = _LABELS.value or ("none" if _TAU_PRIOR.value == "flat" else "published")
    return scaling.labels(runs.languages, source) | given


if __name__ == "__main__":
    _app.run(main, fits=True)
