import json

import numpy as np
import pytest

from atlas.errors import UserError
from atlas.scaling import fit, fit_joint, load_runs, simulation
from atlas.scaling.joint.draws import joint_draws, law_draws, refitted
from atlas.scaling.planning.allocation import allocation_band, compute_optimal
from atlas.scaling.planning.mixtures import MixtureLaw, TrustRegion, optimal_mixture

L = 6
NAMES = ("E", "A", "alpha", "B", "beta", "lambda")
TRUTH = simulation.CHINCHILLA


@pytest.fixture(scope="module")
def study():
    law = simulation.truth(L, 1)
    runs = load_runs(simulation.table(law, simulation.mixtures(L, 5, 1, 8, 0, np.random.default_rng(1)), 1))
    return law, runs, fit_joint(runs)


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
    return {"parameters": {name: {"value": value} for name, value in TRUTH.items()}, "covariance": covariance}


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
    draws = law_draws({"parameters": parameters, "covariance": found | {"centre": {"N": 1e9, "D": 1e11}}}, 50)
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
            assert band[f"{name}_low"] < getattr(plan, name) < band[f"{name}_high"]
            inside.append(band[f"{name}_low"] <= getattr(best, name) <= band[f"{name}_high"])
        assert 0 <= band["regret_high"] < 0.05
    assert 0.78 <= np.mean(inside) <= 0.99


def test_band_under_repetition_is_the_minimum_of_every_draw():
    draws = law_draws(certain(0.05), 7) | {"lambda": np.full(7, 0.1)}
    best = compute_optimal(draws, 1e22, 1e10)
    for i in range(7):
        one = compute_optimal({name: float(values[i]) for name, values in draws.items()}, 1e22, 1e10)
        assert best.params[i] == pytest.approx(one.params, rel=1e-6)
        assert best.loss[i] == pytest.approx(one.loss, rel=1e-12)
    assert (best.epochs > 1).all()


@pytest.mark.thorough
def test_joint_draws_have_the_posteriors_mean_and_spread(study):
    _, _, found = study
    draws = joint_draws(found, 4000)
    scale = np.sqrt(np.diagonal(found.covariance, axis1=1, axis2=2))
    assert draws.tau.shape == (4000, L, L) and set(draws.levels) == {"E", "A", "alpha", "B", "beta", "lambda"}
    off = ~np.eye(L, dtype=bool)
    np.testing.assert_allclose(draws.tau.std(0)[off], scale[:, 6 : 6 + L][off], rtol=0.08)
    np.testing.assert_allclose(draws.tau.mean(0)[off], found.theta[:, 6:][off], atol=0.08 * scale[:, 6 : 6 + L].max())
    np.testing.assert_allclose(np.log(draws.levels["beta"]).std(0), scale[:, 4], rtol=0.08)
    assert draws.phi.std() == pytest.approx(scale[0, 6 + L], rel=0.08)
    np.testing.assert_array_equal(draws.language("l2")["E"], draws.levels["E"][:, 2])
    # B at one token and beta move together, as their estimates do.
    assert np.corrcoef(np.log(draws.levels["B"][:, 0]), draws.levels["beta"][:, 0])[0, 1] > 0.9


@pytest.mark.thorough
def test_drawn_laws_agree_with_the_runs(study):
    _, runs, found = study
    draws, rows = joint_draws(found, 30), runs.where(runs.run % 3 == 0)
    fitted = MixtureLaw.from_parameters(found.parameters).loss(rows.N, rows.D, rows.U.min(0))
    at = np.arange(len(rows)), rows.target
    off = []
    for i in range(30):
        levels = {name: values[i] for name, values in draws.levels.items()}
        law = MixtureLaw(draws.targets, draws.sources, levels, draws.tau[i], draws.phi[i])
        off.append((law.loss(rows.N, rows.D, rows.U.min(0)) / fitted - 1)[at])
    _, deviation = found.predict_runs(rows)
    assert abs(np.mean(off)) < 0.3 * np.std(off)
    assert np.std(off) == pytest.approx(np.mean(deviation / fitted[at]), rel=0.5)


@pytest.mark.thorough
def test_regret_of_a_mixture_covers_what_the_truth_shows(study):
    law, runs, found = study
    trust = TrustRegion.of_runs(MixtureLaw.from_parameters(found.parameters), runs)
    fitted = MixtureLaw.from_parameters(found.parameters)
    plan = optimal_mixture(fitted, 1e22, trust, draws=joint_draws(found, 24))
    levels = dict(zip(fitted.levels, (law.E, law.A, law.alpha, law.B, law.beta, law.lam), strict=True))
    truth = MixtureLaw(law.languages, law.languages, levels, law.tau, 0.0)
    best = optimal_mixture(truth, 1e22, TrustRegion(trust.params, np.full(L, 1e-3), trust.share_floor))
    D = plan.tokens * plan.table.share.to_numpy()
    real = truth.loss(plan.params, D, np.full(L, np.inf)).mean()
    assert plan.band["loss_low"] < plan.loss < plan.band["loss_high"]
    assert 0 <= plan.band["regret_median"] <= plan.band["regret_high"] < 0.1
    assert abs(real - plan.loss) < 3 * (plan.band["loss_high"] - plan.band["loss_low"])
    assert real - best.loss < 3 * plan.band["regret_high"] + 0.01
    assert (plan.table.share_low <= plan.table.share_high).all()
    assert plan.band["params_low"] <= plan.band["params_high"] <= trust.params[1] * 1.001


@pytest.mark.thorough
def test_a_study_is_refitted_only_if_it_is_the_same(study):
    _, runs, found = study
    document = found.to_json()
    assert refitted(document, runs).objective == pytest.approx(found.objective, rel=1e-9)
    with pytest.raises(UserError, match="300 rows"):
        refitted(document | {"n_rows": 300}, runs)
    with pytest.raises(UserError, match="of the chinchilla law"):
        refitted(document | {"law": "chinchilla"}, runs)
    moved = {"E[l0]": document["parameters"]["E[l0]"] | {"value": 9.0}}
    with pytest.raises(UserError, match="other parameters than"):
        refitted(document | {"parameters": document["parameters"] | moved}, runs)
