import json

import numpy as np
import pytest

from atlas.scaling import fit, load_runs, simulation
from atlas.scaling.planning.allocation import allocation_band, compute_optimal
from atlas.scaling.single.draws import band, law_draws

TRUTH = simulation.CHINCHILLA


def certain(error=0.0) -> dict:
    """A document whose terms at the middle of the runs have independent relative errors."""
    slope = np.eye(5)
    slope[1, 2], slope[3, 4] = TRUTH["alpha"] * np.log(1e9), TRUTH["beta"] * np.log(1e11)
    covariance = {
        "coordinates": [f"log {name}" for name in TRUTH],
        "matrix": (slope @ slope.T * error**2).tolist(),
        "centre": {"N": 1e9, "D": 1e11},
        "freedom": 1e6,
    }
    parameters = {name: {"value": value} for name, value in TRUTH.items()}
    return {"law": "chinchilla", "parameters": parameters, "covariance": covariance}


def document(seed=0) -> dict:
    found = fit("chinchilla", load_runs(simulation.series(60, seed)))
    return json.loads(json.dumps(found.to_json(), allow_nan=False))


@pytest.mark.thorough
def test_draws_have_the_intervals_of_the_fit():
    found = document()
    draws = law_draws(found, 20_000)
    for name in ("E", "alpha", "beta"):
        estimate = found["parameters"][name]
        np.testing.assert_allclose(
            np.quantile(draws[name], [0.05, 0.95]), [estimate["low"], estimate["high"]], rtol=0.02
        )
    assert np.corrcoef(np.log(draws["A"]), np.log(draws["alpha"]))[0, 1] > 0.95


def test_a_law_with_one_exponent_ties_both_terms_to_it():
    matrix = np.diag([0.0, 0.0, 0.04, 0.0])
    for i, column in ((1, 1e9), (3, 1e11)):
        # Terms at the middle of the runs are known exactly, so the coefficients follow the exponent.
        matrix[i, 2] = matrix[2, i] = 0.04 * 0.3 * np.log(column)
        matrix[i, i] = 0.04 * (0.3 * np.log(column)) ** 2
    matrix[1, 3] = matrix[3, 1] = 0.04 * 0.09 * np.log(1e9) * np.log(1e11)
    values = {"E": 1.0, "A": 400.0, "alpha": 0.3, "B": 900.0}
    found = {"coordinates": [f"log {name}" for name in values], "matrix": matrix.tolist(), "freedom": 1e6}
    parameters = {name: {"value": value} for name, value in values.items()}
    found["centre"] = {"N": 1e9, "D": 1e11}
    draws = law_draws({"law": "chinchilla_tied", "parameters": parameters, "covariance": found}, 50)
    assert np.ptp(draws["alpha"]) > 0.1
    np.testing.assert_allclose(draws["A"] / 1e9 ** draws["alpha"], 400 / 1e9**0.3, rtol=1e-6)
    np.testing.assert_allclose(draws["B"] / 1e11 ** draws["alpha"], 900 / 1e11**0.3, rtol=1e-6)


def test_draws_spread_as_the_covariance_says():
    draws = law_draws(certain(0.03), 20_000)
    for name in ("E", "alpha", "beta"):
        assert np.log(draws[name]).mean() == pytest.approx(np.log(TRUTH[name]), abs=1e-3)
        assert np.log(draws[name]).std() == pytest.approx(0.03, rel=0.03)
    term = draws["A"] / 1e9 ** draws["alpha"]
    assert np.log(term).std() == pytest.approx(0.03, rel=0.03)
    assert abs(np.corrcoef(term, draws["alpha"])[0, 1]) < 0.03
    still = law_draws(certain(), 3)
    np.testing.assert_allclose(still["B"], TRUTH["B"])


def test_even_draws_are_of_the_same_law_and_average_better():
    found = certain(0.03)
    found["covariance"]["freedom"] = 8.0
    size = np.sqrt(8 / 6)  # of Student's t
    means = {}
    for even in (False, True):
        alphas = np.log([law_draws(found, 256, (seed, 1), even=even)["alpha"] for seed in range(20)])
        assert alphas.std() == pytest.approx(0.03 * size, rel=0.05)
        means[even] = alphas.mean(1).std()
    assert means[True] < 0.1 * means[False]
    drawn = law_draws(found, 256, even=True)
    term = drawn["A"] / 1e9 ** drawn["alpha"]
    assert np.log(term).std() == pytest.approx(0.03 * size, rel=0.1)
    assert abs(np.corrcoef(term, drawn["alpha"])[0, 1]) < 0.1


def test_a_band_may_be_without_end():
    assert band(np.array([1.0] * 50 + [np.inf] * 50 + [np.nan])) == (1.0, np.inf)


def test_without_a_covariance_there_are_no_draws():
    found = certain()
    assert law_draws({"parameters": found["parameters"]}, 5) is None
    found["covariance"]["matrix"][0][0] = None
    assert law_draws(found, 5) is None


@pytest.mark.thorough
def test_band_of_an_allocation_holds_the_truth_about_as_often_as_it_says():
    best, inside = compute_optimal(TRUTH, 1e23), []
    for seed in range(20):
        found = document(seed)
        values = {name: estimate["value"] for name, estimate in found["parameters"].items()}
        plan = compute_optimal(values, 1e23)
        band = allocation_band(law_draws(found, 400), 1e23, plan)
        for name in ("params", "tokens", "loss"):
            assert band[f"{name}_low"] < plan[name] < band[f"{name}_high"]
            inside.append(band[f"{name}_low"] <= best[name] <= band[f"{name}_high"])
        assert 0 <= band["regret_high"] < 0.05
    assert 0.78 <= np.mean(inside) <= 0.99


def test_band_under_repetition_is_the_minimum_of_every_draw():
    draws = law_draws(certain(0.05), 7) | {"lambda": np.full(7, 0.1)}
    best = compute_optimal(draws, 1e22, 1e10)
    for i in range(7):
        one = compute_optimal({name: float(values[i]) for name, values in draws.items()}, 1e22, 1e10)
        assert best["params"][i] == pytest.approx(one["params"], rel=1e-6)
        assert best["loss"][i] == pytest.approx(one["loss"], rel=1e-12)
    assert (best["epochs"] > 1).all()
