import dataclasses
import pathlib

import numpy as np
import pandas as pd
import pytest

from atlas.scaling import fit, load_runs
from atlas.scaling.planning import practice
from atlas.scaling.planning.practice import advice, expected_errors
from atlas.scaling.single.fitted import columns_of, loss_and_slope
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


TARGET, NOTHING = {"N": 1e11, "D": 1e12}, pd.DataFrame()
COMMITTED = pathlib.Path(__file__).parents[4] / "experiments" / "results"


@pytest.fixture(scope="module")
def truth():
    """A fit of the table's checkpoints behind the warm-up, and their runs."""
    runs = past_warm_up(family(sigma=0.002))
    return fit("chinchilla", runs, warm_up=0), runs


def noisy(truth, sigma, correlation):
    noise = dataclasses.replace(truth.diagnostics, sigma=sigma, correlation=correlation)
    return dataclasses.replace(truth, diagnostics=noise)


def planned(runs):
    return pd.DataFrame({"num_params": runs.N, "tokens": runs.total_tokens, "run": runs.run})


def test_expected_errors_are_those_of_simulated_fits(truth):
    law, runs = noisy(truth[0], 0.002, 0.0), truth[1]
    expected = expected_errors(planned(runs), [NOTHING], TARGET, law, law.fitted[None]).item()
    errors = [
        abs(fit("chinchilla", again, warm_up=0).predict(**TARGET)[0] / law.predict(**TARGET)[0] - 1)
        for again in redrawn(law, runs)
    ]
    assert expected == pytest.approx(np.mean(errors), rel=0.35)  # of 30 draws: 2.5 standard errors of their mean
    loud = noisy(law, 0.01, 0.0)
    assert expected_errors(planned(runs), [NOTHING], TARGET, loud, law.fitted[None]).item() > 4 * expected


def test_rows_weigh_as_their_correlation_deserves_and_more_runs_never_tell_less(truth):
    law, runs = noisy(truth[0], 0.01, 0.7), truth[1]
    few, rest = (planned(runs.where(rows)) for rows in (runs.N < 5e9, runs.N >= 5e9))
    laws = law.fitted + np.linspace(-0.1, 0.1, 20)[:, None]
    laws[7] = law.fitted
    found = expected_errors(few, [NOTHING, rest, NOTHING], TARGET, law, laws)
    assert found.shape == (3, 20) and (found[1] < found[0]).all() and (found[0] == found[2]).all()
    same = runs.run[:, None] == runs.run
    covariance = 0.01**2 * np.pi / 2 * np.where(same, 0.7, 0.0) + 0.01**2 * np.pi / 2 * 0.3 * np.eye(len(runs))
    loss, slope = loss_and_slope(law.model, law.fitted, columns_of(law.model, runs, "total"))
    at, aim = loss_and_slope(law.model, law.fitted, {name: np.full(1, value) for name, value in TARGET.items()})
    jacobian, aim = slope / loss[:, None], aim[0] / at[0]
    information = jacobian.T @ np.linalg.solve(covariance, jacobian)
    by_hand = np.sqrt(2 / np.pi * (aim @ np.linalg.solve(information, aim)))
    assert found[1, 7] == pytest.approx(by_hand, rel=0.06)  # whose corner is 0, not a tenth of sigma


def redrawn(truth, runs):
    random = np.random.default_rng(5)
    for _ in range(30):
        loss = truth.predict_runs(runs)[0] * np.exp(0.002 * random.normal(size=len(runs)))
        yield load_runs(runs.frame.assign(loss=loss))


def test_advice_ranks_plans_that_the_budget_affords_alike_whatever_the_seed():
    runs = family(sizes=3)
    (table, notes), *others = (advice(runs, 1e22, seed=seed) for seed in range(3))
    assert (table["flops"] <= 1e22 * (1 + 1e-6)).all() and (table["models"] == 0).sum() == 1
    best = table.groupby("rank")["expected_are"].min()
    assert best.is_monotonic_increasing and table["rank"].is_monotonic_increasing and table["rank"].nunique() > 4
    assert table["models"].iloc[-1] == 0  # whatever is trained tells more than nothing
    assert table["beaten"][0] == 0 and (table["monte_carlo"] < 0.2 * table["expected_are"]).all()
    plans = ["models", "tokens_per_param"]
    assert all(again[plans].equals(table[plans]) for again, _ in others)
    assert any("lie in the warm-up" in note for note in notes) and any("3 sizes" in note for note in notes)
    with pytest.raises(UserError, match="positive number of FLOPs"):
        advice(runs, -1.0)
    with pytest.raises(UserError, match="10 FLOPs train no model"):
        advice(runs, 10.0)
    few, _ = advice(runs, 4e13)  # five models of a thousandth of the smallest, at 100 tokens per parameter, cost 3e13
    assert (few["flops"] <= 4e13 * (1 + 1e-6)).all() and len(few) == 7 and len(advice(runs, 2e13)[0]) == 6


@pytest.mark.parametrize(
    ("study", "language", "budget"), [("eight_languages", "en", 1e14), ("documentation", "en", 1e14)]
)
def test_advice_on_real_runs_is_one_order_whatever_the_seed(study, language, budget):
    runs = load_runs(COMMITTED / study / "runs.csv").where(f"language == {language!r}").comparable()
    runs = runs.where(runs.own(runs.D) > 0)
    tables = [advice(runs, budget, seed=seed)[0] for seed in range(3)]
    plans = ["models", "tokens_per_param"]
    assert all(table[plans].equals(tables[0][plans]) for table in tables)
    errors, shown = (np.array([table[name] for table in tables]) for name in ("expected_are", "monte_carlo"))
    # What is shown as the error of the draw is what another draw moves.
    assert (np.ptp(errors, 0) < 5 * shown.max(0)).all() and (shown < 0.01 * errors).all()


def test_advice_counts_the_tokens_that_the_law_means():
    """A language of a fiftieth of every mixture, with its own tokens or with those of the mixture beside."""
    runs = family(sizes=4, checkpoints=6)
    table = runs.frame.assign(language="sw")
    mixed = table.drop(columns="tokens").assign(**{"tokens.sw": table["tokens"], "tokens.en": 49 * table["tokens"]})
    plain, beside = (advice(load_runs(t), 1e21, "chinchilla", tokens="own")[0] for t in (table, mixed))
    pd.testing.assert_frame_equal(plain, beside)


def test_advice_knows_that_tokens_repeat(monkeypatch):
    """Where the runs saw all there is, longer ones do not tell what they would with text without end."""
    runs = load_runs(family(sizes=4, checkpoints=3).frame.assign(unique_tokens=3e9))
    known, errors = practice._here, []
    for found in (known, lambda *fit: (known(*fit)[0].drop(columns="unique_tokens"), np.inf)):
        monkeypatch.setattr(practice, "_here", found)
        errors.append(advice(runs, 1e22, "data_constrained", warm_up=0.0)[0])
    assert not np.allclose(errors[0]["expected_are"], errors[1]["expected_are"], rtol=0.05)
