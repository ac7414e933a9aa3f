"""Sixteen extrapolations of published families: the default fit, and priors and laws chosen without the target."""

import numpy as np
import pandas as pd
import pytest

from atlas.scaling import borrow, fit, load_runs
from atlas.scaling.single.comparison import criteria
from atlas.scaling.single.library import LAWS
from atlas.scaling.table.runs import Runs
from tests.atlas.scaling import published_runs

pytestmark = pytest.mark.thorough


def runs_of(rows: pd.DataFrame) -> Runs:
    """A run per model, or per row where every row is a final loss; every row counts, also a repeated one."""
    final = rows["family"].iloc[0].startswith("isoflop")
    run = np.arange(len(rows)).astype(str) if final else rows["model"].astype(str)
    return load_runs(rows[["num_params", "tokens_seen", "loss"]].assign(run=run, row=np.arange(len(rows))))


def error(fitted, test: pd.DataFrame) -> float:
    predicted, _ = fitted.predict(test["num_params"], test["tokens_seen"])
    return 100.0 * float(np.mean(np.abs(predicted / test["loss"] - 1.0)))


@pytest.fixture(scope="module")
def jobs():
    published_runs.path("families.csv.gz")
    return [(name, runs_of(train), test) for name, train, test in published_runs.module("development_jobs.py").jobs()]


@pytest.fixture(scope="module")
def default(jobs):
    return [fit("chinchilla", train) for _, train, _ in jobs]


def test_default_fits_extrapolate_within_two_per_cent(jobs, default):
    errors = [error(fitted, test) for fitted, (_, _, test) in zip(default, jobs, strict=True)]
    assert np.median(errors) <= 1.1 and np.mean(errors) <= 1.95, np.round(errors, 2)


def complete(train: Runs, test: pd.DataFrame):
    """A fit to all runs of a family, its target included."""
    extra = load_runs(test[["num_params", "tokens_seen", "loss"]].assign(row=np.arange(len(test))))
    table = pd.concat([train.frame, extra.frame.assign(run=test["model"].astype(str).to_numpy())])
    return fit("chinchilla", load_runs(table.assign(row=np.arange(len(table)))))


def siblings(name: str, donors: dict) -> list:
    """Fits of the other families of the same corpus that determine both exponents."""
    corpus = name.rpartition("-")[0]
    return [
        fitted
        for other, fitted in donors.items()
        if other != name
        and other.startswith(corpus)
        and all(fitted.parameters[n].identified for n in ("alpha", "beta"))
    ]


def chosen(train: Runs, fitted):
    """Farseer's law where the training runs alone prefer it, given enough sizes for its nine parameters."""
    if len(np.unique(train.N)) < 9:
        return fitted
    farseer = fit("farseer", train)
    return farseer if farseer.converged and criteria(farseer)[1] < criteria(fitted)[1] else fitted


def test_borrowed_priors_and_chosen_laws_beat_the_default(jobs, default):
    plain, best = [], []
    open_ = [name for name, train, _ in jobs if LAWS["chinchilla"].diagnose({"N": train.N, "D": train.total_tokens})]
    donors = {name: complete(train, test) for name, train, test in jobs if name in open_}
    for fitted, (name, train, test) in zip(default, jobs, strict=True):
        plain.append(error(fitted, test))
        if name in open_:
            fitted = borrow("chinchilla", train, siblings(name, donors))
        best.append(error(chosen(train, fitted), test))
    assert np.median(best) < np.median(plain) and np.mean(best) < np.mean(plain), np.round(best, 2)
