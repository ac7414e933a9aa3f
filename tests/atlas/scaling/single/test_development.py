"""Sixteen extrapolations of published families: the default fit, and laws chosen without the target."""

import numpy as np
import pandas as pd
import pytest

from atlas.scaling import fit, load_runs
from atlas.scaling.single.comparison import criteria
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
    assert np.median(errors) <= 1.1 and np.mean(errors) <= 1.6, np.round(errors, 2)


def test_intervals_of_new_runs_hold_their_losses(jobs, default):
    covered = []
    for fitted, (_, _, test) in zip(default, jobs, strict=True):
        low, high = fitted.run_interval(test["num_params"], test["tokens_seen"])
        covered.append(np.mean((test["loss"] >= low) & (test["loss"] <= high)))
    assert np.mean(covered) >= 0.86, np.round(covered, 2)
    finals = [name.startswith("isoflop") for name, _, _ in jobs]
    assert np.mean(np.array(covered)[finals]) >= 0.86, np.round(covered, 2)


def chosen(train: Runs, fitted):
    """Farseer's law where the training runs alone prefer it, given enough sizes for its nine parameters."""
    if len(np.unique(train.N)) < 9:
        return fitted
    farseer = fit("farseer", train)
    effective = farseer.diagnostics.independent_rows
    return farseer if farseer.converged and criteria(farseer, effective)[1] < criteria(fitted, effective)[1] else fitted


def test_laws_chosen_without_the_target_beat_the_default(jobs, default):
    plain = [error(fitted, test) for fitted, (_, _, test) in zip(default, jobs, strict=True)]
    best = [error(chosen(train, fitted), test) for fitted, (_, train, test) in zip(default, jobs, strict=True)]
    assert np.mean(best) < np.mean(plain), np.round(best, 2)
