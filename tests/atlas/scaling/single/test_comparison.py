import numpy as np
import pandas as pd
import pytest

from atlas.scaling import compare, load_runs


def curves(runs: int = 12, checkpoints: int = 8, unit: float = 1.0, beta: float = 0.37, seed: int = 0):
    """Runs of four sizes that lie above or below the law as a whole, in another unit of loss."""
    random = np.random.default_rng(seed)
    N = np.repeat(np.resize(np.geomspace(1e8, 1e10, 4), runs), checkpoints)
    ends = np.repeat(np.geomspace(2e10, 4e11, runs), checkpoints)
    D = ends * np.tile(np.linspace(1.0 / checkpoints, 1.0, checkpoints), runs)
    loss = 1.7 + 480.0 / N**0.35 + 0.11 * (1e11 / D) ** beta
    loss += 0.01 * np.repeat(random.normal(size=runs), checkpoints) + 0.002 * random.normal(size=N.size)
    run = np.repeat(np.arange(runs), checkpoints)
    return load_runs(pd.DataFrame({"run": run, "num_params": N, "tokens": D, "loss": unit * loss}))


LAWS = ["chinchilla", "chinchilla_tied"]


def test_criteria_know_no_unit_of_the_loss():
    def gap(unit):
        runs = curves(unit=unit, beta=0.8)  # residuals of tied exponents correlate more than the others
        table = compare(LAWS, runs, residual="raw", delta=1e-3 * unit, warm_up=0.0).set_index("law")
        return table.loc["chinchilla_tied", ["aicc", "bic"]] - table.loc["chinchilla", ["aicc", "bic"]]

    np.testing.assert_allclose(gap(1000.0), gap(1.0), atol=1e-3)


def test_laws_are_compared_on_the_same_rows():
    runs = curves()
    bumped = load_runs(runs.frame.assign(loss=runs.loss * np.where(runs.total_tokens < 4e10, 1.3, 1.0)))
    table = compare(LAWS, bumped)
    assert table["warm_up"].nunique() == 1 and table["warm_up"][0] >= 0.3


def test_one_run_held_out_tells_no_error_and_two_tell_little():
    one = compare(LAWS, curves(runs=5))
    assert one[["excess_se", "excess_low", "excess_high"]].isna().to_numpy().all()
    assert one["bic"].is_monotonic_increasing
    two = compare(LAWS, curves(runs=8)).iloc[1]
    assert two["excess_high"] - two["excess"] == pytest.approx(6.3138 * two["excess_se"], rel=1e-4)
