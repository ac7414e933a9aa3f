"""Held-out scores of laws of one language; those of the joint law stand with its fit."""

import numpy as np
import pandas as pd
import pytest

from atlas.scaling import heldout, load_runs
from checked import UserError


def study():
    """Two languages by the same law but for its level, trained apart; a third is evaluated in the largest run alone."""
    rows = []
    for language, level in (("a", 1.0), ("b", 2.0), ("c", 1.5)):
        for N in np.geomspace(1e8, 1e10, 6)[5 if language == "c" else 0 :]:
            for D in np.geomspace(1e10, 1e12, 6):
                loss = level * (1.7 + 480.0 / N**0.35 + 2100.0 / D**0.37)
                row = {"run": f"{language}-{N}", "language": language, "num_params": N, "loss": loss}
                rows.append(row | {f"tokens.{name}": D * (name == language) for name in "abc"})
    return load_runs(pd.DataFrame(rows))


def test_scores_are_taken_within_languages():
    runs = study()
    assert heldout(runs, "largest_n", "chinchilla_own")[0]["n_heldout"] == 4  # behind 30 % of their runs
    scores, rows = heldout(runs, "largest_n", "chinchilla_own", warm_up=0)
    assert scores["n_train"] == 60 and scores["n_heldout"] == 12 and len(scores["runs"]) == 3
    assert set(scores["languages"]) == {"a", "b"} and scores["r2"] > 0.9999 and scores["are"] < 1e-3
    lost = rows["predicted"].isna()
    np.testing.assert_array_equal(lost, rows["language"] == "c")
    np.testing.assert_allclose(rows["predicted"][~lost], rows["loss"][~lost], rtol=1e-3)


def test_nothing_to_learn_from_is_a_user_error():
    runs = study()
    with pytest.raises(UserError, match="unknown law 'chinchila'"):
        heldout(runs, "largest_n", "chinchila")
    with pytest.raises(UserError, match="no language both to train on and to predict"):
        heldout(runs.where("language == 'c' or language == 'b' and num_params < 9e9"), "largest_n", "chinchilla")
