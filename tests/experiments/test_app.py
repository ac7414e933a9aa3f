import subprocess
import sys

import pytest


def run_binary(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["experiments.train", "--config=configs/train.py", "--config.model.atention=dense"],
            "did you mean 'attention'",
        ),
        (["experiments.train", "--config=configs/train.py", "--config.train.batch_size=many"], "batch_size"),
        (
            ["experiments.train", "--config=configs/trian.py", "--workdir=x"],
            "did you mean 'configs/train.py'",
        ),
        (["experiments.train", "--config=configs/train.py"], "--workdir is missing"),
        (["experiments.train", "--workdir=x"], "--config is missing"),
        (["experiments.sweep", "--config=configs/train.py", "--list"], "get_sweep"),
        (["experiments.sweep", "--confg=configs/train.py"], "confg"),
        (["experiments.study", "--config=configs/smoke.py", "--config.seed=1.5", "--workdir=x"], "seed"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(arguments, message):
    done = run_binary(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["study", "prepare", "train", "sweep", "fit", "plan", "compare_attention"])
def test_help_shows_the_flags(name):
    done = run_binary(f"experiments.{name}", "--help")
    assert done.returncode == 0
    assert f"python -m experiments.{name}" in done.stdout
    assert "--workdir" in done.stdout or name == "plan"


def test_listing_the_paper_counts_774_runs():
    done = run_binary("experiments.sweep", "--config=configs/atlas_paper.py", "--list")
    assert done.returncode == 0
    assert done.stdout.rstrip().endswith("774 runs")
