import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def plan(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_expand_writes_json(tmp_path):
    done = plan("expand", "--multiplier=4", f"--json={tmp_path / 'plan.json'}")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "plan.json").read_text())["rows"][0]
    assert round(row["params"], 2) == 1.40 and round(row["tokens"], 2) == 2.74
    assert "compute" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mixture", "--fit=nowhere", "--flops=1e18"), "no fit at"),
        (("allocate", "--flops=1e18", "--language=en", "--unique=en"), "'en' is not language:number"),
        (("crossover", "--params=2e9", "--language=fr"), "published crossover 'fr'"),
        (("next", "--fit=nowhere", "--language=en", "--params=1e9", "--tokens=1e10"), "no runs table at"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    done = plan(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
