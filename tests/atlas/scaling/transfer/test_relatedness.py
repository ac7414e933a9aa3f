import dataclasses

import numpy as np
import pandas as pd
import pytest

from atlas.scaling import asymmetric_pairs, fit_joint, label_effect, load_runs, simulation

NAMES = [f"l{i}" for i in range(9)]
FAMILIES = {name: "abc"[i // 3] for i, name in enumerate(NAMES)}


def matrix(effect: float, helped: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """Noise of deviation .1, `effect` more in a family, `helped` more for every other target."""
    rng = np.random.default_rng(seed)
    same = [[FAMILIES[t] == FAMILIES[s] for s in NAMES] for t in NAMES]
    rows = helped * (np.arange(len(NAMES)) % 2)[:, None]
    return pd.DataFrame(rng.normal(0, 0.1, (9, 9)) + effect * np.array(same) + rows, NAMES, NAMES)


def test_a_family_that_helps_is_found_and_its_size():
    found = label_effect(matrix(0.3), FAMILIES)
    assert found.difference == pytest.approx(0.3, abs=0.06)
    assert (found.sharing, found.others) == (18, 54)
    assert found.p < 0.01


def test_p_is_even_where_families_do_not_matter():
    p = [label_effect(matrix(0.0, helped=0.5, seed=seed), FAMILIES).p for seed in range(40)]
    assert 0.35 < np.mean(p) < 0.65
    assert np.mean(np.array(p) < 0.1) < 0.25


def test_unknown_cells_and_languages_are_left_out():
    table = matrix(0.3)
    table.iloc[0, 1], table.loc["l0", "l0"] = np.nan, 100.0
    found = label_effect(table, {name: FAMILIES[name] for name in NAMES[:6]})
    assert (found.sharing, found.others) == (11, 18)


def test_no_effect_can_be_told_where_no_pair_or_every_pair_shares():
    assert label_effect(matrix(0.3), {name: name for name in NAMES}) is None
    assert label_effect(matrix(0.3), dict.fromkeys(NAMES, "a")) is None


def test_transfer_that_goes_one_way_is_named():
    truth = simulation.truth(3, seed=0)
    tau = np.array([[1.0, 0.6, 0.3], [0.05, 1.0, 0.3], [0.3, 0.3, 1.0]])
    truth = dataclasses.replace(truth, law=dataclasses.replace(truth.law, tau=tau))
    plan = simulation.mixtures(3, 4, 4, 3, 12, np.random.default_rng(0))
    found, pairs = asymmetric_pairs(fit_joint(load_runs(simulation.table(truth, plan, seed=0))))
    assert "l1 → l0" in found
    assert pairs == 3
