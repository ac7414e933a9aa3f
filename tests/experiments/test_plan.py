import json
import pathlib
import subprocess
import sys

import numpy as np
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
    assert found["bands"].startswith("none: fit.json is of") and "loss_low" not in found


def test_allocate_has_bands_where_the_fit_has_a_covariance(tmp_path):
    values = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}
    matrix = [[0.0] * 5 for _ in range(5)]
    matrix[1][1] = 0.05**2
    document = {
        "law": "chinchilla",
        "parameters": {name: {"value": value} for name, value in values.items()},
        "covariance": {
            "coordinates": [f"log {name}" for name in values],
            "matrix": matrix,
            "centre": {"N": 1e9, "D": 1e11},
            "freedom": 1e6,
        },
    }
    (tmp_path / "fit.json").write_text(json.dumps(document))
    done = plan("allocate", f"--fit={tmp_path}", "--flops=1e21", f"--json={tmp_path / 'plan.json'}")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "plan.json").read_text())["rows"][0]
    # log N* = log A / (alpha + beta) + …, and A alone is uncertain.
    assert row["params_high"] / row["params_low"] == pytest.approx(np.exp(2 * 1.645 * 0.05 / 0.72), rel=0.05)
    assert row["tokens_low"] < row["tokens"] < row["tokens_high"] and row["loss_low"] < row["loss"] < row["loss_high"]
    assert 0 < row["regret_high"] < 1e-3
    assert "over 1000 laws" in done.stdout


def test_crossover_from_runs(tmp_path):
    tokens = np.geomspace(1e9, 1e12, 20)
    columns = {"num_params": 2e9, "language": "es", "tokens.es": tokens}
    parts = [
        pd.DataFrame(columns | {"run": name, "initialize": parent, "loss": 0.8 + 0.5 * (tokens / 4e10) ** slope})
        for name, parent, slope in (("scratch", "", -0.3), ("continued", "unimax", -0.1))
    ]
    pd.concat(parts).to_csv(tmp_path / "runs.csv", index=False)
    done = plan("crossover", f"--runs={tmp_path / 'runs.csv'}", "--language=es", f"--json={tmp_path / 'plan.json'}")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "plan.json").read_text())["rows"][0]
    assert row["tokens"] == pytest.approx(4e10, rel=0.02) and row["low"] <= row["tokens"] <= row["high"]


def test_transfer_of_a_published_language(tmp_path):
    done = plan("transfer", "--language=es", f"--json={tmp_path / 'plan.json'}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    best = found["rows"][0]
    assert (best["source"], best["score"], best["measured"]) == ("pt", 0.5, True)
    assert len(found["rows"]) == 37 and sum(row["measured"] for row in found["rows"]) == 8
    assert 0.4 < found["skill_centred_r2"] < found["skill_r2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mixture", "--fit=nowhere", "--flops=1e18"), "no fit at"),
        (("crossover", "--params=2e9", "--language=fr"), "published crossover 'fr'"),
        (("next", "--fit=nowhere", "--language=en", "--params=1e9", "--tokens=1e10"), "no runs table at"),
    ],
)
def test_mistakes_are_one_line(arguments, message):
    done = plan(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
