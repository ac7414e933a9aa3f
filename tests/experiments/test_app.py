import dataclasses
import os
import runpy
import shlex
import subprocess
import sys

import pytest

from atlas.scaling import simulation
from atlas.training import RunConfig
from checked import describe, overlay
from experiments import _app
from tests.experiments.binaries import ROOT, run_binaries

TRAIN, QUICKSTART = "--config=configs/train.py", "--config=configs/quickstart.py"
MISTAKES = [
    (["train", TRAIN, "--config.model.atention=dense"], "did you mean 'model.attention'"),
    (["train", TRAIN, "--config.train.batch_size=many"], "train.batch_size='many' must be a whole number"),
    (["train", TRAIN, "--config.train.learning_rate=nan"], "train.learning_rate=nan must be a number above 0"),
    (["train", TRAIN, "--config.train.steps=('a',)"], "train.steps=('a',) must be a tuple, each a whole number"),
    (["train", TRAIN, "--config.name=../x"], "name='../x' must be text matching"),
    (["train", TRAIN, "--config.model=dense"], "model='dense' is a section"),
    (["train", TRAIN, "--config.model.remat"], "--config.model.remat lacks its value"),
    (["train", "--config", "configs/trian.py", "--workdir=x"], "did you mean 'configs/train.py'"),
    (["train", TRAIN], "--workdir is missing"),
    (["train", "--workdir=x"], "--config is missing"),
    (["train", "--config.seed=1"], "--config is missing; give --config=FILE.py before --config.seed"),
    (["sweep", TRAIN, "--list"], "get_sweep"),
    (["sweep", "--confg=configs/train.py"], "confg"),
    (["sweep", QUICKSTART, "--population=0", "--list"], "population"),
    (["sweep", QUICKSTART, "--config.model.d_ff=9", "--list"], "model.d_ff is varied by the sweep itself, in 25 of"),
    (["sweep", QUICKSTART, "--config.mesh.data=3", "--list"], "run monolingual-small: mesh"),
    (["sweep", QUICKSTART, "--config.model.k_base=99", "--list"], "model.k_base=99 must lie"),
    (["study", "--config=configs/smoke.py", "--config.train.steps=1.5", "--workdir=x"], "train.steps"),
    (["compare_attention", "--config=configs/attention_comparison.py", "--config.data.tasks=()"], "name the languages"),
    (["compile", TRAIN], "--topology is missing"),
    (["compile", TRAIN, "--topology=v5p"], "topology 'v5p' is not chip:count"),
    (["compile", TRAIN, "--topology=v9:2x2"], "unknown chip 'v9'"),
]
WITH_CONFIG = ["train", "sweep", "study", "compare_attention", "compile"]
WITHOUT = ["prepare", "fit", "plan"]


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A config file that counts how often it is executed."""
    directory = tmp_path_factory.mktemp("once")
    text = "import pathlib\nfrom configs.smoke import *\n"
    count = f"with pathlib.Path({str(directory / 'count')!r}).open('a') as file:\n    file.write('x')\n"
    (directory / "config.py").write_text(text + count)
    return directory


@pytest.fixture(scope="module")
def done(once):
    """All commands of this module, by their words."""
    commands = [
        *(arguments for arguments, _ in MISTAKES),
        *([name, "--help"] for name in (*WITH_CONFIG, *WITHOUT)),
        ["train", TRAIN, "--config.model.k_rule", "inverse", "--helpshort"],
        ["sweep", f"--config={once / 'config.py'}", "--list"],
        ["sweep", "--config", "configs/smoke.py", "--list"],
        ["sweep", "--config", "configs/smoke.py", "--config.model.k_rule=inverse", "--list"],
        ["sweep", "--config=configs/atlas_paper.py", "--list"],
        ["train", TRAIN, "--config.train.steps=(7,9)", "--config.mixture=uniform(a1,b1)", "--print_config"],
        ["study", QUICKSTART, "--config.train.steps=(2,)", "--population=25", "--estimate"],
    ]
    results = run_binaries(*([f"experiments.{name}", *arguments] for name, *arguments in commands))
    return {" ".join(command): result for command, result in zip(commands, results, strict=True)}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(done, arguments, message):
    result = done[" ".join(arguments)]
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", [*WITH_CONFIG, *WITHOUT])
def test_help_shows_the_flags_and_the_settings_of_the_config(done, name):
    result = done[f"{name} --help"]
    assert result.returncode == 0
    assert f"python -m experiments.{name}" in result.stdout
    assert "--workdir" in result.stdout or name in ("plan", "compile")
    if name in WITH_CONFIG:
        assert all(f"  --config.{line}\n" in result.stdout for line in describe(RunConfig()))
    if name == "prepare":
        assert "--synthetic_tokens: default 1000000 [bytes]" in result.stdout


@pytest.mark.parametrize("name", ["train", "plan"])
def test_binaries_end_quietly_once_nobody_reads_them(name):
    reader, writer = os.pipe()
    os.close(reader)
    call = [sys.executable, "-m", f"experiments.{name}", "--help"]
    result = subprocess.run(call, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (result.returncode, result.stderr) == (_app.EXIT_UNREAD, "")


def test_help_shows_the_values_of_the_file_and_of_the_user(done):
    result = done[f"train {TRAIN} --config.model.k_rule inverse --helpshort"]
    assert "--config.train.steps=(300,) [steps]: " in result.stdout
    assert "--config.model.k_rule='inverse': " in result.stdout


def test_listing_the_paper_counts_774_runs(done):
    result = done["sweep --config=configs/atlas_paper.py --list"]
    assert result.returncode == 0, result.stderr
    assert "774 runs, 6.93e+23 FLOPs" in result.stdout.splitlines()[-1]


def test_the_printed_config_is_flags_that_make_it_again(done):
    result = done[f"train {TRAIN} --config.train.steps=(7,9) --config.mixture=uniform(a1,b1) --print_config"]
    again = _app.Config()
    assert again.take([TRAIN, *shlex.split(result.stdout)]) == []
    made = overlay(runpy.run_path("configs/train.py")["get_config"](), {"train.steps": (7, 9)})
    assert again.base == dataclasses.replace(made, mixture="uniform(a1,b1)")


def test_an_estimate_counts_the_runs_of_every_shape(done):
    result = done[f"study {QUICKSTART} --config.train.steps=(2,) --population=25 --estimate"]
    *rows, total = result.stdout.splitlines()
    assert [row.split()[0] for row in rows] == ["runs", "5", "15", "5"]
    assert total.startswith("25 runs, ")


def test_config_files_are_executed_once(done, once):
    listed = done[f"sweep --config={once / 'config.py'} --list"]
    assert listed.stdout == done["sweep --config configs/smoke.py --list"].stdout
    assert (once / "count").read_text() == "x"


def test_an_override_of_the_base_makes_other_runs(done):
    plain, varied = (
        {line.split()[0] for line in done[f"sweep --config configs/smoke.py {flag}--list"].stdout.splitlines()[1:14]}
        for flag in ("", "--config.model.k_rule=inverse ")
    )
    assert len(plain) == len(varied) == 13
    assert not plain & varied


# What JAX tells of its cache, counted and printed at the end of the command that follows.
COUNTING = """
import atexit, runpy, sys
import jax
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("cache_hits")))
atexit.register(lambda: print(sum(hits)))
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__")
"""


@pytest.mark.thorough
def test_a_second_process_finds_the_programs_of_the_first(tmp_path):
    simulation.series(81, 0).to_csv(tmp_path / "runs.csv", index=False)
    fit = ["experiments.fit", f"--runs={tmp_path / 'runs.csv'}", "--law=chinchilla", f"--workdir={tmp_path}"]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}

    def hits():
        command = [sys.executable, "-c", COUNTING, *fit, "--nofigures"]
        environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
        return int(done.stdout.splitlines()[-1])

    assert hits() == 0
    kept = len(list((tmp_path / "cache" / "atlas" / "programs").iterdir()))
    assert kept > 0 and hits() == kept
