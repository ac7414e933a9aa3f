import dataclasses

import numpy as np
import pandas as pd
import pytest

from atlas.scaling import fit, load_runs
from atlas.scaling.planning.practice import advice, expected_errors
from atlas.scaling.table.splits import past_warm_up
from checked import UserError

LAW = {"E": 1.7, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}


def family(sizes: int = 5, checkpoints: int = 12, sigma: float = 0.003, seed: int = 0, level: float = 1.0, **law):
    """Curves of one family: tokens in equal steps to 3e11, with a bump in the warm-up."""
    law, random = LAW | law, np.random.default_rng(seed)
    N, D = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 1e10, sizes), np.linspace(5e9, 3e11, checkpoints)))
    loss = law["E"] + law["A"] / N ** law["alpha"] + law["B"] / D ** law["beta"]
    loss = loss * np.exp(sigma * random.normal(size=N.size) + 0.2 * (D <= 1e10))
    return load_runs(pd.DataFrame({"run": N.astype(str), "num_params": N, "tokens": D, "loss": level * loss}))


def test_expected_errors_are_those_of_simulated_fits():
    runs = family(sigma=0.002)
    runs = past_warm_up(runs)
    noise = dataclasses.replace(fit("chinchilla", runs).diagnostics, sigma=0.002, correlation=0.0)
    truth = dataclasses.replace(fit("chinchilla", runs), diagnostics=noise)
    loud = dataclasses.replace(truth, diagnostics=dataclasses.replace(noise, sigma=0.01))
    design = pd.DataFrame({"num_params": runs.N, "tokens": runs.total_tokens, "run": runs.run})
    target = {"N": 1e11, "D": 1e12}
    good, noisy = (np.median(expected_errors(design, target, law)) for law in (truth, loud))
    errors = [
        abs(fit("chinchilla", again, warm_up=0).predict(**target)[0] / truth.predict(**target)[0] - 1)
        for again in redrawn(truth, runs)
    ]
    assert good < noisy and good == pytest.approx(np.median(errors), rel=0.5)


def redrawn(truth, runs):
    random = np.random.default_rng(5)
    for _ in range(30):
        loss = truth.predict_runs(runs)[0] * np.exp(0.002 * random.normal(size=len(runs)))
        yield load_runs(runs.frame.assign(loss=loss))


def test_advice_ranks_plans_that_the_budget_affords():
    runs = family(sizes=3)
    table, notes = advice(runs, 1e22)
    assert (table["flops"] <= 1e22 * (1 + 1e-6)).all() and (table["models"] == 0).sum() == 1
    assert table["expected_are"].is_monotonic_increasing
    assert any("lie in the warm-up" in note for note in notes) and any("3 sizes" in note for note in notes)
    with pytest.raises(UserError, match="positive number of FLOPs"):
        advice(runs, -1.0)
