import itertools
import json
import signal
import time
import types

import pytest

from atlas.training import Study
from checked import UserError, overlay
from configs import smoke
from experiments.benchmarks import accelerator


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Runs the suite with figures that are given, in minutes that are given."""

    def of(figures, minutes):
        monkeypatch.setattr(accelerator, "_figures", lambda *_: iter(figures))
        monkeypatch.setattr(accelerator, "_MINUTES", minutes)
        return accelerator.run(str(tmp_path))[0]

    return of


def test_a_figure_that_fails_stops_no_other_and_all_are_kept_at_once(measured, tmp_path):
    def second():
        assert len(json.loads((tmp_path / "a.json").read_text())["rows"]) == 1  # the first is there already
        raise ValueError("no such\nkernel")

    rows = measured([("a", {"n": 1}, lambda: [{"x": 3}]), ("a", {"n": 2}, second), ("b", {}, lambda: [{}])], 60.0)
    assert rows == [
        {"part": "a", "n": 1, "x": 3},
        {"part": "a", "n": 2, "note": "failed: ValueError: no such"},
        {"part": "b"},
    ]
    assert json.loads((tmp_path / "a.json").read_text())["rows"] == rows[:2]


def test_nothing_begins_in_the_time_of_the_study(measured):
    figures = [(part, {}, lambda: [{}]) for part in ("attention", "study")]
    rows = measured(figures, accelerator._STUDY_MINUTES - 0.1)
    assert rows == [{"part": "attention", "note": "not measured: no time was left"}, {"part": "study"}]


def test_a_workdir_is_asked_for():
    with pytest.raises(UserError, match="--workdir is missing"):
        accelerator.run("")


def small(monkeypatch, steps):
    base = overlay(smoke.get_config(), {"train.steps": (steps,), "data.synthetic_tokens": 20_000})
    study = Study("small", base, [{"name": "a"}, {"name": "b", "seed": 1}], population=2)
    given = types.SimpleNamespace(get_config=lambda: base, get_sweep=lambda _: study)
    monkeypatch.setattr(accelerator, "atlas_mini", given)
    return base


def test_the_study_ends_with_its_time(monkeypatch, tmp_path):
    def endless(*_):
        for _ in itertools.count():
            pass

    small(monkeypatch, 3)
    monkeypatch.setattr(accelerator, "run_sweep", endless)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
    (row,) = accelerator._study(tmp_path, time.monotonic())
    assert signal.signal(signal.SIGINT, before) == signal.SIG_IGN
    assert row | {"seconds": 0} == {"runs": 2, "done": 0, "steps": 0, "planned_steps": 6, "seconds": 0}


@pytest.mark.thorough
def test_every_part_in_a_small_form(monkeypatch, tmp_path):
    base = small(monkeypatch, 3)
    monkeypatch.setattr(accelerator, "_model", lambda kind: overlay(base, {"model.attention": kind}))
    monkeypatch.setattr(accelerator, "_attention", lambda T: [{"pass": "forward", "seconds": 1.0}])
    monkeypatch.setattr(accelerator, "_POPULATIONS", (2,))
    monkeypatch.setattr(accelerator, "_MINUTES", 60.0)
    rows = accelerator.run(str(tmp_path))[0]
    assert [row.get("note") for row in rows] == [None] * 10
    models, (population,), (study,) = ([r for r in rows if r["part"] == p] for p in ("model", "population", "study"))
    assert [row["attention"] for row in models] == ["dense", "gated_sparse"]
    for row in (*models, population):
        tokens = row.get("runs", 1) * base.train.batch_size * base.data.window
        assert row["tokens_per_second"] == pytest.approx(tokens / row["step_seconds"])
    assert (study["runs"], study["done"], study["steps"]) == (2, 2, study["planned_steps"])
