"""Recovery of known laws from simulated studies of six languages; one table shape, so one compilation."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pandas as pd
import pytest

from atlas.scaling import fit_joint, heldout, load_runs, simulation
from atlas.scaling.joint.fit import telling_rows
from atlas.scaling.joint.verdicts import unsettled
from atlas.scaling.law import JointLaw
from checked import UserError

L = 6
OFF = ~np.eye(L, dtype=bool)
MEDIUM = (6, 2, 24, 0)  # mono per language, copies of all pairs, uniform, Dirichlet: M160 for 6 languages
SMALL = (5, 1, 8, 0)
NAMES = ("E", "A", "alpha", "B", "beta", "lambda")


def study(design=MEDIUM, seed=0, phi=0.0, **noise):
    truth = simulation.truth(L, seed, phi)
    plan = simulation.mixtures(L, *design, np.random.default_rng(seed))
    return truth, simulation.table(truth, plan, seed, **noise)


def natural_of(fit, truth):
    return {n: np.array([fit.parameters[f"{n}[{k}]"].value for k in truth.languages]) for n in NAMES}


def rmse(values):
    return float(np.sqrt(np.mean(np.square(values))))


def tau_errors(fit, truth):
    return (fit.transfer_matrix().to_numpy() - truth.law.tau)[OFF]


def covered(fit, truth):
    low, high = (fit.transfer_matrix(field).to_numpy() for field in ("low", "high"))
    return ((low <= truth.law.tau) & (truth.law.tau <= high))[OFF]


@pytest.fixture(scope="module")
def medium():
    truth, table = study()
    runs = load_runs(table)
    return truth, runs, fit_joint(runs, truth.families)


def test_medium_study_recovers_every_law(medium):
    truth, _, fit = medium
    assert fit.converged
    assert rmse(tau_errors(fit, truth)) <= 0.020
    values = natural_of(fit, truth)
    assert rmse(values["alpha"] - truth.law.alpha) <= 0.005
    assert rmse(values["beta"] - truth.law.beta) <= 0.006
    assert rmse(np.log(values["E"] / truth.law.E)) <= 0.010
    assert abs(fit.law.phi) <= 0.02
    assert fit.rho <= 0.15
    assert fit.sigma == pytest.approx(0.005, rel=0.1)
    assert fit.transfer_matrix("identified").to_numpy()[OFF].mean() > 0.9


def test_a_and_b_refer_to_one_parameter_and_one_token(medium):
    truth, _, fit = medium
    for i, name in enumerate(truth.languages):
        for key, value in (("A", truth.law.A[i]), ("B", truth.law.B[i])):
            assert np.log(fit.parameters[f"{key}[{name}]"].value / value) == pytest.approx(0.0, abs=0.4)


def test_small_study_recovers_tau():
    truth, table = study(SMALL, seed=1)
    fit = fit_joint(load_runs(table), truth.families)
    assert rmse(tau_errors(fit, truth)) <= 0.040


@pytest.mark.parametrize("rho", [0.3, 0.6])
def test_correlated_checkpoints_are_seen_and_intervals_stay_honest(rho):
    inside, errors, found = [], [], []
    for seed in range(4):
        truth, table = study(seed=seed, rho=rho)
        fit = fit_joint(load_runs(table), truth.families)
        inside.append(covered(fit, truth))
        errors.append(tau_errors(fit, truth))
        found.append(fit.rho)
    assert abs(np.median(found) - rho) <= 0.15
    assert 0.80 <= np.mean(inside) <= 0.97
    assert rmse(errors) <= 0.040


def test_capacity_exponent_is_found():
    truth, table = study(phi=0.11)
    fit = fit_joint(load_runs(table), truth.families)
    assert fit.law.phi == pytest.approx(0.11, abs=0.01)
    assert fit.parameters["phi"].identified


@pytest.mark.thorough
def test_without_noise_the_law_is_exact():
    truth, table = study(sigma=0.0)
    fit = fit_joint(load_runs(table), truth.families)
    assert fit.converged and np.abs(tau_errors(fit, truth)).max() < 1e-6


def test_runs_that_diverged_lose_their_weight():
    truth, table = study(rho=0.3, diverged=0.1)
    fit = fit_joint(load_runs(table), truth.families)
    bad = table.groupby("run")["diverged"].first()
    low = np.array([fit.run_weights[run] < 0.2 for run in bad.index])
    assert low[bad].mean() >= 0.9
    assert low[~bad].mean() <= 0.05
    assert rmse(tau_errors(fit, truth)) <= 0.040
    assert any("lost their weight" in warning for warning in fit.warnings)
    oracle = fit_joint(load_runs(table[~table["diverged"]]), truth.families)
    assert rmse(tau_errors(fit, truth)) <= 1.3 * rmse(tau_errors(oracle, truth))


def even_designs():
    every = list(itertools.combinations(range(L), 2)) * 4
    pairs = [("bilingual", np.eye(L)[list(pair)].mean(0)) for pair in every]
    return {"pairs at 50/50": pairs, "all languages, evenly": [("uniform", np.full(L, 1 / L))] * 40}


@pytest.mark.parametrize("design", even_designs())
def test_designs_without_a_second_share_are_flagged_not_answered(design):
    truth = dataclasses.replace(simulation.truth(L, 0), U=np.full(L, np.inf))
    fit = fit_joint(load_runs(simulation.table(truth, even_designs()[design], 0)), truth.families)
    assert not fit.transfer_matrix("identified").to_numpy()[OFF].any()
    assert not any(fit.parameters[f"B[{name}]"].identified for name in truth.languages)
    (said,) = (warning for warning in fit.warnings if "cannot be told apart" in warning)
    assert said.startswith(", ".join(fit.targets))  # in one line for all of them
    assert (fit.transfer_matrix("se").to_numpy()[OFF] >= 0.5).all()


def test_without_repeats_lambda_is_not_identified():
    truth = dataclasses.replace(simulation.truth(L, 0), U=np.full(L, np.inf))
    plan = simulation.mixtures(L, *MEDIUM, np.random.default_rng(0))
    fit = fit_joint(load_runs(simulation.table(truth, plan, 0)), truth.families)
    assert not any(fit.parameters[f"lambda[{name}]"].identified for name in truth.languages)
    assert any(f"{', '.join(fit.targets)}: unique tokens not given" in warning for warning in fit.warnings)


def test_two_sizes_leave_the_size_term_open():
    truth, table = study()
    table["num_params"] = np.where(table["num_params"] > 3e8, 1e9, 1e8)
    fit = fit_joint(load_runs(table), truth.families)
    assert not fit.parameters["alpha[l0]"].identified and not fit.parameters["E[l0]"].identified
    assert fit.parameters["beta[l0]"].identified


@pytest.mark.thorough
def test_unseen_mixtures_beat_the_data_constrained_law():
    truth, table = study((5, 2, 20, 12), rho=0.3)
    runs = load_runs(table)
    ours, _ = heldout(runs, "mixture", "atlas", families=truth.families)
    theirs, _ = heldout(runs, "mixture", "data_constrained")
    assert ours["r2"] >= 0.98
    assert ours["r2"] >= theirs["r2"] + 0.15


def test_prediction_is_the_law(medium):
    _, runs, fit = medium
    loss, deviation = fit.predict_runs(runs.where(runs.N > 1e9))
    rows = runs.where(runs.N > 1e9)
    expected = fit.law.loss(rows.N, rows.D, rows.U, rows.target)
    np.testing.assert_allclose(loss, expected, rtol=1e-9)
    assert (deviation > 0).all() and np.median(deviation / loss) < 0.005


def test_predict_broadcasts_and_checks_names(medium):
    _truth, _, fit = medium
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
    _truth, _, fit = medium
    document = json.loads(json.dumps(fit.to_json({"r2": float("nan")}), allow_nan=False))
    assert document["law"] == "atlas" and document["converged"] is True
    assert document["n_rows"] == fit.n_rows and document["n_runs"] == fit.n_runs
    assert document["holdout"] == {"r2": None}
    assert set(document["parameters"]["tau[l0<-l1]"]) == {"value", "se", "low", "high", "identified"}
    assert {"phi", *(f"{name}[l0]" for name in NAMES)} <= set(document["parameters"])
    assert "tau[l0<-l0]" not in document["parameters"]
    again = JointLaw.from_json(document["joint_law"])
    assert {name: float(value) for name, value in again.named().items()} == {
        name: estimate["value"] for name, estimate in document["parameters"].items()
    }


def test_rows_of_untrained_languages_and_bad_families():
    _truth, table = study(SMALL)
    mono = table[table["mixture"] == "mono"].iloc[:10]
    zero_shot = mono.assign(language="l5")[mono["language"] != "l5"]
    runs = load_runs(zero_shot)
    with pytest.raises(UserError, match="no row evaluates a language"):
        fit_joint(runs)
    with pytest.raises(UserError, match="unknown language 'l9'"):
        fit_joint(load_runs(table), {"l9": "f0"})


def test_a_run_of_several_languages_without_its_mixture_is_refused():
    rows = {"run": ["a", "a"] * 6, "language": ["fr", "de"] * 6, "num_params": np.geomspace(1e6, 1e8, 12)}
    table = pd.DataFrame(rows | {"tokens": np.geomspace(1e8, 1e10, 12), "loss": np.geomspace(3.0, 2.0, 12)})
    with pytest.raises(UserError, match=r"run 'a' evaluates several languages.*columns tokens\.<language>") as refusal:
        fit_joint(load_runs(table))
    assert "\n" not in str(refusal.value)


def test_the_caller_keeps_float32(medium):
    assert jax.numpy.ones(1).dtype == np.float32


def test_a_study_of_mixtures_finds_how_languages_substitute():
    truth = dataclasses.replace(simulation.truth(L, 0, eta=0.6), U=np.full(L, np.inf))
    plan = simulation.mixtures(L, 0, 0, 0, 0, np.random.default_rng(0), sparse=120)
    fit = fit_joint(load_runs(simulation.table(truth, plan, 0, checkpoints=1, same=True)), truth.families, mixing="ces")
    assert fit.converged
    told = [fit.parameters[f"eta[{name}]"] for name in fit.targets]
    true = dict(zip(truth.languages, truth.law.eta, strict=True))
    missed = [np.log(e.value / true[name]) for e, name in zip(told, fit.targets, strict=True)]
    assert rmse(missed) < 0.1 and all(e.identified for e in told)
    again = JointLaw.from_json(json.loads(json.dumps(fit.to_json()["joint_law"])))
    np.testing.assert_array_equal(again.eta, fit.law.eta)


@pytest.mark.parametrize(
    ("languages", "runs", "mixing", "far"),
    [pytest.param(20, 60, "sum", "", marks=pytest.mark.thorough), (12, 30, "ces", "ran off (eta to 2.")],
)
def test_exponents_that_run_off_are_held_where_the_law_fits_better(languages, runs, mixing, far):
    truth, rng = simulation.truth(languages, 1), np.random.default_rng(1)
    plan = simulation.mixtures(languages, 0, 0, 0, 0, rng, sparse=runs)
    table = load_runs(simulation.table(truth, plan, 1, checkpoints=1, sigma=0.003, same=True))
    fit = fit_joint(table, mixing=mixing)
    assert fit.converged and 0.002 < fit.sigma < 0.005
    assert far in next(w for w in fit.warnings if "held at usual ones" in w)
    assert not any(e.identified for name, e in fit.parameters.items() if name.startswith(("alpha", "beta", "eta")))
    order = [list(truth.languages).index(name) for name in fit.targets]
    tau = np.asarray(truth.law.tau)[np.ix_(order, order)]
    away = ~np.eye(languages, dtype=bool)
    assert np.corrcoef(fit.law.tau[away], tau[away])[0, 1] > 0.8


def test_rows_of_next_to_no_share_are_left_out_unless_they_are_most(medium):
    _, runs, _ = medium
    shares, notes = np.tile([0.999, 0.001], (4, 1)), []
    rows = {"N": np.ones(4), "loss": np.ones(4), "run": np.arange(4), "run_ids": tuple("abcd"), "frame": runs.frame[:4]}
    few = dataclasses.replace(
        runs, D=shares, U=shares, target=np.array([0, 1, 1, 1]), languages=("x", "y"), targets=("x", "y"), **rows
    )
    assert telling_rows(few, notes).all() and not notes
    shares[2:] = 0.5
    assert telling_rows(few, notes).tolist() == [True, False, True, True]
    assert "left out 1 of 4 rows: less than 0.3% of their run" in notes[0]


def test_a_mixture_without_effective_tokens_has_no_interval(medium):
    _, _, fit = medium
    against = dataclasses.replace(fit, law=dataclasses.replace(fit.law, tau=np.where(OFF, -0.5, 1.0)))
    D = np.array([[1e9, 0, 0, 0, 0, 0], [1e7, 1e9, 0, 0, 0, 0]])
    loss, deviation = against.predict(1e9, D, np.inf, ["l0", "l0"])
    assert np.isfinite(deviation[0]) and deviation[1] == np.inf
    assert loss[0] < loss[1] < 20 * loss[0]


@pytest.mark.parametrize(
    ("rows", "z", "mixing", "mend"),
    [(10, 0.5, "sum", "add runs"), (99, 1e-4, "sum", "--mixing=ces"), (99, 0.5, "sum", "leave out runs")],
)
def test_a_fit_that_did_not_settle_says_what_would_mend_it(rows, z, mixing, mend):
    text = unsettled(rows, 50, z, mixing)
    assert text.startswith("the fit did not settle") and mend in text


def test_a_size_that_the_law_misses_keeps_its_runs_and_is_named():
    table = pd.read_csv("experiments/results/quickstart/runs.csv")
    largest = table.num_params == table.num_params.max()
    fit = fit_joint(load_runs(table.assign(loss=table.loss * np.where(largest, 1.2, 1.0))).comparable())
    weights = pd.Series(fit.run_weights)[table[largest].run.unique()]
    assert (weights > 0.2).all()
    assert any("most runs of N = 88036 lie off the law" in warning for warning in fit.warnings)


def test_nothing_is_told_of_a_language_that_neither_the_mixture_nor_the_table_tells():
    truth, table = study()
    fit = fit_joint(load_runs(table), truth.families)
    D = np.where(np.arange(L) == 0, 0.0, 1e10)
    assert not np.isfinite(fit.predict(1e9, D, np.full(L, np.inf), "l0")[1])
    assert np.isfinite(fit.predict(1e9, D, np.full(L, np.inf), "l1")[1])
