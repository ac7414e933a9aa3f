import numpy as np
import pandas as pd
import pytest

from atlas.scaling import bootstrap, fit, load_runs
from checked import UserError

POINT = {"N": 3e10, "D": 2e12}


def study(checkpoints: int = 1, sigma: float = 0.004, shared: float = 0.0, seed: int = 0):
    """40 runs of 8 sizes; noise of a run and of a row."""
    random = np.random.default_rng(seed)
    N, ratio = np.repeat(np.geomspace(1e8, 1e10, 8), 5), np.tile(np.geomspace(5.0, 300.0, 5), 8)
    frames = []
    for part in np.linspace(1.0 / checkpoints, 1.0, checkpoints):
        frames.append(pd.DataFrame({"run": np.arange(40).astype(str), "num_params": N, "tokens": N * ratio * part}))
    table = pd.concat(frames, ignore_index=True)
    effect = shared * random.normal(size=40)[table["run"].astype(int)]
    loss = 1.7 + 480.0 / table["num_params"] ** 0.35 + 2100.0 / table["tokens"] ** 0.37
    return load_runs(table.assign(loss=loss * np.exp(effect + sigma * random.normal(size=len(table)))))


def test_resampling_runs_sees_what_their_rows_share():
    runs = study(checkpoints=6, sigma=0.001, shared=0.005)
    law, apart = (
        fit("chinchilla", runs, warm_up=0),
        fit("chinchilla", load_runs(runs.frame.assign(run=np.arange(len(runs))))),
    )
    assert bootstrap(law, 200).se["alpha"] > 1.5 * bootstrap(apart, 200).se["alpha"]
    assert law.diagnostics.correlation > 0.8 and law.parameters["alpha"].se > 0.012 * 0.35
    with pytest.raises(UserError, match="2 resamples or more"):
        bootstrap(law, 1)
    with pytest.raises(UserError, match="draws runs, and there is one"):
        bootstrap(fit("chinchilla", runs.where("run == '0'")), 10)


@pytest.mark.parametrize("objective", ["huber", "least_squares"])
@pytest.mark.parametrize(
    "design", [{}, {"checkpoints": 6, "sigma": 0.002, "shared": 0.004}], ids=["runs", "checkpoints"]
)
def test_intervals_of_parameters_and_predictions_cover_the_truth(objective, design):
    truth = {"E": 1.7, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}
    loss = 1.7 + 480.0 / POINT["N"] ** 0.35 + 2100.0 / POINT["D"] ** 0.37
    inside = []
    for seed in range(100):
        law = fit("chinchilla", study(seed=seed, **design), objective=objective, warm_up=0)
        low, high = law.interval(**POINT)
        inside += [law.parameters[name].low <= value <= law.parameters[name].high for name, value in truth.items()]
        inside += [low <= loss <= high]
    assert 0.85 <= np.mean(inside) <= 0.95


def test_resampled_predictions_spread_as_the_fit_says():
    law = fit("chinchilla", study())
    natural = bootstrap(law, 300)
    losses = law.model.loss(dict(zip(natural.names, natural.values.T, strict=True)), POINT)
    loss, deviation = law.predict(**POINT)
    assert np.mean(losses) == pytest.approx(float(loss), rel=0.01)
    assert np.std(losses) == pytest.approx(float(deviation), rel=0.6)
    low, high = law.interval(**POINT)
    np.testing.assert_allclose(np.quantile(losses, [0.05, 0.95]), [low, high], atol=0.6 * deviation)
