import pytest

from experiments.benchmarks import fit


@pytest.fixture
def quick(monkeypatch):
    for name, value in {"_ROUNDS": 1, "_RESAMPLES": 64, "_PEER_RESAMPLES": 4, "_COLD_ROUNDS": 1}.items():
        monkeypatch.setattr(fit, name, value)


def test_both_programs_fit_the_same_240_runs_as_well(quick):
    rows, facts = fit.run()
    by = {(row["task"], row["path"]): row for row in rows}
    assert facts["rows"] == 240 and "SciPy" in facts["peer"]
    assert by["fit", "atlas"]["objective"] <= by["fit", "scipy"]["objective"] * (1 + 1e-6)
    assert by["fit", "atlas"]["compile_seconds"] > 0
    for task in ("fit", "4000 resamples"):
        ours, theirs = by[task, "atlas"], by[task, "scipy"]
        assert ours["ratio"] == pytest.approx(theirs["cpu_seconds"] / ours["cpu_seconds"]) and theirs["ratio"] == 1.0
    first, second = (by[f"{name} process", "experiments.fit"] for name in ("first", "second"))
    assert first["cpu_seconds"] > 0 and second["cpu_seconds"] > 0 and first["ratio"] is None
