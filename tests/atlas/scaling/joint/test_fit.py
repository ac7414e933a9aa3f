"""Recovery of known laws from simulated studies of six languages; one table shape, so one compilation."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from atlas.errors import UserError
from atlas.scaling import fit_joint, heldout, load_runs, simulation
from atlas.scaling import law as laws

L = 6
OFF = ~np.eye(L, dtype=bool)
MEDIUM = (6, 2, 24, 0)  # mono per language, copies of all pairs, uniform, Dirichlet: M160 for 6 languages
SMALL = (5, 1, 8, 0)
NAMES = ("E", "A", "alpha", "B", "beta", "lambda")


def study(design=MEDIUM, seed=0, phi=0.0, **noise):
    law = simulation.truth(L, seed, phi)
    plan = simulation.mixtures(L, *design, np.random.default_rng(seed))
    return law, simulation.table(law, plan, seed, **noise)


def natural_of(fit, law):
    return {n: np.array([fit.parameters[f"{n}[{k}]"].value for k in law.languages]) for n in NAMES}


def rmse(values):
    return float(np.sqrt(np.mean(np.square(values))))


def tau_errors(fit, law):
    return (fit.transfer_matrix().to_numpy() - law.tau)[OFF]


def covered(fit, law):
    low, high = (fit.transfer_matrix(field).to_numpy() for field in ("low", "high"))
    return ((low <= law.tau) & (law.tau <= high))[OFF]


@pytest.fixture(scope="module")
def medium():
    law, table = study()
    runs = load_runs(table)
    return law, runs, fit_joint(runs, law.families)


def test_medium_study_recovers_every_law(medium):
    law, _, fit = medium
    assert fit.converged
    assert rmse(tau_errors(fit, law)) <= 0.020
    values = natural_of(fit, law)
    assert rmse(values["alpha"] - law.alpha) <= 0.005
    assert rmse(values["beta"] - law.beta) <= 0.006
    assert rmse(np.log(values["E"] / law.E)) <= 0.010
    assert abs(fit.phi) <= 0.02
    assert fit.rho <= 0.15
    assert fit.sigma == pytest.approx(0.005, rel=0.1)
    assert fit.transfer_matrix("identified").to_numpy()[OFF].mean() > 0.9


def test_a_and_b_refer_to_one_parameter_and_one_token(medium):
    law, _, fit = medium
    for i, name in enumerate(law.languages):
        for key, value in (("A", law.A[i]), ("B", law.B[i])):
            assert np.log(fit.parameters[f"{key}[{name}]"].value / value) == pytest.approx(0.0, abs=0.4)


def test_small_study_recovers_tau():
    law, table = study(SMALL, seed=1)
    fit = fit_joint(load_runs(table), law.families)
    assert rmse(tau_errors(fit, law)) <= 0.040


@pytest.mark.parametrize("rho", [0.3, 0.6])
def test_correlated_checkpoints_are_seen_and_intervals_stay_honest(rho):
    inside, errors, found = [], [], []
    for seed in range(4):
        law, table = study(seed=seed, rho=rho)
        fit = fit_joint(load_runs(table), law.families)
        inside.append(covered(fit, law))
        errors.append(tau_errors(fit, law))
        found.append(fit.rho)
    assert abs(np.median(found) - rho) <= 0.15
    assert 0.80 <= np.mean(inside) <= 0.97
    assert rmse(errors) <= 0.040


def test_capacity_exponent_is_found():
    law, table = study(phi=0.11)
    fit = fit_joint(load_runs(table), law.families)
    assert fit.phi == pytest.approx(0.11, abs=0.01)
    assert fit.parameters["phi"].identified
    assert fit_joint(load_runs(table), law.families, capacity=False).phi == pytest.approx(0.0, abs=1e-6)


@pytest.mark.thorough
def test_without_noise_the_law_is_exact():
    law, table = study(sigma=0.0)
    fit = fit_joint(load_runs(table), law.families)
    assert fit.converged and np.abs(tau_errors(fit, law)).max() < 1e-6


def test_runs_that_diverged_lose_their_weight():
    law, table = study(rho=0.3, diverged=0.1)
    fit = fit_joint(load_runs(table), law.families)
    bad = table.groupby("run")["diverged"].first()
    low = np.array([fit.run_weights[run] < 0.2 for run in bad.index])
    assert low[bad].mean() >= 0.9
    assert low[~bad].mean() <= 0.05
    assert rmse(tau_errors(fit, law)) <= 0.040
    assert any("lost their weight" in warning for warning in fit.warnings)
    trusting = fit_joint(load_runs(table), law.families, robust=False)
    assert rmse(tau_errors(trusting, law)) > rmse(tau_errors(fit, law))


def even_designs():
    every = list(itertools.combinations(range(L), 2)) * 4
    pairs = [("bilingual", np.eye(L)[list(pair)].mean(0)) for pair in every]
    return {"pairs at 50/50": pairs, "all languages, evenly": [("uniform", np.full(L, 1 / L))] * 40}


@pytest.mark.parametrize("design", even_designs())
def test_designs_without_a_second_share_are_flagged_not_answered(design):
    law = dataclasses.replace(simulation.truth(L, 0), U=np.full(L, np.inf))
    fit = fit_joint(load_runs(simulation.table(law, even_designs()[design], 0)), law.families)
    assert not fit.transfer_matrix("identified").to_numpy()[OFF].any()
    assert not any(fit.parameters[f"B[{name}]"].identified for name in law.languages)
    assert any("cannot be told apart" in warning for warning in fit.warnings)
    assert (fit.transfer_matrix("se").to_numpy()[OFF] >= 0.5).all()


def test_without_repeats_lambda_is_not_identified():
    law = dataclasses.replace(simulation.truth(L, 0), U=np.full(L, np.inf))
    plan = simulation.mixtures(L, *MEDIUM, np.random.default_rng(0))
    fit = fit_joint(load_runs(simulation.table(law, plan, 0)), law.families)
    assert not any(fit.parameters[f"lambda[{name}]"].identified for name in law.languages)
    assert any("epochs seen" in warning for warning in fit.warnings)


def test_two_sizes_leave_the_size_term_open():
    law, table = study()
    table["num_params"] = np.where(table["num_params"] > 3e8, 1e9, 1e8)
    fit = fit_joint(load_runs(table), law.families)
    assert not fit.parameters["alpha[l0]"].identified and not fit.parameters["E[l0]"].identified
    assert fit.parameters["beta[l0]"].identified


@pytest.mark.thorough
def test_unseen_mixtures_beat_the_data_constrained_law():
    law, table = study((5, 2, 20, 12), rho=0.3)
    runs = load_runs(table)
    ours = heldout(runs, "mixture", "atlas", relatedness_groups=law.families)
    theirs = heldout(runs, "mixture", "data_constrained")
    assert ours["r2"] >= 0.98
    assert ours["r2"] >= theirs["r2"] + 0.15


def test_prediction_is_the_law(medium):
    law, runs, fit = medium
    loss, deviation = fit.predict_runs(runs.where(runs.N > 1e9))
    natural = natural_of(fit, law)
    rows = runs.where(runs.N > 1e9)
    t = rows.target
    with jax.enable_x64(True):
        expected = laws.atlas(
            rows.N,
            rows.D,
            rows.U,
            *(natural[n][t] for n in NAMES[:5]),
            fit.transfer_matrix().to_numpy()[t],
            natural["lambda"][t][:, None],
            fit.phi,
        )
    np.testing.assert_allclose(loss, expected, rtol=1e-9)
    assert (deviation > 0).all() and np.median(deviation / loss) < 0.005


def test_predict_broadcasts_and_checks_names(medium):
    _law, _, fit = medium
    D = np.full(L, 1e9)
    loss, deviation = fit.predict([[1e8], [1e9]], D, np.full(L, np.inf), np.array(["l0", "l3", "l5"]))
    assert loss.shape == deviation.shape == (2, 3)
    assert (loss[0] > loss[1]).all()
    one, _ = fit.predict(1e9, D, np.full(L, np.inf), "l3")
    assert one == loss[1, 1]
    with pytest.raises(UserError, match="unknown target language 'x'"):
        fit.predict(1e9, D, np.inf * D, "x")
    with pytest.raises(UserError, match="D needs 6 tokens a row"):
        fit.predict(1e9, D[:2], np.inf, "l0")


def test_document(medium):
    _law, _, fit = medium
    document = json.loads(json.dumps(fit.to_json({"r2": float("nan")}), allow_nan=False))
    assert document["law"] == "atlas" and document["converged"] is True
    assert document["n_rows"] == fit.n_rows and document["n_runs"] == fit.n_runs
    assert document["holdout"] == {"r2": None}
    assert set(document["parameters"]["tau[l0<-l1]"]) == {"value", "se", "low", "high", "identified"}
    assert {"phi", *(f"{name}[l0]" for name in NAMES)} <= set(document["parameters"])
    assert "tau[l0<-l0]" not in document["parameters"]


def test_rows_of_untrained_languages_and_bad_families():
    _law, table = study(SMALL)
    mono = table[table["mixture"] == "mono"].iloc[:10]
    zero_shot = mono.assign(language="l5")[mono["language"] != "l5"]
    runs = load_runs(zero_shot)
    with pytest.raises(UserError, match="no row evaluates a language"):
        fit_joint(runs)
    with pytest.raises(UserError, match="unknown language 'l9'"):
        fit_joint(load_runs(table), {"l9": "f0"})


def test_the_caller_keeps_float32(medium):
    assert jax.numpy.ones(1).dtype == np.float32
