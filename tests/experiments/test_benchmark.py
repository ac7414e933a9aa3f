import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest

from experiments.benchmarks import timing
from tests.experiments.binaries import run_binaries

ROOT = pathlib.Path(__file__).parents[2]


def benchmark(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.benchmark", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


@pytest.mark.thorough
def test_attention_compares_every_path_with_the_peer(tmp_path):
    done = benchmark("--suite=attention", "--lengths=128", f"--json={tmp_path / 'speed.json'}")
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "speed.json").read_text())
    assert "--suite=attention" in document["command"] and document["device"] and document["versions"]["jax"]
    rows = {(row["pass"], row["path"]): row for row in document["rows"]}
    for kind in ("forward", "training"):
        for path in ("dense (xla)", "streamed dense", "token", "block"):
            row = rows[kind, path]
            assert row["length"] == 128 and row["runs"] > 0 and row["temp_bytes"] > 0
            assert row["ratio"] == pytest.approx(rows[kind, "dense (xla)"]["seconds"] / row["seconds"])
    assert {(kind, path) for kind in ("index+select", "attend") for path in ("token", "block")} < set(rows)
    assert all(path in done.stdout for _, path in rows) and 0 < document["overlap"] <= 1


MISTAKES = (
    ((), "--suite is missing"),
    (("--suite=atention",), "should be one of <accelerator|attention|chips|coverage|decode|"),
    (("--suite=attention", "--lengths=2K"), "--lengths=2K: invalid literal"),
    (("--suite=attention", "--lengths=64"), "--lengths=64: 64 is not integer >= 128"),
)


def test_mistakes_are_one_line():
    results = run_binaries(*(["experiments.benchmark", *arguments] for arguments, _ in MISTAKES))
    for done, (arguments, message) in zip(results, MISTAKES, strict=True):
        assert done.returncode == 2, arguments
        assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_what_does_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(timing, "_free_bytes", lambda: 0)
    (row,) = timing.measure([timing.Program({"path": "x"}, lambda x: x @ x, (jnp.ones((8, 8)),))])
    assert row["path"] == "x" and row["runs"] == 0 and row["seconds"] is None
    assert row["note"].startswith("not run: needs")
