import dataclasses
import json
import pathlib

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from atlas.studies import attention_comparison as comparison
from atlas.studies.attention_comparison import RATES
from atlas.training import Study, run_id
from checked import UserError, overlay
from configs import attention_comparison
from models import count_params
from models.config import ATTENTION_KINDS

KINDS = ("dense", "gated_sparse")  # between them they have every number


TINY = {
    "data": {"window": 32, "synthetic_tokens": 40_000, "languages": ("a1",)},
    "model": {"d_model": 16, "d_ff": 64, "layers": 1, "heads": 1, "kv_heads": 1, "indexer_heads": 1}
    | {"k_base": 8, "k_min": 2, "k_max": 16},
    "train": {"batch_size": 4, "steps": (40,), "warmup_steps": 2, "evaluation_windows": 8},
}


def tiny() -> Study:
    """The experiment at a size that trains in seconds, with one rate at which nothing holds.

    Of the runs those of KINDS, and the rates of the first: compiling is what takes the time.
    """
    study = attention_comparison.get_sweep(overlay(attention_comparison.get_config(), TINY))
    full = [o for o in study.overlays if o["model.attention"] in KINDS and o.get("seed", 2) < 2]
    short = next(o for o in study.overlays if o["model.attention"] == KINDS[0] and o["group"] == RATES)
    return dataclasses.replace(study, overlays=[*full, short | {"train.learning_rate": 1e6, "train.steps": (20,)}])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("comparison")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(comparison, "_MEASURED_WINDOWS", 8)
        text = comparison.run_comparison(tiny(), directory, "a command")
    assert all(kind in text for kind in KINDS)
    return directory


@pytest.mark.thorough
def test_table_has_every_kind_and_number(workdir):
    table = pd.read_csv(workdir / "table.csv", index_col="kind")
    assert tuple(table.index) == KINDS
    assert (table.runs == 2).all()
    everywhere = [
        "num_params",
        "bits_per_byte",
        "needle",
        "multikey",
        "tracking",
        "first_token_attention",
        "sink_rate",
        "largest_activation",
        "spike_score",
        "spike_events_per_100k",
        "steps_per_second",
    ]
    assert np.isfinite(table[everywhere]).all(axis=None)
    of_one = ["mean_k", "first_token_selected", "indexer_loss", "output_gate", "value_gate"]
    for name in (*of_one, "selection_recall", "selection_overlap"):
        assert list(table[name].notna()) == [False, True], name
    assert table.largest_stable_rate.isna().all(), "nothing holds at a rate of a million"
    assert list(pd.read_csv(workdir / "learning_rates.csv").diverged) == [True]


@pytest.mark.thorough
def test_numbers_are_those_of_the_runs(workdir):
    table = pd.read_csv(workdir / "table.csv", index_col="kind")
    runs = pd.read_csv(workdir / "runs.csv").query("language == 'a1' and step == 40 and model == 'gated_sparse'")
    assert len(runs) == 2
    np.testing.assert_allclose(table.bits_per_byte["gated_sparse"], runs.loss.mean(), rtol=1e-5)
    np.testing.assert_allclose(table.bits_per_byte_sd["gated_sparse"], runs.loss.std(), rtol=1e-3)
    accuracy = pd.read_csv(workdir / "accuracy.csv").query("kind == 'dense' and task == 'multikey'")
    assert set(accuracy.length) == {32, 4 * 32}
    within = accuracy[accuracy.length == 32]
    assert (within.documents == 8).all()
    np.testing.assert_allclose(table.multikey["dense"], within.accuracy.mean(), rtol=1e-5)
    positions = pd.read_csv(workdir / "positions.csv").query("kind == 'dense'")
    assert list(positions.stop) == [8, 16, 32, 64, 128] * 2 and np.isfinite(positions.bits_per_byte).all()
    curves = pd.read_csv(workdir / "curves.csv")
    assert sorted(curves.step.unique()) == [20, 40]
    run = next(run for run in tiny().runs if run.model.attention == "dense")
    losses = [json.loads(line)["loss"] for line in (workdir / "runs" / run_id(run) / "metrics.jsonl").open()]
    np.testing.assert_allclose(
        curves.query("kind == 'dense' and seed == 0").loss.iloc[0], np.mean(losses[:20]), rtol=1e-5
    )


