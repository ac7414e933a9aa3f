import json
import sys

import numpy as np
import pandas as pd
import pytest
from absl import flags
from absl.testing import flagsaver

from atlas.scaling import answers, simulation
from checked import UserError
from experiments import fit


def table(**columns) -> pd.DataFrame:
    N, D = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 1e10, 5), np.geomspace(3e9, 1e12, 7)))
    noise = np.exp(0.003 * np.random.default_rng(0).normal(size=N.size))
    loss = (1.7 + 480.0 / N**0.35 + 2100.0 / D**0.37) * noise
    return pd.DataFrame({"num_params": N, "num_tokens": D, "loss": loss, "family": "a"} | columns)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs the binary on a table and returns fit.json."""
    monkeypatch.setattr(fit, "compile_lean", lambda **_: None)  # it is for a process of its own: this one lives on

    def call(frame: pd.DataFrame, **options):
        frame.to_csv(tmp_path / "runs.csv", index=False)
        if not flags.FLAGS.is_parsed():
            flags.FLAGS(sys.argv[:1])
        given = {
            "law": "chinchilla",
            "runs": str(tmp_path / "runs.csv"),
            "workdir": str(tmp_path / "out"),
            "figures": False,
        }
        with flagsaver.flagsaver(**given | options):
            fit.main([])
        return json.loads((tmp_path / "out" / "fit.json").read_text())

    return call


def test_a_fit_writes_the_whole_document(command, capsys):
    found = command(table(), holdout="top_compute", bootstrap=50, seed=1)
    assert set(found) >= {"law", "objective", "converged", "n_rows", "n_runs", "parameters", "holdout", "warnings"}
    assert found["law"] == "chinchilla" and found["converged"] and found["n_rows"] == found["n_runs"] == 35
    assert set(found["parameters"]) == {"E", "A", "B", "alpha", "beta"}
    for estimate in found["parameters"].values():
        assert set(estimate) == {"value", "se", "low", "high", "identified"}
        assert estimate["low"] < estimate["high"]
    assert found["holdout"]["are"] < 0.02 and "r2" in found["holdout"]
    assert found["bootstrap"] == {"resamples": 50, "converged": 1.0}
    shown = capsys.readouterr().out
    assert "held out top_compute" in shown and "of the starts reach this optimum" in shown


def test_a_comparison_fits_the_best_and_files_lie_beside_the_fit(command, tmp_path, capsys):
    found = command(table(), law="", compare=["chinchilla", "chinchilla_tied"], figures=True)
    ranked = found["comparison"]["laws"]
    assert found["law"] == ranked[0]["law"] and {row["law"] for row in ranked} == {"chinchilla", "chinchilla_tied"}
    assert all(row["excess_low"] <= row["excess"] <= row["excess_high"] for row in ranked)
    assert "laws by their error on top_compute" in capsys.readouterr().out
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        *("fit.json", "parameters.csv", "parameters.tex"),
        *("observed.png", "residuals.png", "law.png", "iso_flop.png"),
    }
    assert (out / "parameters.tex").read_text().startswith(r"\begin{tabular}")
    assert set(pd.read_csv(out / "parameters.csv").parameter) == set(found["parameters"])


def test_columns_and_a_law_of_ones_own(command, tmp_path):
    (tmp_path / "laws.py").write_text(
        "from atlas.scaling import Law, Parameter\n"
        "alpha = Parameter('alpha', role='exponent')\n"
        "loss = lambda p, x: p['E'] + p['A'] * x['depth'] ** -p['alpha']\n"
        "deep = Law('deep', '', loss, ['E', 'A', alpha], ['depth'])\n"
    )
    frame = pd.DataFrame({"layers": np.geomspace(2, 64, 12), "nll": 1.0 + 3.0 / np.geomspace(2, 64, 12) ** 0.5})
    found = command(frame, law=f"{tmp_path / 'laws.py'}:deep", columns=["depth=layers", "loss=nll"])
    assert found["parameters"]["alpha"]["value"] == pytest.approx(0.5, rel=1e-4)


def test_advice_is_printed_and_written(command, capsys):
    found = command(table(), advise=1e21)
    assert found["advice"]["flops"] == 1e21 and len(found["advice"]["plans"]) == 7
    assert "more FLOPs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [({"bootstrap": 1}, "2 resamples"), ({"advise": np.nan}, "budget"), ({"advise": -1.0}, "budget")],
)
def test_numbers_that_mean_nothing_are_refused_before_the_fit(command, monkeypatch, options, message):
    monkeypatch.setattr("atlas.scaling.planning.documents.fit", None)
    with pytest.raises(UserError, match=message):
        command(table(), **options)


def test_a_fit_that_did_not_converge_says_so_first_with_what_would_mend_it(command, capsys, tmp_path):
    rows = table()
    found = command(rows.assign(loss=480.0 / rows.num_params**0.35 + 2100.0 / rows.num_tokens**0.37))
    assert not found["converged"] and found["warnings"][0].startswith("E runs to 0: do not trust")
    assert "did not converge: do not trust it" in capsys.readouterr().out.splitlines()[0]
    _, facts = answers.predict(str(tmp_path / "out"), 1e9, 1e11, "", {}, {}, {})
    assert next(iter(facts.values())).startswith("the fit did not converge; E runs to 0")


def test_plans_of_several_languages_read_the_table_that_the_fit_names(command, tmp_path):
    truth = simulation.truth(2, 0)
    frame = simulation.table(truth, simulation.mixtures(2, 4, 4, 2, 0, np.random.default_rng(0)), 0, checkpoints=2)
    kept = frame.assign(kind="good")
    bad = kept.assign(kind="bad", loss=2 * kept.loss, run="bad " + kept.run.astype(str))
    frame = pd.concat([kept, bad]).rename(columns={"num_params": "size"})
    command(frame, law="atlas", where="kind == 'good'", columns=["num_params=size"])
    mixed, facts = answers.predict(str(tmp_path / "out"), 1e9, 1e11, "", {"l0": 1.0, "l1": 1.0}, {}, {})
    assert facts["bands"].startswith("90 %") and (mixed.loss_low < mixed.loss).all()
    assert len(answers.Fitted(tmp_path / "out").runs()) == len(kept)


def test_what_the_runs_cannot_tell_is_a_verdict_not_an_error(command):
    found = command(table()[lambda rows: rows["num_params"] < 4e8])
    assert not found["parameters"]["alpha"]["identified"]
    assert any("not identified" in warning for warning in found["warnings"])


def test_dropped_rows_are_counted_with_the_reason(command):
    frame = table()
    frame.loc[3, "loss"] = np.nan
    frame = pd.concat([frame, frame.iloc[:2]])
    warnings = " ".join(command(frame)["warnings"])
    assert "1 of 37 rows: 'loss' is missing" in warnings and "2 of 36 rows: the row repeats" in warnings


def test_runs_without_a_comparable_row_are_counted_on_the_terminal_and_in_the_file(command, capsys):
    found = command(table(phase=["cooldown"] * 28 + [None] * 7))
    told = [warning for warning in found["warnings"] if "7 of 35 rows, of 7 runs that have no row of phase" in warning]
    assert found["n_rows"] == 28 and told and f"warning: {told[0]}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, options, message",
    [
        (lambda t: t.rename(columns={"num_params": "num_parms"}), {}, "num_parms"),
        (lambda t: t.assign(loss="high"), {}, "not numeric"),
        (lambda t: t.assign(loss=-t["loss"]), {}, "must be positive"),
        (lambda t: t.assign(num_params=0.0), {}, "must be positive"),
        (lambda t: t.assign(loss_unit=["nats"] * 30 + ["bits"] * 5), {}, "several units"),
        (lambda t: t.iloc[:1], {}, "1 rows cannot determine the 5"),
        (lambda t: t.assign(loss=np.inf), {}, "no usable row"),
        (lambda t: t.assign(unique_tokens=0.0), {}, "unique tokens"),
        (lambda t: t, {"where": "loss > 100"}, "keeps none"),
        (lambda t: t, {"bootstrap": -1}, "needs 2 resamples or more"),
        (lambda t: t, {"law": "atlas", "bootstrap": 10}, "--bootstrap does not apply"),
        (lambda t: t, {"law": "atlas", "warm_up": 0.0}, "--warm_up does not apply"),
        (lambda t: t, {"objective": "lad", "delta": 0.1}, "lad has none"),
        (lambda t: t.assign(experts=2), {"law": "mixture_of_experts", "advise": 1e20}, "advice plans by N and D"),
        (lambda t: t, {"law": "annealing"}, "needs the schedule"),
    ],
)
def test_mistakes_are_one_line(command, change, options, message):
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        command(change(table()), **options)
    assert message in str(error.value)
