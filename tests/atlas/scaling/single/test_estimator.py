"""Standard errors against what theory and repetition say of them."""

import numpy as np
import pytest

from atlas.scaling import fit, load_runs, simulation


def deviations(frame, objective):
    return np.sqrt(np.diagonal(fit("chinchilla", load_runs(frame), objective=objective, warm_up=0).covariance))


@pytest.mark.parametrize(("runs", "checkpoints"), [(240, 1), (40, 6)])
def test_a_sharp_corner_costs_what_a_median_costs(runs, checkpoints):
    # A median has √(π/2) = 1.25 times the standard error of a mean under normal noise, estimated 6 % too large.
    studies = [simulation.series(runs, seed, checkpoints) for seed in range(12)]
    ratio = [deviations(frame, "huber") / deviations(frame, "least_squares") for frame in studies]
    assert np.median(ratio) == pytest.approx(1.32, abs=0.1)


def test_rows_of_a_run_that_all_agree_count_as_one():
    frame = simulation.series(80, 0)
    doubled = frame.loc[frame.index.repeat(3)].assign(step=np.tile(np.arange(3), 80))
    for objective in ("huber", "least_squares"):
        np.testing.assert_allclose(deviations(doubled, objective), deviations(frame, objective), rtol=0.02)


def test_a_run_with_leverage_is_not_believed_to_be_as_exact_as_it_looks():
    E, A, alpha, B, beta = simulation.CHINCHILLA.values()
    errors = []
    for seed in range(30):
        frame = simulation.series(90, seed)
        frame.loc[0, ["num_params", "tokens"]] = 1e7, 1e10
        noise = np.random.default_rng(seed).normal(0, 0.005)
        frame.loc[0, "loss"] = (E + A / 1e7**alpha + B / 1e10**beta) * np.exp(noise)
        law = fit("chinchilla", load_runs(frame), objective="least_squares")
        errors.append(np.log(law.values["alpha"] / alpha) / np.sqrt(law.covariance[2, 2]))
    assert 0.8 < np.std(errors) < 1.28


def test_checkpoints_of_two_runs_do_not_pass_for_independent_rows():
    # Two sizes leave open what their runs share: the law takes it up.
    few = fit("chinchilla", load_runs(simulation.series(2, 0, 100, rho=0.5)))
    assert few.diagnostics.independent_rows < 3
