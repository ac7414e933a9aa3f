import json
import pathlib
import subprocess
import sys

import pandas as pd
import pytest

ROOT = pathlib.Path(__file__).parents[2]
LANGUAGES = ("a", "b")


def plan(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_expand_writes_json(tmp_path):
    done = plan("expand", "--multiplier=4", f"--json={tmp_path / 'plan.json'}")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "plan.json").read_text())["rows"][0]
    assert round(row["params"], 2) == 1.40 and round(row["tokens"], 2) == 2.74
    assert "compute" in done.stdout


def test_mixture_from_a_fit(tmp_path):
    values = {"E": 0.7, "A": 500.0, "alpha": 0.38, "B": 300.0, "beta": 0.3, "lambda": 0.1}
    parameters = {f"{name}[{lang}]": {"value": value} for name, value in values.items() for lang in LANGUAGES}
    parameters |= {"tau[a<-b]": {"value": 0.2}, "tau[b<-a]": {"value": 0.2}, "phi": {"value": 0.0}}
    (tmp_path / "fit.json").write_text(json.dumps({"parameters": parameters}))
    shares = ((1e9, 0.0), (0.0, 1e9), (5e8, 5e8))
    rows = [
        {"run": i, "num_params": 1e8, "language": lang, "loss": 2.0, "tokens.a": a, "tokens.b": b}
        for i, (a, b) in enumerate(shares)
        for lang, seen in (("a", a), ("b", b))
        if seen
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv", index=False)
    done = plan("mixture", f"--fit={tmp_path}", "--flops=1e18", f"--json={tmp_path / 'plan.json'}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mixture", "--fit=nowhere", "--flops=1e18"), "no fit at"),
        (("crossover", "--params=2e9", "--language=fr"), "published crossover 'fr'"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    done = plan(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
