import collections
import dataclasses

import numpy as np
import pandas as pd
import pytest

from atlas.scaling import load_runs, simulation

L = 6


def plan(*design, seed=0):
    return simulation.mixtures(L, *design, np.random.default_rng(seed))


def test_a_plan_has_the_runs_that_were_asked_for():
    every = plan(5, 2, 20, 7)
    assert collections.Counter(kind for kind, _ in every) == {
        "mono": 30,
        "bilingual": 30,
        "uniform": 20,
        "dirichlet": 7,
    }
    np.testing.assert_allclose([shares.sum() for _, shares in every], 1.0)
    pairs = [frozenset(np.flatnonzero(shares)) for kind, shares in every if kind == "bilingual"]
    assert set(collections.Counter(pairs).values()) == {2}
    assert {0.3, 0.5, 0.7} == {round(shares[shares > 0][0], 6) for kind, shares in every if kind == "bilingual"}
    assert {3, 6} == {np.count_nonzero(shares) for kind, shares in every if kind == "uniform"}
    few = [shares for kind, shares in plan(0, 1 / 3, 0, 0) if kind == "bilingual"]
    assert len(few) == 5 and all(shares.max() == 0.5 for shares in few)


def test_losses_without_noise_are_the_law():
    truth = dataclasses.replace(simulation.truth(L, 1), U=np.full(L, np.inf))
    mono, other = (
        simulation.table(truth, [mixture], 0, sigma=0.0) for mixture in (plan(1, 0, 0, 0)[2], plan(0, 1, 0, 0)[0])
    )
    N, D = mono["num_params"], mono["tokens.l2"]
    expected = truth.law.E[2] + truth.law.A[2] / N ** truth.law.alpha[2] + truth.law.B[2] / D ** truth.law.beta[2]
    np.testing.assert_allclose(mono["loss"], expected, rtol=1e-12)
    assert set(mono["language"]) == {"l2"} and set(other["language"]) == {"l0", "l1"}
    rows = other[other["language"] == "l1"]
    effective = rows["tokens.l1"] + truth.law.tau[1, 0] * rows["tokens.l0"]
    expected = (
        truth.law.E[1]
        + truth.law.A[1] / rows["num_params"] ** truth.law.alpha[1]
        + truth.law.B[1] / effective ** truth.law.beta[1]
    )
    np.testing.assert_allclose(rows["loss"], expected, rtol=1e-12)


def test_capacity_raises_losses_of_mixtures_only():
    curse, none = (simulation.truth(L, 0, phi) for phi in (0.11, 0.0))
    both = [simulation.table(truth, plan(1, 1, 0, 0), 0, sigma=0.0) for truth in (curse, none)]
    higher = both[0]["loss"] > both[1]["loss"] * (1 + 1e-9)
    assert (higher == (both[0]["mixture"] != "mono")).all()


@pytest.mark.parametrize("rho", [0.0, 0.5])
def test_noise_has_the_size_and_the_correlation_asked_for(rho):
    noisy, clean = (simulation.series(3000, 0, 4, sigma=sigma, rho=rho) for sigma in (0.01, 0.0))
    noise = np.log(noisy["loss"] / clean["loss"]).to_numpy().reshape(3000, 4)
    assert noise.std() == pytest.approx(0.01, rel=0.03)
    assert np.corrcoef(noise.T)[np.triu_indices(4, 1)].mean() == pytest.approx(rho, abs=0.03)
    truth = simulation.truth(L, 0)
    noisy, clean = (simulation.table(truth, plan(300, 0, 0, 0), 0, 2, sigma, rho) for sigma in (0.01, 0.0))
    noise = np.log(noisy["loss"] / clean["loss"]).to_numpy().reshape(-1, 2)
    assert noise.std() == pytest.approx(0.01, rel=0.05)
    assert np.corrcoef(noise.T)[0, 1] == pytest.approx(rho, abs=0.08)


def test_diverged_runs_lie_too_high_in_every_row():
    truth = simulation.truth(L, 0)
    table = simulation.table(truth, plan(30, 0, 10, 0), 0, sigma=0.0, diverged=0.2)
    tokens = table[[f"tokens.{name}" for name in truth.languages]].to_numpy()
    target = table["language"].str.removeprefix("l").astype(int).to_numpy()
    ratio = table["loss"] / truth.loss(table["num_params"].to_numpy(), tokens, target)
    assert 0.1 < table.groupby("run")["diverged"].first().mean() < 0.3
    assert ratio[table["diverged"]].between(np.exp(0.03), np.exp(0.10)).all()
    np.testing.assert_allclose(ratio[~table["diverged"]], 1.0, rtol=1e-12)


def test_series_follows_chinchilla_and_starts_at_a_twentieth():
    table = simulation.series(20, 3, checkpoints=5, sigma=0.0)
    E, A, alpha, B, beta = simulation.CHINCHILLA.values()
    expected = E + A / table["num_params"] ** alpha + B / table["tokens"] ** beta
    np.testing.assert_allclose(table["loss"], expected, rtol=1e-12)
    tokens = table["tokens"].to_numpy().reshape(20, 5)
    np.testing.assert_allclose(tokens[:, 0] / tokens[:, -1], 0.05)
    assert len(load_runs(table).run_ids) == 20


def test_a_seed_gives_one_study():
    for make in (
        lambda seed: simulation.series(5, seed),
        lambda s: simulation.table(simulation.truth(L, s), plan(1, 1, 1, 1), s),
    ):
        pd.testing.assert_frame_equal(make(4), make(4))
        assert not make(4)["loss"].equals(make(5)["loss"])
