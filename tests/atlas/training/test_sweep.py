import dataclasses
import json

import pytest

from atlas.training import finished, run_id, run_sweep, runs_table, status, sweep
from checked import UserError, overlay
from checked.files import write_atomically
from tests.atlas.training.worker import config_of

# Small in all that takes time to compile: what is tested here is which runs train, and when.
SMALL = {"train.steps": [2, 4], "train.evaluate_every": 0, "model.attention": "gated", "model.layers": 1}
RUNS = [config_of(SMALL | {"mixture": mixture, "seed": seed}) for mixture in ("a1", "uniform(*)") for seed in (0, 1)]


def test_populations_hold_runs_of_one_shape():
    wide = [config_of(SMALL | {"model.d_ff": 48, "seed": seed}) for seed in (0, 1)]
    units = sweep.populations([RUNS[0], wide[0], *RUNS[1:], wide[1]], size=3)
    assert [[run_id(config) for config in unit] for unit in units] == [
        [run_id(config) for config in unit] for unit in (RUNS[:3], RUNS[3:], wide)
    ]


def test_continued_runs_come_last():
    child = config_of(SMALL | {"initialize": run_id(RUNS[0])})
    assert sweep.populations([child, RUNS[0]], size=2) == [[RUNS[0]], [child]]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_part_the_sweep(count):
    units = [[index] for index in range(5)]
    parts = [sweep.shard_of(units, f"{index}/{count}") for index in range(count)]
    assert sorted(unit for part in parts for unit in part) == units


@pytest.mark.parametrize("shard", ["2/2", "-1/2", "x", "1"])
def test_bad_shards(shard):
    with pytest.raises(UserError, match="--shard"):
        sweep.shard_of([], shard)


def set_array(monkeypatch, **values: int | str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))


@pytest.mark.parametrize(
    ("array", "units"),
    [
        ({"ID": 5, "MIN": 4, "MAX": 5, "STEP": 1, "COUNT": 2}, [["b"]]),  # --array=4-5
        ({"ID": 7, "MIN": 1, "MAX": 7, "STEP": 2, "COUNT": 4}, [["d"]]),  # --array=1-7:2
    ],
)
def test_shard_from_the_scheduler(monkeypatch, array, units):
    set_array(monkeypatch, **array)
    assert sweep.shard_of([["a"], ["b"], ["c"], ["d"]][: 2 * array["STEP"]], "") == units


@pytest.mark.parametrize(
    "array",
    [
        {"ID": 3, "MIN": 3, "MAX": 3, "STEP": 1, "COUNT": 1},  # --array=3: one task repeated
        {"ID": 3, "MIN": 0, "MAX": 7, "STEP": 1, "COUNT": 3},  # --array=0,3,7
        {"ID": 3},
        {"ID": 3, "MIN": 0, "MAX": 7, "STEP": "x", "COUNT": 8},
    ],
)
def test_part_of_an_array_that_slurm_does_not_tell_is_asked_for(monkeypatch, array):
    set_array(monkeypatch, **array)
    with pytest.raises(UserError, match="--shard="):
        sweep.shard_of([["a"]], "")


def test_sweep_trains_once_and_tabulates(tmp_path, monkeypatch):
    run_sweep(RUNS[:2], tmp_path, population=2, shard="0/1")
    table = runs_table(RUNS[:2], tmp_path)
    assert list(status(RUNS[:2], tmp_path)["state"]) == ["done", "done"]
    assert len(table) == 2 * 2 * 3
    assert set(table["phase"]) == {"cooldown"}
    last = table[table["step"] == 4].iloc[0]
    assert (last["tokens.a1"], last["tokens.b1"]) == (4 * 8 * 32, 0)
    assert last["unique_tokens.a1"] > last["tokens.a1"]
    assert last["skipped_steps"] == 0

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(sweep, "train", fail)
    run_sweep(RUNS[:2], tmp_path, population=2, shard="0/1")
    assert runs_table(RUNS[:2], tmp_path).equals(table)


def test_workdir_of_another_sweep(tmp_path):
    sweep.claim(tmp_path, RUNS[:2])
    sweep.claim(tmp_path, RUNS[1::-1])
    with pytest.raises(UserError, match="another config"):
        sweep.claim(tmp_path, RUNS[:3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "twice"),
        ({"mixture": "a9"}, "unknown language 'a9'"),
        ({"mixture": "a1:0.5,a2:0.4"}, "sum to"),
        ({"mesh.tensor": 64}, "tensor=64 .* there are"),
        ({"initialize": "none"}, "has no trained model"),
        ({"initialize": RUNS[0].name, "model.layers": 3}, "another shape"),
        ({"initialize": RUNS[0].name, "model.attention": "dense"}, "another shape, or has gates"),
    ],
)
def test_what_would_stop_any_run_is_named_before_the_first_trains(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(sweep, "prepare_corpus", None)
    bad = overlay(RUNS[0], {"name": "bad"} | changes) if changes else RUNS[0]
    with pytest.raises(UserError, match=f"run {bad.name}: .*{message}") as error:
        run_sweep([RUNS[0], bad], tmp_path, shard="0/1")
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_populations_must_divide_over_the_mesh():
    """On the one device of this process only batches can fail; the rule itself is tested with the mesh."""
    with pytest.raises(UserError, match=r"run one: mesh run=2"):
        sweep.check_runs([overlay(RUNS[0], {"name": "one", "mesh.run": 2})], population=1)


def test_runs_to_continue_from_are_accepted(tmp_path):
    child = overlay(RUNS[0], {"name": "child", "initialize": run_id(RUNS[0]), "seed": 7})
    sweep.check_runs([RUNS[0], RUNS[1], child], workdir=tmp_path)
    elsewhere = overlay(child, {"initialize": "elsewhere"})
    sweep.check_runs([elsewhere])
    directory = tmp_path / "runs" / "elsewhere"

    def leave(run):
        """What `check_runs` reads of a finished run."""
        for name in (finished.METRICS, finished.EVALUATIONS):
            write_atomically(directory / name, "")
        write_atomically(directory / finished.CONFIG, json.dumps({"config": dataclasses.asdict(run)}))
        finished.mark(directory, {})

    leave(RUNS[1])
    sweep.check_runs([elsewhere], workdir=tmp_path)
    leave(overlay(RUNS[1], {"model.d_ff": 99}))
    with pytest.raises(UserError, match="run child: initialize='elsewhere' is a model of another shape"):
        sweep.check_runs([elsewhere], workdir=tmp_path)
