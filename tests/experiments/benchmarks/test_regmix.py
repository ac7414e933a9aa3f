"""RegMix's comparison on simulated studies in its form."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from atlas.scaling import load_runs, simulation
from experiments.benchmarks import regmix


def tables(runs):
    """Two studies of `runs` mixtures of four domains, of which one is evaluated as Pile-CC."""
    truth = dataclasses.replace(simulation.truth(4, 0, eta=0.6), U=np.full(4, np.inf))
    for seed in (0, 1):
        plan = simulation.mixtures(4, 0, 0, 0, 0, np.random.default_rng(seed), sparse=runs)
        frame = simulation.table(truth, plan, seed, checkpoints=1, same=True)
        frame = frame.drop(columns=[name for name in frame if name.startswith("unique")])
        yield frame.replace({"language": {"l0": "pile_cc"}}).rename(columns={"tokens.l0": "tokens.pile_cc"})


def test_scores_are_of_every_domain_and_of_all():
    runs = load_runs(next(tables(30)))
    missed = np.where(runs.target == 0, 1.02, 1.0)
    rows = regmix._scores(30, "law", runs, missed * runs.loss, 1.0, True, missed > 1)
    by_domain = {row["domain"]: row for row in rows}
    assert set(by_domain) == {"all", *runs.targets} and by_domain["all"]["settled"]
    assert by_domain[runs.targets[0]]["error_percent"] == pytest.approx(2.0)
    assert by_domain["all"]["error_percent"] == pytest.approx(0.5) and by_domain["all"]["least"] == pytest.approx(1.0)
    assert by_domain["all"]["refused"] == (runs.target == 0).sum()


@pytest.mark.thorough
def test_a_whole_comparison(tmp_path, monkeypatch):
    for name, frame in zip(("train", "test"), tables(120), strict=True):
        frame.to_csv(tmp_path / f"{name}1m.csv.gz", index=False)
    monkeypatch.setattr(regmix, "_RUNS", (120,))
    rows, facts = regmix.run(str(tmp_path), str(tmp_path / "out"))
    best = next(row for row in rows if row["predictor"] == "law, ces" and row["domain"] == "all")
    # One domain of these noisy studies ranks at .96.
    assert best["settled"] and best["least"] > 0.95 and best["error_percent"] < 1.0
    assert set(facts["eta"]) == {"pile_cc", "l1", "l2", "l3"}
    assert (
        len(pd.read_csv(tmp_path / "out" / "mixture.csv")) == len(pd.read_csv(tmp_path / "out" / "transfer.csv")) == 4
    )
    for name in ("transfer.png", "runs.png"):
        assert (tmp_path / "out" / "figures" / name).stat().st_size > 1000
