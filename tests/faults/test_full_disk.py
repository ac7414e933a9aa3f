"""Disks that fill up: one line, and after more room the same command ends as if nothing had been."""

import os
import pathlib
import subprocess

import pytest

from tests.experiments.binaries import run_binaries


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own in memory; its size can be changed."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: str) -> None:
        """Makes it, or gives it another size."""
        again = ["-o", f"remount,size={size}"] if os.path.ismount(place) else ["-o", f"size={size}"]
        subprocess.run(["mount", "-t", "tmpfs", *again, "tmpfs", str(place)], check=True, capture_output=True)

    try:
        mount("16k")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    yield place, mount
    subprocess.run(["umount", str(place)], check=True)


def only_error(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in stderr, stderr[-3000:]
    return lines[0]


@pytest.mark.thorough
def test_training_ends_in_one_line_and_goes_on_with_more_room(small_disk, tmp_path):
    place, mount = small_disk
    command = ["tests.faults.worker", str(place / "work")]
    (whole,) = run_binaries([command[0], str(tmp_path / "elsewhere")])
    codes = []
    for size in ("16k", "48k", "120k", "200k", "300k", "400k", "600k"):
        mount(size)
        (done,) = run_binaries(command)
        codes.append(done.returncode)
        if done.returncode:
            assert done.returncode == 2 and "No space left on device" in only_error(done.stderr)
    assert codes.count(2) >= 3
    mount("100m")
    (done,) = run_binaries(command)
    assert (done.returncode, done.stdout) == (0, whole.stdout), done.stderr


@pytest.mark.thorough
def test_results_that_have_no_room_are_one_line(small_disk):
    place, _ = small_disk
    (place / "fill").write_bytes(bytes(16384))
    runs = pathlib.Path("experiments/results/quickstart/runs.csv")
    results = run_binaries(
        ["experiments.plan", "expand", f"--json={place / 'plan.json'}"],
        ["experiments.prepare", "--synthetic_tokens=1000", f"--workdir={place / 'corpus'}"],
        ["experiments.study", f"--runs={runs}", f"--workdir={place / 'study'}"],
    )
    for done in results:
        assert done.returncode == 2 and "No space left on device" in only_error(done.stderr)
    assert [path.name for path in place.iterdir() if path.is_file()] == ["fill"]


@pytest.mark.thorough
def test_read_only_disks_are_said_before_the_work(small_disk):
    place, _ = small_disk
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    runs = "--runs=experiments/results/quickstart/runs.csv"
    workdir = f"--workdir={place / 'work'}"
    results = run_binaries(
        ["experiments.train", "--config=configs/train.py", workdir],
        ["experiments.study", runs, workdir],
        ["experiments.fit", runs, workdir],
        ["experiments.prepare", workdir],
        ["experiments.plan", "expand", f"--json={place / 'plan.json'}"],
    )
    for done in results:
        assert done.returncode == 2 and "Read-only file system" in only_error(done.stderr)
