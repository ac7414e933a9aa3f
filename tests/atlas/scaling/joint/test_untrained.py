import numpy as np
import pandas as pd
import pytest

from atlas.scaling import fit_joint, load_runs, simulation
from atlas.scaling.estimates import Z90
from atlas.scaling.joint.system import Units
from atlas.scaling.joint.untrained import fit_untrained

LANGUAGES = ("a", "b", "c")
UNITS = Units(1e7, 1e9)


def losses(N: np.ndarray, D: np.ndarray) -> np.ndarray:
    """Of "a" in runs that train b and c alone: more tokens raise it."""
    total = D.sum(1)
    return np.exp(1.2 - 0.05 * np.log(N / UNITS.N) + 0.03 * np.log(total / UNITS.D) - 0.4 * np.sqrt(D[:, 1] / total))


def drawn(count: int, sigma: float, seed: int) -> pd.DataFrame:
    """Runs on b and c, and their losses of a."""
    random = np.random.default_rng(seed)
    N, total, share = 10 ** random.uniform(6, 8, count), 10 ** random.uniform(8, 10, count), random.uniform(0, 1, count)
    D = np.stack([0 * share, share * total, (1 - share) * total], 1)
    table = {"run": np.arange(count).astype(str), "num_params": N, "language": "a"}
    table |= {"loss": losses(N, D) * np.exp(random.normal(0, sigma, count))}
    return pd.DataFrame(table | {f"tokens.{name}": D[:, i] for i, name in enumerate(LANGUAGES)})


def test_rows_without_noise_are_predicted_as_they_are_at_other_sizes_and_shares():
    found = fit_untrained(load_runs(drawn(40, 0.0, 0)), LANGUAGES, LANGUAGES, UNITS)
    other = load_runs(drawn(20, 0.0, 1))
    D, target = other.D / UNITS.D, np.zeros(20, int)
    assert found.told.tolist() == [True, False, False]
    assert found.applies(D, target).all()
    assert found.predict(other.N / UNITS.N, D, target)[0] == pytest.approx(np.log(other.loss), abs=1e-3)


def test_intervals_hold_what_they_promise():
    held = []
    for seed in range(30):
        found = fit_untrained(load_runs(drawn(25, 0.02, seed)), LANGUAGES, LANGUAGES, UNITS)
        other = load_runs(drawn(40, 0.02, 100 + seed))
        mean, spread = found.predict(other.N / UNITS.N, other.D / UNITS.D, np.zeros(40, int))
        held.append(np.mean(np.abs(mean - np.log(other.loss)) < Z90 * np.hypot(spread, found.noise[0])))
    # Thirty studies: the mean of .90 has a standard error of .01, and the noise of 25 runs is known to a seventh.
    assert 0.85 < np.mean(held) < 0.95


def test_checkpoints_of_a_run_count_once():
    table = drawn(12, 0.02, 0)
    later = table[:4].assign(**{"tokens.c": table["tokens.c"] * (1 + 1e-7)})  # the same row would be read once
    once = fit_untrained(load_runs(table), LANGUAGES, LANGUAGES, UNITS)
    partly = fit_untrained(load_runs(pd.concat([table, later])), LANGUAGES, LANGUAGES, UNITS)
    assert partly.mean[0] == pytest.approx(once.mean[0], rel=1e-4)
    assert partly.noise[0] == pytest.approx(once.noise[0], rel=1e-4)


@pytest.mark.parametrize("more", [drawn(20, 0.005, 3), None], ids=["told", "not told"])
def test_a_joint_fit_predicts_what_a_run_does_not_train_if_such_rows_tell_it(more):
    truth = simulation.truth(3, 0)
    plan = simulation.mixtures(3, 3, 2, 2, 2, np.random.default_rng(0))
    trained = simulation.table(truth, plan, 0)
    languages = sorted(set(trained["language"]))
    names = dict(zip(LANGUAGES, languages, strict=True))
    rows = [trained]
    if more is not None:
        tokens = {f"tokens.{ours}": f"tokens.{theirs}" for ours, theirs in names.items()}
        rows.append(more.assign(language=names["a"], run="other" + more["run"]).rename(columns=tokens))
    fit = fit_joint(load_runs(pd.concat(rows)))
    D = np.array([[0.0, 3e9, 1e9]])
    loss, deviation = fit.predict(3e7, D, np.inf * np.ones_like(D), names["a"])
    low, high = fit.run_interval(3e7, D, np.inf * np.ones_like(D), names["a"])
    if more is None:
        assert not fit.record.untrained.told.any()
    else:
        assert loss == pytest.approx(losses(np.array([3e7]), D), rel=0.02)
        assert low < loss < high < 1.1 * loss
        assert np.isfinite(deviation)
