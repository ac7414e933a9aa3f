import importlib
import pathlib

import numpy as np
import pandas as pd

from atlas.studies import analysis

ROOT = pathlib.Path(__file__).parents[3]
QUICKSTART = ROOT / "experiments" / "results" / "quickstart" / "runs.csv"


def test_skipped_steps_are_reported():
    frame = pd.DataFrame({"run": ["a", "a", "b"], "skipped_steps": [1, 3, 0]})
    assert analysis._skipped(frame) == ("run a skipped 3 steps that were not finite",)


def test_epochs_are_those_of_the_most_repeated_language():
    frame = pd.DataFrame(
        {"tokens.a": [10, 5], "tokens.b": [0, 9], "unique_tokens.a": [5, 5], "unique_tokens.b": [3, 3]}
    )
    np.testing.assert_allclose(analysis._epochs(frame), [2.0, 3.0])


def test_synthetic_study_ranks_sisters_above_strangers():
    """On the committed runs of the quickstart; a fresh run of it is checked in continuous integration."""
    summary = analysis.analyse(pd.read_csv(QUICKSTART), "quickstart")
    tau = summary.fit.transfer_matrix()
    config = importlib.import_module("configs.quickstart").get_config()
    for target in config.data.languages:
        others = [name for name in config.data.languages if name != target]
        sister = next(name for name in others if name[0] == target[0])
        assert tau.loc[target, sister] > max(tau.loc[target, name] for name in others if name != sister)