@pytest.mark.thorough
def test_leaves_figures_and_a_summary(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["command"] == "a command"
    assert set(summary["kinds"]) == set(KINDS)
    assert summary["tokens_a_run"] == 40 * 4 * 32
    assert 0 <= summary["training_minutes"] < 60
    assert {path.name for path in (workdir / "figures").iterdir()} == {
        "training.png",
        "accuracy.png",
        "learning_rates.png",
    }


@pytest.mark.thorough
def test_finished_comparison_trains_and_measures_nothing(workdir, monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a finished run was read again")

    monkeypatch.setattr(comparison, "load_model", fail)
    before = (workdir / "table.csv").read_text()
    comparison.run_comparison(tiny(), workdir, "a command")
    assert (workdir / "table.csv").read_text() == before


def test_sweep_trains_every_kind_at_equal_parameters_and_data():
    config = attention_comparison.get_config()
    runs = attention_comparison.get_sweep(config).plan
    full = [run for run in runs if run.group != RATES]
    assert [run.model.attention for run in full] == [kind for kind in ATTENTION_KINDS for _ in range(3)]
    assert len(runs) - len(full) == len(ATTENTION_KINDS) * len(attention_comparison.LEARNING_RATES)
    counts = [count_params(run.model)["non_embedding"] for run in full]
    assert max(counts) / min(counts) < 1.01
    assert len({(run.mixture, str(run.train), str(run.data)) for run in full}) == 1
    weights = {name: float(share) for name, share in (part.split(":") for part in full[0].mixture.split(","))}
    assert sum(weights.values()) == pytest.approx(1)
    assert sum(weights[name] for name in config.data.languages) == pytest.approx(attention_comparison.TEXT_SHARE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.languages": ()}, "name the languages"),
        ({"data.tasks": ()}, "name the languages"),
        ({"model.d_ff": 8}, "d_ff=8"),
    ],
)
def test_mistakes_of_the_config(change, message):
    with pytest.raises(UserError, match=message):
        attention_comparison.get_sweep(overlay(attention_comparison.get_config(), change))


def test_table_is_mean_and_deviation_over_seeds():
    results = pd.DataFrame({"run": list("abcd"), "kind": ["x", "x", "y", "y"], "seed": [0, 1, 0, 1]})
    results = results.assign(num_params=[7, 7, 8, 8], d_ff=4, group="g", bits_per_byte=[1, 3, 5, 5], loss=[1, 3, 5, 5])
    rates = pd.DataFrame(
        {"kind": ["y", "x", "y"], "learning_rate": [0.1, 0.3, 0.2], "loss": [1, 1, 1], "diverged": [False, True, False]}
    )
    table = comparison.tabulate(results, rates)
    assert table.loss.to_dict() == {"x": 2.0, "y": 5.0}
    np.testing.assert_allclose(table.loss_sd, [np.sqrt(2), 0])
    assert table.num_params.to_dict() == {"x": 7, "y": 8}
    assert np.isnan(table.largest_stable_rate["x"])
    assert table.largest_stable_rate["y"] == 0.2
    assert "2 ± 1.4" in comparison.describe(table)
    assert "largest_stable_rate" not in comparison.tabulate(results, pd.DataFrame())


def test_differences_are_taken_seed_by_seed():
    """Against the paired t interval, which that of two kinds is; a third with one seed shares the deviation."""
    losses = {"dense": [2.0, 2.2, 2.1], "local": [1.9, 2.15, 2.0], "more": [2.5]}
    rows = [(kind, seed, loss) for kind, values in losses.items() for seed, loss in enumerate(values)]
    results = pd.DataFrame(rows, columns=["kind", "seed", "bits_per_byte"]).assign(group="window 8")
    alone = results.query("seed == 0").assign(group="window 16", kind=lambda frame: frame.kind + "_16")
    table = comparison.differences(pd.concat([results, alone]))
    gaps = np.subtract(losses["local"], losses["dense"])
    np.testing.assert_allclose(table.difference[["dense", "local", "more"]], [0, gaps.mean(), 0.5])
    reach = scipy.stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    np.testing.assert_allclose(table.difference_95["local"], (reach.high - reach.low) / 2)
    np.testing.assert_allclose(table.difference_95["more"] / table.difference_95["local"], np.sqrt(3))
    np.testing.assert_allclose(table.difference["local_16"], -0.1)
    assert np.isnan(table.difference_95["local_16"])


def test_a_task_is_solved_at_the_first_good_evaluation_of_a_run_that_trains_it():
    columns = ["run", "language", "step", "nats_per_token", "tokens.needle", "tokens.multikey"]
    rows = [
        ("one", "needle", 25, 2.3, 800, 0),
        ("one", "needle", 50, 0.06, 1600, 0),
        ("one", "needle", 75, 0.01, 2400, 0),
        ("one", "multikey", 75, 0.01, 2400, 0),
        ("two", "needle", 75, 0.08, 2400, 0),
        ("two", "a1", 75, 0.01, 2400, 0),
    ]
    found = comparison.solved(pd.DataFrame(rows, columns=columns), ("needle", "multikey"))
    assert found.to_dict("list") == {
        "run": ["one", "two"],
        "task": ["needle"] * 2,
        "step": [50, pytest.approx(np.nan, nan_ok=True)],
    }
