"""Whole runs are held out, by size, tokens, compute or mixture."""

import numpy as np
import pandas as pd
import pytest

from atlas.scaling import load_runs
from atlas.scaling.table.splits import SPLITS, past_warm_up, split_runs
from checked import UserError


def family(sizes=5, checkpoints=12):
    """Curves of one language: tokens in equal steps to 3e11."""
    N, D = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 1e10, sizes), np.linspace(5e9, 3e11, checkpoints)))
    return load_runs(pd.DataFrame({"run": N.astype(str), "num_params": N, "tokens": D, "loss": 2.0}))


def mixtures():
    """Runs of three languages, two checkpoints each: alone, in pairs, even and uneven."""
    shares = [(1, 0, 0), (0.5, 0.5, 0), (0.7, 0.3, 0), (1 / 3, 1 / 3, 1 / 3), (0.5, 0.3, 0.2), (0.2, 0.2, 0.6)]
    rows = [
        {"run": str(run), "num_params": 1e8 * (run + 1), "language": "a", "loss": 2.0}
        | {f"tokens.{name}": 1e9 * (run + 1) * part * s for name, s in zip("abc", share, strict=True)}
        for run, share in enumerate(shares)
        for part in (1.0, 2.0)
    ]
    return load_runs(pd.DataFrame([*rows, rows[0] | {"language": "b"}]))


def test_the_guide_cuts_the_warm_up_and_tests_the_end_of_the_largest_run():
    runs = family()
    train, test = split_runs(runs, "guide")
    assert train.N.max() < test.N.min() and train.total_tokens.min() > 1e10
    assert test.total_tokens.min() >= 0.7 * 3e11 and len(test) == 4


def test_the_warm_up_is_a_part_of_each_run_but_for_ends_of_cooldowns():
    runs = family()
    kept = past_warm_up(runs, 0.5)
    assert kept.total_tokens.min() >= 1.5e11 and len(kept.run_ids) == 5
    assert kept.notes == (f"left out {60 - len(kept)} of 60 rows: the first 50% of their runs (warm_up=0 keeps them)",)
    assert past_warm_up(kept, 0.5) is kept and past_warm_up(runs, 0.0) is runs
    assert len(past_warm_up(runs)) == (runs.total_tokens >= 0.9e11).sum()
    cooled = load_runs(runs.frame.assign(phase="cooldown"))
    assert past_warm_up(cooled, 0.5) is cooled
    with pytest.raises(UserError, match="the warm-up is a part of each run"):
        past_warm_up(runs, 1.5)


def test_scaling_down_predicts_the_smallest_model():
    train, test = split_runs(family(), "smallest_n")
    assert test.N.max() < train.N.min()


@pytest.mark.parametrize("split", SPLITS)
def test_no_run_is_on_both_sides(split):
    train, test = split_runs(mixtures(), split)
    assert not set(train.run_ids) & set(test.run_ids)
    assert (train.own(train.D) > 0).all() and (test.own(test.D) > 0).all()


def test_mixtures_are_held_out_where_they_are_uneven():
    assert split_runs(mixtures(), "mixture")[1].run_ids == ("4", "5")
    assert split_runs(mixtures(), "random", seed=1)[1].run_ids != split_runs(mixtures(), "random", seed=4)[1].run_ids
    with pytest.raises(UserError, match="unknown split"):
        split_runs(mixtures(), "largest")
    with pytest.raises(UserError, match="both parts need some"):
        split_runs(mixtures().where("run == '0'"), "largest_n")
