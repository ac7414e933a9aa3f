import json
import pathlib

import pandas as pd
import pytest

from atlas.studies import analysis
from atlas.studies import scaling_study as study
from configs import smoke


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("study")
    study.run_study(smoke.get_sweep(smoke.get_config()), directory, "a command")
    return directory


@pytest.mark.thorough
def test_leaves_every_output(workdir):
    outputs = json.loads((workdir / "study.json").read_text())["outputs"]
    assert {"runs.csv", "fit.json", "transfer.csv", "heldout.csv", "report.html", "summary.txt"} <= set(outputs)
    for name in outputs:
        assert (workdir / name).stat().st_size > 0, name
    fit = json.loads((workdir / "fit.json").read_text())
    assert fit["law"] == "atlas"
    assert {"E[a1]", "alpha[b1]", "tau[a1<-a2]", "phi"} <= set(fit["parameters"])
    assert (workdir / "report.html").read_text().count("data:image/png;base64") >= 5


@pytest.mark.thorough
def test_table_has_a_row_for_every_language_of_every_branch(workdir):
    config = smoke.get_config()
    table = pd.read_csv(workdir / "runs.csv")
    assert len(table) == len(smoke.get_sweep(config).overlays) * len(config.train.steps) * len(config.data.languages)
    tokens = table[[f"tokens.{name}" for name in config.data.languages]].sum(axis=1)
    assert set(tokens) == {steps * config.train.batch_size * config.data.window for steps in config.train.steps}


@pytest.mark.thorough
def test_finished_study_returns_at_once(workdir, monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a finished study was analysed again")

    monkeypatch.setattr(analysis, "analyse", fail)
    summary = study.run_study(smoke.get_sweep(smoke.get_config()), workdir)
    assert "transfer matrix" in summary
    assert str(workdir / "report.html") in summary
