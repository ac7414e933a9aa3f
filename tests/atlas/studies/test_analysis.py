import functools
import json
import pathlib

import numpy as np
import pandas as pd
import pytest
from tqdm import tqdm

from atlas.scaling import answers, load_runs, simulation
from atlas.studies import analysis
from checked import UserError
from configs import quickstart

ROOT = pathlib.Path(__file__).parents[3]
QUICKSTART = ROOT / "experiments" / "results" / "quickstart" / "runs.csv"


def table() -> pd.DataFrame:
    """Runs of two languages at three sizes, mono- and bilingual, with a trunk, and one run of few unique tokens."""
    truth = simulation.truth(2, 0)
    plan = simulation.mixtures(2, 3, 3, 3, 0, np.random.default_rng(0))
    cooled = simulation.table(truth, plan, 0, checkpoints=4).assign(phase="cooldown")
    sizes = cooled["num_params"].unique()
    near = np.geomspace(sizes.min(), sizes.max(), 3)
    cooled["num_params"] = near[np.abs(np.log(cooled["num_params"].to_numpy()[:, None] / near)).argmin(1)]
    tokens = [f"tokens.{name}" for name in truth.languages]
    cooled["loss"] = np.exp(0.004 * np.random.default_rng(1).normal(size=len(cooled))) * truth.loss(
        cooled["num_params"].to_numpy(), cooled[tokens].to_numpy(), cooled["language"].str[1:].astype(int).to_numpy()
    )
    capped = cooled["run"] == cooled["run"].iloc[0]
    cooled.loc[capped, "unique_tokens.l0"] = 0.5 * cooled.loc[capped, "tokens.l0"].max()
    return pd.concat([cooled, cooled.assign(phase="trunk", loss=1.05 * cooled["loss"])], ignore_index=True)


@pytest.fixture(scope="module")
def quick():
    """One split and two laws: the others are fitted in the same way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "SPLITS", ("largest_n",))
        patch.setattr(analysis, "LAWS", ("atlas", "chinchilla_own"))
        yield


@pytest.fixture(scope="module")
def study(quick, tmp_path_factory) -> tuple[pathlib.Path, str]:
    workdir = tmp_path_factory.mktemp("study")
    return workdir, analysis.analyse_into(workdir, table(), "two languages")


def test_laws_are_of_the_ends_of_cooldowns(study):
    workdir, text = study
    fit = json.loads((workdir / "fit.json").read_text())
    frame = table()
    assert fit["n_rows"] == (frame.phase == "cooldown").sum()
    assert "mixes learning-rate phases" not in text
    assert {"E[l0]", "tau[l0<-l1]", "phi"} <= set(fit["parameters"]) and "joint_law" in fit


def test_report_and_plan_agree_to_the_printed_digit(study):
    workdir, text = study
    line = next(line for line in text.splitlines() if line.startswith("next, for"))
    flops = 10 * 6 * float((table().num_params * table()[["tokens.l0", "tokens.l1"]].sum(axis=1)).max())
    plan, facts = answers.mixture(str(workdir), flops, {}, {})
    assert f"{facts['flops']:.2g} FLOPs: N = {facts['params']:.3g}, D = {facts['tokens']:.3g}" in line
    for row in plan.itertuples():
        assert f"{row.language} {row.share:.0%}" in line
        assert row.epochs <= 1 or f"({row.epochs:.1f} epochs)" in line
    assert (plan.epochs > 0).all()
    report = (workdir / "report.html").read_text()
    assert f"<td>{plan.epochs.max():.3g}</td>" in report and f"{plan.share.max():.1%}".replace("%", " %") in report


def test_summary_and_report_say_whose_phi_is_whose(study):
    workdir, text = study
    report = (workdir / "report.html").read_text()
    for words in ("(joint law: decides predictions", "(capacity law: decides what more", "The two may differ"):
        assert words in text and words in report


def test_results_stand_until_what_they_follow_from_changes(study, tmp_path, monkeypatch):
    workdir, text = study

    class AnalysedAnewError(Exception):
        pass

    def analyse(*_: object) -> None:
        raise AnalysedAnewError

    monkeypatch.setattr(analysis, "analyse", analyse)
    assert analysis.analyse_into(workdir, table(), "two languages") == text
    with pytest.raises(AnalysedAnewError):
        analysis.analyse_into(workdir, table(), "another title")
    with pytest.raises(AnalysedAnewError):
        analysis.analyse_into(workdir, table().assign(loss=lambda t: 1.001 * t.loss), "two languages")
    with pytest.raises(AnalysedAnewError):
        analysis.analyse_into(workdir, table(), "two languages", {("l0", "l1"): 1.0})
    fitter = tmp_path / "fitter.py"
    fitter.write_text("GUARD = 1e-3\n")
    with monkeypatch.context() as patch, pytest.raises(AnalysedAnewError):
        patch.setattr(analysis, "_code", lambda: [fitter])
        analysis.analyse_into(workdir, table(), "two languages")
    outputs = json.loads((workdir / "study.json").read_text())["outputs"]
    assert {"runs.csv", "fit.json", "transfer.csv", "heldout.csv", "report.html", "summary.txt"} <= set(outputs)
    assert all((workdir / name).exists() for name in outputs)
    for name in outputs:
        kept = (workdir / name).rename(tmp_path / "kept")
        with pytest.raises(AnalysedAnewError):
            analysis.analyse_into(workdir, table(), "two languages")
        kept.rename(workdir / name)


def minimal() -> pd.DataFrame:
    frame = table()
    frame = frame[frame.phase == "cooldown"]
    return frame[["run", "num_params", "language", "loss", "tokens.l0", "tokens.l1"]]


def test_a_minimal_table_is_analysed(quick, tmp_path):
    minimal().to_csv(tmp_path / "runs.csv", index=False)
    text = analysis.analyse_into(tmp_path, tmp_path / "runs.csv", "minimal")
    assert "next, for" in text and "epochs" not in text.split("next, for")[1].splitlines()[0]
    assert (tmp_path / "report.html").exists()


def test_reasons_of_missing_scores_are_kept_by_split_and_law(monkeypatch):
    def heldout(runs: object, split: str, law: str, **options: object) -> dict:
        raise UserError(f"{law} cannot be fitted without {split}")

    monkeypatch.setattr(analysis.scaling, "heldout", heldout)
    missing: dict[str, str] = {}
    scores, rows = analysis._heldout(None, {}, functools.partial(analysis._attempt, missing, tqdm(disable=True)))
    assert scores.empty and rows is None
    assert len(missing) == len(analysis.SPLITS) * len(analysis.LAWS)
    assert missing["held-out score of atlas on largest_n"] == "atlas cannot be fitted without largest_n"


def test_skipped_steps_are_reported():
    frame = pd.DataFrame({"run": ["a", "a", "b"], "skipped_steps": [1, 3, 0]})
    assert analysis._skipped(frame) == ("run a skipped 3 steps that were not finite",)


@pytest.mark.thorough
def test_synthetic_study_ranks_sisters_above_strangers():
    """On the committed runs of the quickstart; a fresh run of it is checked in continuous integration."""
    summary = analysis.analyse(load_runs(QUICKSTART), "quickstart")
    tau = summary.fit.transfer_matrix()
    config = quickstart.get_config()
    for target in config.data.languages:
        others = [name for name in config.data.languages if name != target]
        sister = next(name for name in others if name[0] == target[0])
        assert tau.loc[target, sister] > max(tau.loc[target, name] for name in others if name != sister)
