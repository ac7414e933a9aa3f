import importlib
import json
import pathlib

import numpy as np
import pandas as pd
import pytest

from atlas.studies import scaling_study as study
from configs import smoke

ROOT = pathlib.Path(__file__).parents[3]
QUICKSTART = ROOT / "experiments" / "results" / "quickstart" / "runs.csv"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("study")
    config = smoke.get_config()
    study.run_study(config, smoke.get_sweep(config), directory, "a command")
    return directory


@pytest.mark.thorough
def test_leaves_every_output(workdir):
    for name in study.OUTPUTS:
        assert (workdir / name).stat().st_size > 0, name
    fit = json.loads((workdir / "fit.json").read_text())
    assert fit["law"] == "atlas"
    assert {"E[a1]", "alpha[b1]", "tau[a1<-a2]", "phi"} <= set(fit["parameters"])
    assert (workdir / "report.html").read_text().count("data:image/png;base64") >= 5


@pytest.mark.thorough
def test_table_has_a_row_for_every_language_of_every_branch(workdir):
    config = smoke.get_config()
    table = pd.read_csv(workdir / "runs.csv")
    assert len(table) == len(smoke.get_sweep(config)) * len(config.train.steps) * len(config.data.languages)
    tokens = table[[f"tokens.{name}" for name in config.data.languages]].sum(axis=1)
    assert set(tokens) == {steps * config.train.batch_size * config.data.window for steps in config.train.steps}


@pytest.mark.thorough
def test_finished_study_returns_at_once(workdir, monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a finished study was analysed again")

    monkeypatch.setattr(study, "analyse", fail)
    config = smoke.get_config()
    summary = study.run_study(config, smoke.get_sweep(config), workdir)
    assert "transfer matrix" in summary
    assert str(workdir / "report.html") in summary


def test_skipped_steps_are_reported():
    frame = pd.DataFrame({"run": ["a", "a", "b"], "skipped_steps": [1, 3, 0]})
    assert study._skipped(frame) == ("run a skipped 3 steps that were not finite",)


def test_epochs_are_those_of_the_most_repeated_language():
    frame = pd.DataFrame(
        {"tokens.a": [10, 5], "tokens.b": [0, 9], "unique_tokens.a": [5, 5], "unique_tokens.b": [3, 3]}
    )
    np.testing.assert_allclose(study._epochs(frame), [2.0, 3.0])


def test_synthetic_study_ranks_sisters_above_strangers():
    """On the committed runs of the quickstart; a fresh run of it is checked in continuous integration."""
    summary = study.analyse(pd.read_csv(QUICKSTART), "quickstart")
    tau = summary.fit.transfer_matrix()
    config = importlib.import_module("configs.quickstart").get_config()
    for target in config.data.languages:
        others = [name for name in config.data.languages if name != target]
        sister = next(name for name in others if name[0] == target[0])
        assert tau.loc[target, sister] > max(tau.loc[target, name] for name in others if name != sister)
