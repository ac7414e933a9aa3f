"""Thirty processes killed at random moments: of one run, of a population, of a mesh of eight devices."""

import json
import pathlib
import random

import pytest

from atlas.training import finished, metrics, run_id
from checked.files import read_sealed
from tests.atlas.training.worker import Changes, config_of, run_worker

KILLS = 10  # a case
# One case: the runs that train together, and the host devices that they have.
CASES: dict[str, tuple[Changes, int]] = {
    "run": ({}, 1),
    "population": ([{"seed": seed, "mixture": mixture} for seed, mixture in enumerate(("a1", "uniform(*)"))], 1),
    "mesh": ({"model.attention": "gated", "mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}, 8),
}


def outcome(workdir: pathlib.Path, changes: Changes) -> dict:
    """What the runs have left, but for the time and the order of lines."""
    found = {}
    for member in changes if isinstance(changes, list) else [changes]:
        directory = workdir / "runs" / run_id(config_of(member))
        records = metrics.read(directory / finished.METRICS)
        assert finished.is_done(directory)
        found[directory.name] = {
            "params": read_sealed(directory / finished.DONE, "", "")["params_sha256"],
            "metrics": sorted(json.dumps({k: v for k, v in r.items() if k not in ("time", "speed")}) for r in records),
            "evaluations": sorted(map(json.dumps, metrics.read(directory / finished.EVALUATIONS))),
        }
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES)
def test_whatever_is_killed_ends_with_the_same_bits(tmp_path, case):
    changes, devices = CASES[case]
    moments, kills = random.Random(case), 0
    (first,) = run_worker(tmp_path / "whole", changes, 0, devices=devices)
    assert first.returncode == 0, first.stderr
    whole = outcome(tmp_path / "whole", changes)
    while kills < KILLS:
        workdir = tmp_path / f"killed-{kills}"
        deaths = [moments.randrange(5) + moments.uniform(0.01, 0.6) for _ in range(min(4, KILLS - kills))]
        *killed, last = run_worker(workdir, changes, *deaths, 0, devices=devices)
        assert last.returncode == 0, last.stderr
        assert {done.returncode for done in killed} <= {-9, 0}
        kills += sum(done.returncode == -9 for done in killed)
        assert outcome(workdir, changes) == whole
