import functools
import os
import pathlib

import jax
import pandas as pd
import pytest

from atlas.data import Corpus, DataConfig
from atlas.training import run_id, run_sweep, runs_table, status, sweep, workers
from checked import UserError
from tests.atlas.training.worker import config_of

SMALL = {"train.steps": [2, 4], "train.evaluate_every": 0, "model.attention": "gated", "model.layers": 1}
RUNS = [config_of(SMALL | {"mixture": mixture}) for mixture in ("a1", "uniform(*)")]
RUNS.append(config_of(SMALL | {"seed": 1, "initialize": run_id(RUNS[1])}))


def die(config: DataConfig) -> Corpus:
    os._exit(3)


def begin(workdir: pathlib.Path, progress=lambda tokens, words: None, corpora=None) -> None:
    corpora = corpora or functools.partial(sweep.prepare_corpus, workdir=workdir)
    workers.train_side_by_side([[run] for run in RUNS], corpora, workdir, 1, progress, lambda unit: None)


def test_runs_side_by_side_are_those_of_one_process_whatever_interrupts_them(tmp_path):
    run_sweep(RUNS, tmp_path / "alone", shard="0/1")
    workdir = tmp_path / "together"
    sweep.prepare_corpus(RUNS[0].data, workdir)

    def interrupt(tokens: int, words: str) -> None:
        if tokens:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin(workdir, interrupt)
    assert "done" not in status(RUNS, workdir)["state"].iloc[-1]
    assert any((workdir / "checkpoints").rglob("*"))  # what the interrupted have saved
    run_sweep(RUNS, workdir, shard="0/1", processes=2)
    alone, together = (runs_table(RUNS, place) for place in (tmp_path / "alone", workdir))
    # Float32 sums of a thread are not in the order of those of two.
    pd.testing.assert_frame_equal(together, alone, rtol=1e-5)


def test_what_a_worker_raises_is_raised(tmp_path):
    wild = config_of(SMALL | {"train.steps": [8], "train.learning_rate": 1e30})
    with pytest.raises(UserError, match=r"run run-\w+ skipped 6 of its first"):
        run_sweep([wild], tmp_path, shard="0/1", processes=2)


def test_a_worker_that_dies_is_named(tmp_path):
    with pytest.raises(UserError, match=f"the process that trained {RUNS[0].name} died.*fewer --processes"):
        begin(tmp_path, corpora=die)


def test_where_there_are_accelerators_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "only_cpus", lambda: False)
    with pytest.raises(UserError, match=r"--processes=1: .*JAX_PLATFORMS=cpu"):
        begin(tmp_path)


@pytest.mark.parametrize(
    ("units", "cores", "memory", "cpus", "hosts", "kind", "expected"),
    [
        (25, 2, 64, True, False, "dense", 2),
        (25, 64, 64, True, False, "dense", 6),
        (25, 64, 4, True, False, "dense", 3),
        (25, 64, 0, True, False, "dense", 1),
        (7, 64, 64, True, False, "dense", 1),
        (25, 2, 64, False, False, "dense", 1),
        (25, 2, 64, True, True, "dense", 1),
        (25, 2, 64, True, False, "gated", 1),
    ],
)
def test_as_many_processes_as_repay_their_start(monkeypatch, units, cores, memory, cpus, hosts, kind, expected):
    monkeypatch.setattr(workers, "only_cpus", lambda: cpus)
    monkeypatch.setattr(workers, "_available", lambda: memory << 30)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: hosts)
    monkeypatch.setattr(workers, "added", lambda name: name == "gated" or None)
    assert workers.usual([[config_of({"model.attention": kind})]] * units) == expected
