import json

from tests.experiments.binaries import run_binaries

MISTAKES = (
    (("mixture", "--fit=nowhere", "--flops=1e18"), "no fit at"),
    (("allocate", "--flops=1e18", "--language=en", "--unique=en"), "'en' is not name:number"),
    (("allocate", "--flops=nan", "--language=en"), "--flops must be a positive number, got nan"),
    (
        ("next", "--fit=nowhere", "--language=en", "--params=1e9", "--tokens=1e10", "--mixture=en:inf"),
        "'inf' is not a finite",
    ),
    (("next", "--fit=nowhere", "--language=en", "--params=1e9"), "--tokens is missing"),
    (("predict", "--fit=nowhere", "--at=X:nan"), "--at: 'nan' is not a finite number"),
    (("predict", "--fit=nowhere", "--mixture=en:0,fr:0"), "--mixture: every number is 0"),
    (("predict", "--fit=nowhere", "--unique=en:1,en:2"), "--unique names 'en' twice"),
    (("expand", "--multiplier=2,nan"), "--multiplier: 'nan' is not a finite number"),
    (("mixture", "--fit=nowhere", "--flops=1e18", "--tokens=1e9"), "--tokens does not apply to plan mixture"),
    (("crossover", "--params=2e9", "--language=fr"), "published crossover 'fr'"),
    (("next", "--fit=nowhere", "--language=en", "--params=1e9", "--tokens=1e10"), "no fit at"),
)


def test_plans_write_json_and_mistakes_are_one_line(tmp_path):
    commands = [("expand", "--multiplier=4", f"--json={tmp_path / 'plan.json'}"), *(mistake for mistake, _ in MISTAKES)]
    done, *refused = run_binaries(*(["experiments.plan", *command] for command in commands))
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "plan.json").read_text())["rows"][0]
    assert round(row["params"], 2) == 1.40 and round(row["tokens"], 2) == 2.74
    assert "compute" in done.stdout
    for result, (arguments, message) in zip(refused, MISTAKES, strict=True):
        assert result.returncode == 2, arguments
        assert message in result.stderr and len(result.stderr.strip().splitlines()) == 1
