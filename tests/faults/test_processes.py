"""Processes at once, interrupts and environments."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from atlas.training import RunConfig, finished, run_id
from checked import UserError, overlay
from checked.files import locked
from tests.compilers import needs
from tests.experiments.binaries import ROOT, run_binaries

STUDY = """
import os, signal
from atlas.training import RunConfig, Study
def get_config():
    return RunConfig(name="held")
def get_sweep(base):
"""


def test_a_run_is_held_by_one_process(tmp_path):
    path = tmp_path / "run" / ".lock"
    with locked(path, "run a"):
        with pytest.raises(UserError, match=rf"run a is held by process {os.getpid()} on \S+ since 2.*wait for it"):
            locked(path, "run a").__enter__()
        with locked(tmp_path / "other", "run b"):
            pass
    with locked(path, "run a"):
        pass


def test_what_a_dead_process_held_is_free(tmp_path):
    path = tmp_path / ".lock"
    program = "import os, sys; from checked.files import locked; import pathlib\n"
    program += "held = locked(pathlib.Path(sys.argv[1]), 'run a'); held.__enter__(); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT)
    assert done.returncode == -9 and f"on {os.uname().nodename} since" in path.read_text()
    with locked(path, "run a"):
        pass


def test_a_second_sweep_of_the_same_runs_names_the_first(tmp_path):
    """The run is held here; the binary's corpus and checks come before it and are not in the way."""
    changes = {"name": "held", "data.synthetic_tokens": 1000, "train.steps": (1,)}
    name = run_id(overlay(RunConfig(), changes))
    config = ["--config.data.synthetic_tokens=1000", "--config.train.steps=1"]
    (tmp_path / "c.py").write_text(STUDY + "    return Study('x', base, [{}])\n")
    with locked(tmp_path / "runs" / name / ".lock", f"run {name}"):
        command = ["experiments.sweep", f"--config={tmp_path / 'c.py'}", *config, f"--workdir={tmp_path}"]
        (done,) = run_binaries(command)
    assert done.returncode == 2, done.stderr
    assert f"run {name} is held by process {os.getpid()}" in done.stderr
    assert not (tmp_path / "runs" / name / finished.CONFIG).exists()


def binary(name: str, *arguments: str, path: str = "", **environment: str) -> subprocess.CompletedProcess:
    """A process of its own, as a person starts it."""
    own = os.environ | {"PYTHONPATH": f"{path}:{ROOT}"} | environment
    call = [sys.executable, "-m", f"experiments.{name}", *arguments]
    return subprocess.run(call, cwd=ROOT, env=own, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_modules_are_imported_is_one_word(tmp_path, number):
    (tmp_path / "absl.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\n")
    done = binary("plan", "expand", path=str(tmp_path))
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_an_interrupt_of_the_work_is_said_at_once_and_a_second_one_ends_it(tmp_path):
    once = STUDY + "    os.kill(os.getpid(), signal.SIGINT)\n"
    # Work that no exception stops, as a compilation is.
    twice = STUDY + "    while True:\n        try:\n            os.kill(os.getpid(), signal.SIGINT)\n"
    twice += "        except KeyboardInterrupt:\n            pass\n"
    (tmp_path / "once.py").write_text(once)
    (tmp_path / "twice.py").write_text(twice)
    commands = [["experiments.sweep", f"--config={tmp_path / f'{name}.py'}", "--list"] for name in ("once", "twice")]
    one, two = run_binaries(*commands)
    assert one.returncode == two.returncode == 130
    assert one.stderr.splitlines()[-1] == "interrupted; the same command continues where it stopped"
    assert "once more stops at once" in two.stderr and "Traceback" not in one.stderr + two.stderr


def apart(text: str) -> tuple[list[str], list[float]]:
    """The words of a text, and its numbers."""
    numbers = re.compile(r"(?<![\w.])-?\d+\.\d+")
    return numbers.sub("#", text).split(), [float(number) for number in numbers.findall(text)]


def train_and_fit(directory: pathlib.Path, **environment: str) -> tuple[list[str], list[float]]:
    fit = ["experiments.fit", "--runs=experiments/results/quickstart/runs.csv", f"--workdir={directory / 'fit'}"]
    trained, fitted = run_binaries(["tests.faults.worker", str(directory / str(environment))], fit, **environment)
    assert (trained.returncode, fitted.returncode) == (0, 0), trained.stderr + fitted.stderr
    return apart(fitted.stdout)


@pytest.mark.thorough
def test_settings_of_jax_in_the_environment_change_nothing(tmp_path):
    words, numbers = train_and_fit(tmp_path)
    for setting in ({"JAX_NUMPY_RANK_PROMOTION": "raise"}, {"JAX_ENABLE_X64": "1"}, {"JAX_DEBUG_NANS": "1"}):
        others, values = train_and_fit(tmp_path, **setting)
        assert others == words, setting
        # What is computed at 64 bits by default rounds otherwise.
        np.testing.assert_allclose(values, numbers, rtol=1e-6, err_msg=str(setting))


@pytest.mark.thorough
def test_a_platform_that_is_not_here_is_one_line(tmp_path):
    done = binary("train", "--config=configs/train.py", f"--workdir={tmp_path}", JAX_PLATFORMS="cuda")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: Unable to initialize backend 'cuda'")
    assert "Traceback" not in done.stderr


@pytest.mark.thorough
@needs("libtpu")
def test_a_compiler_of_tpus_beside_a_cpu_is_in_nobodys_way(tmp_path):
    changes = ["--config.train.steps=(2,)", "--config.model.layers=1", "--config.data.synthetic_tokens=20000"]
    done = binary("train", "--config=configs/train.py", *changes, f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.thorough
def test_tfds_leaves_nothing_in_the_temporary_directory(tmp_path):
    (done,) = run_binaries(
        ["experiments.prepare", "--synthetic_tokens=1000", f"--workdir={tmp_path / 'work'}"], TMPDIR=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["work"]
