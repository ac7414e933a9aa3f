import numpy as np
import pandas as pd
import pytest

from atlas.errors import UserError
from atlas.scaling import fit, heldout, load_runs
from atlas.scaling.holdout import after_warm_up, split_runs
from atlas.scaling.planning.practice import (
    advice,
    borrow,
    expected_are,
    family_prior,
    number_against_size,
    predict_target,
    seed_deviation,
)

LAW = {"E": 1.7, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}


def family(sizes: int = 5, checkpoints: int = 12, sigma: float = 0.003, seed: int = 0, level: float = 1.0, **law):
    """Curves of one family: tokens in equal steps to 3e11, with a bump in the warm-up."""
    law, random = LAW | law, np.random.default_rng(seed)
    N, D = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 1e10, sizes), np.linspace(5e9, 3e11, checkpoints)))
    loss = law["E"] + law["A"] / N ** law["alpha"] + law["B"] / D ** law["beta"]
    loss = loss * np.exp(sigma * random.normal(size=N.size) + 0.2 * (D <= 1e10))
    return load_runs(pd.DataFrame({"run": N.astype(str), "num_params": N, "tokens": D, "loss": level * loss}))


def test_the_guide_cuts_the_warm_up_and_tests_the_end_of_the_largest_run():
    runs = family()
    kept = after_warm_up(runs)
    np.testing.assert_array_equal(kept, runs.total_tokens > 1e10)
    train, test = split_runs(runs, "guide")
    assert train.N.max() < test.N.min() and train.total_tokens.min() > 1e10
    assert test.total_tokens.min() >= 0.7 * 3e11 and len(test) == 4
    short = runs.where(runs.total_tokens < 6e9)
    assert after_warm_up(short).all()
    scores = heldout(runs, "guide", "chinchilla")
    assert scores["are"] < 0.01 and scores["n_train"] == len(train) and scores["n_heldout"] == 4


def test_scaling_down_predicts_the_smallest_model():
    train, test = split_runs(family(), "smallest_n")
    assert test.N.max() < train.N.min()


def test_part_of_the_target_sharpens_its_prediction():
    runs = family(sizes=4, sigma=0.004)
    errors = {fraction: predict_target(runs, fraction) for fraction in (0.0, 0.5)}
    width = {fraction: found["high"] - found["low"] for fraction, found in errors.items()}
    assert width[0.5] < width[0.0] and errors[0.5]["are"] < 0.01
    with pytest.raises(UserError, match="from 0 to below"):
        predict_target(runs, 0.9)


def test_borrowed_parameters_make_two_sizes_predict_a_third():
    donors = [
        fit("chinchilla", (rows := family(seed=i, alpha=a, beta=b)).where(after_warm_up(rows)))
        for i, (a, b) in enumerate([(0.33, 0.36), (0.36, 0.37), (0.35, 0.38)])
    ]
    runs = family(sizes=6, seed=9)
    few = runs.where(np.isin(runs.N, np.unique(runs.N)[:2]) & after_warm_up(runs))
    target = runs.where(runs.N > 9e9)
    alone, helped = fit("chinchilla", few), borrow("chinchilla", few, donors)
    errors = [np.mean(np.abs(f.predict_runs(target)[0][1:] / target.loss[1:] - 1.0)) for f in (alone, helped)]
    assert errors[1] < 0.01 and errors[1] < errors[0]
    assert not helped.parameters["alpha"].identified


def test_levels_of_another_unit_are_not_borrowed():
    donors = [fit("chinchilla", family(seed=i)) for i in range(3)]
    runs = family(sizes=2, seed=9, level=0.2)
    assert any("contradict" in warning for warning in borrow("chinchilla", runs, donors).warnings)
    bits = [fit("chinchilla", load_runs(family(seed=i).frame.assign(loss_unit="bits"))) for i in range(3)]
    with pytest.raises(UserError, match=r"in bits, the runs' are in nats"):
        fit("chinchilla", load_runs(runs.frame.assign(loss_unit="nats")), priors=family_prior(bits))
    with pytest.raises(UserError, match="three fits or more"):
        family_prior(bits[:2])


def test_number_against_size_covers_every_choice():
    table = number_against_size(family(sizes=5))
    assert table["models"].tolist() == [3, 4, 3] and (table["are"] < 0.1).all()


def test_seeds_alone_tell_their_deviation():
    table = pd.concat([family(checkpoints=1, sigma=0.01, seed=i).frame.assign(seed=i) for i in range(40)])
    assert seed_deviation(load_runs(table)) == pytest.approx(0.01, rel=0.15)
    with pytest.raises(UserError, match="other seeds"):
        seed_deviation(family())


def test_expected_error_is_that_of_simulated_fits():
    runs = family(sigma=0.002)
    runs = runs.where(after_warm_up(runs))
    truth = fit("chinchilla", runs)
    design = pd.DataFrame({"num_params": runs.N, "tokens": runs.total_tokens, "run": runs.run})
    target = {"N": 1e11, "D": 1e12}
    good = expected_are(design, target, [truth], sigma=0.002, correlation=0.0)
    noisy = expected_are(design, target, [truth], sigma=0.01, correlation=0.0)
    errors = [
        abs(fit("chinchilla", again).predict(**target)[0] / truth.predict(**target)[0] - 1)
        for again in redrawn(truth, runs)
    ]
    assert good.median < noisy.median and good.median <= good.high
    assert good.median == pytest.approx(np.median(errors), rel=0.5)


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
