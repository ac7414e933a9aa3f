"""What transfer weights borrow, whose repetition rates are, and where the joint fit starts."""

import dataclasses

import jax
import numpy as np
import pandas as pd
import pytest

from atlas.scaling import fit_joint, load_runs, simulation
from atlas.scaling.joint.prior import joint_prior
from atlas.scaling.joint.system import TAU, precision
from checked import UserError

L = 6
OFF = ~np.eye(L, dtype=bool)
SPARSE = (2, 0.35, 3, 0)  # a third of the pairs, as 50/50 runs
SCRIPTS = {f"l{i}": "Latn" if i < L // 2 else "Cyrl" for i in range(L)}


def runs_of(truth, design, seed=0, **noise):
    plan = simulation.mixtures(L, *design, np.random.default_rng(seed))
    return load_runs(simulation.table(truth, plan, seed, **noise))


def error(fit, truth):
    return float(np.sqrt(np.mean((fit.transfer_matrix().to_numpy() - truth.law.tau)[OFF] ** 2)))


def with_effects(seed, script=0.0, target=0.0):
    truth, rng = simulation.truth(L, seed), np.random.default_rng(100 + seed)
    same = np.array([[SCRIPTS[a] == SCRIPTS[b] for b in truth.languages] for a in truth.languages])
    tau = 0.1 + script * same + target * rng.normal(size=(L, 1)) + 0.04 * rng.normal(size=(L, L))
    np.fill_diagonal(tau, 1.0)
    return dataclasses.replace(truth, law=dataclasses.replace(truth.law, tau=tau))


def medians(laws_and_runs, *options):
    errors = [[error(fit_joint(runs, **o), truth) for o in options] for truth, runs in laws_and_runs]
    return np.median(errors, 0)


@pytest.mark.thorough
def test_effects_of_targets_are_borrowed():
    laws_ = [with_effects(seed, target=0.2) for seed in range(3)]
    found = medians(
        [(truth, runs_of(truth, SPARSE, seed)) for seed, truth in enumerate(laws_)],
        {"tau_prior": "targets"},
        {"tau_prior": "pairs"},
        {"tau_prior": "flat"},
    )
    assert found[0] < 0.9 * found[1] < found[2]


@pytest.mark.thorough
def test_scripts_are_borrowed_and_wrong_ones_do_no_harm():
    laws_ = [with_effects(seed, script=0.4) for seed in range(3)]
    wrong = dict(zip(SCRIPTS, ["Latn", "Cyrl"] * (L // 2), strict=True))
    found = medians(
        [(truth, runs_of(truth, SPARSE, seed)) for seed, truth in enumerate(laws_)],
        {"scripts": SCRIPTS},
        {},
        {"scripts": wrong},
    )
    assert found[0] < 0.8 * found[1]
    assert found[2] < 1.1 * found[1]


@pytest.mark.thorough
def test_shuffled_families_do_no_harm():
    laws_ = [simulation.truth(L, seed) for seed in range(3)]
    shuffled = dict(zip(laws_[0].languages, ["f0", "f0", "f1", "f1", "f2", "f2"], strict=True))
    found = medians(
        [(truth, runs_of(truth, SPARSE, seed)) for seed, truth in enumerate(laws_)],
        {"families": laws_[0].families},
        {},
        {"families": shuffled},
    )
    assert found[0] < found[1]
    assert found[2] < 1.1 * found[1]


def test_prior_of_a_block_is_that_of_its_effects():
    truth = simulation.truth(L, 0)
    prior, _ = joint_prior(runs_of(truth, SPARSE), truth.families, SCRIPTS)
    found = np.linalg.inv(np.asarray(precision(jax.tree.map(jax.numpy.asarray, prior)), float)[0])
    expected = np.diag(prior.variance[0])
    expected[TAU + 1 :, TAU + 1 :] += prior.effect_variance
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    # Means: log alpha, log beta, log lambda, all pairs, what a common family adds, what a common script adds.
    np.testing.assert_array_equal(prior.selector[0, :TAU, 2], [0, 0, 0, 0, 0, 1])
    np.testing.assert_array_equal(prior.selector[0, TAU:, 3], [0, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(prior.selector[0, TAU:, 4], [0, 0, 0, 1, 0, 0])
    np.testing.assert_array_equal(prior.selector[0, TAU:, 5], [0, 1, 1, 0, 0, 0])


def test_initial_weights_move_the_start_not_the_optimum():
    truth = simulation.truth(L, 0)
    runs = runs_of(truth, (4, 1, 6, 0), rho=0.3)
    rough = pd.DataFrame(truth.law.tau + 0.1, truth.languages, truth.languages).rename(index={"l5": "elsewhere"})
    rough.iloc[0, 1] = np.nan
    plain, started = fit_joint(runs, truth.families), fit_joint(runs, truth.families, initial_tau=rough)
    assert started.converged and plain.converged
    gap = (started.transfer_matrix() - plain.transfer_matrix()) / plain.transfer_matrix("se").mask(~OFF, 1.0)
    assert np.abs(gap.to_numpy()).max() < 0.01


def test_a_start_from_negative_weights_loses_no_runs():
    truth = simulation.truth(4, 4)
    table = simulation.table(
        truth, simulation.mixtures(4, 1, 1, 2, 4, np.random.default_rng(4)), 4, checkpoints=4, rho=0.3
    )
    started = fit_joint(load_runs(table), initial_tau=pd.DataFrame(-0.44, truth.languages, truth.languages))
    assert min(started.run_weights.values()) > 0.2
    assert np.abs(started.transfer_matrix().to_numpy() - truth.law.tau).max() < 0.3


@pytest.fixture(scope="module")
def by_source():
    plain, rates = simulation.truth(L, 3), 0.12 * np.exp(np.linspace(-1.2, 1.2, L))
    law = dataclasses.replace(plain.law, lam=rates[None])
    truth = dataclasses.replace(plain, law=law, U=np.geomspace(1e9, 8e9, L))
    runs = runs_of(truth, (3, 1, 8, 10))
    return (
        truth,
        runs,
        {kind: fit_joint(runs, truth.families, lambda_kind=kind) for kind in ("source", "target", "shared")},
    )


@pytest.mark.thorough
def test_repetition_rates_of_sources_are_recovered(by_source):
    truth, _, fits = by_source
    found = fits["source"]
    assert found.converged and found.record.covariance.shape == (L, 7 + 2 * L, 7 + 2 * L)
    rates = np.array([found.parameters[f"lambda[<-{name}]"].value for name in truth.languages])
    np.testing.assert_array_equal(rates, found.law.lam[0])
    of = {"source": "lambda[<-{}]", "target": "lambda[{}]", "shared": "lambda[{}]"}
    errors = {
        k: np.log([f.parameters[of[k].format(n)].value for n in truth.languages]) - np.log(truth.law.lam[0])
        for k, f in fits.items()
    }
    assert np.sqrt(np.mean(errors["source"] ** 2)) < 0.12
    assert np.sqrt(np.mean(errors["target"] ** 2)) > 2 * np.sqrt(np.mean(errors["source"] ** 2))
    covered = [
        found.parameters[f"lambda[<-{name}]"].low < rate < found.parameters[f"lambda[<-{name}]"].high
        for name, rate in zip(truth.languages, truth.law.lam[0], strict=True)
    ]
    assert np.mean(covered) >= 0.5
    assert all(found.parameters[f"lambda[<-{name}]"].identified for name in truth.languages)


@pytest.mark.thorough
def test_the_right_kind_of_repetition_predicts_best(by_source):
    truth, _, fits = by_source
    rng = np.random.default_rng(5)
    shares, target = rng.dirichlet(np.ones(L), 100), rng.integers(0, L, 100)
    N, D = np.full(100, 1e9), 1e11 * shares
    expected = truth.loss(N, D, target)
    errors = {k: np.sqrt(np.mean(np.log(f.predict(N, D, truth.U, target)[0] / expected) ** 2)) for k, f in fits.items()}
    assert errors["source"] < 0.004
    assert 2 * errors["source"] < min(errors["target"], errors["shared"])


def test_shared_repetition_is_one_rate():
    plain = simulation.truth(L, 3)
    truth = dataclasses.replace(plain, law=dataclasses.replace(plain.law, lam=np.full((L, 1), 0.2)))
    fit = fit_joint(runs_of(truth, (3, 1, 8, 4)), truth.families, lambda_kind="shared")
    rates = [fit.parameters[f"lambda[{name}]"] for name in truth.languages]
    assert len({round(rate.value, 6) for rate in rates}) == 1
    assert rates[0].value == pytest.approx(0.2, rel=0.15) and all(rate.identified for rate in rates)
    assert not fit.law.rates_by_source


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scripts": {"l9": "Latn"}}, "unknown language 'l9'"),
        ({"tau_prior": "pair"}, "unknown tau prior 'pair'.*pairs"),
        ({"lambda_kind": "sources"}, "unknown kind of lambda 'sources'"),
        ({"tau_prior": "flat", "scripts": SCRIPTS}, "flat tau prior"),
    ],
)
def test_impossible_options_are_refused(options, message):
    truth = simulation.truth(L, 0)
    with pytest.raises(UserError, match=message):
        fit_joint(runs_of(truth, (2, 0, 3, 0)), **options)
