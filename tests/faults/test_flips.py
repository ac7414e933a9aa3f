"""Single bits flipped in every file of a workdir: detected in one line, harmless, or fallen back from."""

import pathlib
import random
import shutil
from collections.abc import Callable

import pytest

from tests.experiments.binaries import run_binaries

Damage = Callable[[pathlib.Path], None]  # of a workdir

FLIPS = 50  # of a finished workdir, and as many of one that was killed on its way


def flip(file: pathlib.Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position // 8] ^= 1 << position % 8
    file.write_bytes(content)


def cut(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def lengthen(file: pathlib.Path) -> None:
    with file.open("a") as lines:
        lines.write("[1]\n")


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """A workdir of a run killed after its first branch, one of the same run at its end, and what that is."""
    root = tmp_path_factory.mktemp("flips")
    command = ["tests.faults.worker"]
    dying = ["DIE_AFTER_SAVES=5", *command, str(root / "killed")]
    killed, whole = run_binaries(dying, [*command, str(root / "finished")])
    assert killed.returncode == -9 and whole.returncode == 0, killed.stderr + whole.stderr
    return root, whole.stdout


def files_of(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Names of all files that hold something."""
    paths = (path for path in workdir.rglob("*") if path.is_file() and path.stat().st_size)
    return sorted(path.relative_to(workdir) for path in paths)


def outcomes(workdir: pathlib.Path, whole: str, damages: dict[str, Damage], scratch: pathlib.Path) -> dict[str, int]:
    """Damages a copy of the workdir in each way and continues it: how often what came of it was detected, or whole."""
    for number, damage in enumerate(damages.values()):
        shutil.copytree(workdir, scratch / str(number))
        damage(scratch / str(number))
    results = run_binaries(*(["tests.faults.worker", str(scratch / str(number))] for number in range(len(damages))))
    for what, done in zip(damages, results, strict=True):
        silent = done.returncode == 0 and done.stdout != whole
        assert not silent and done.returncode in (0, 2) and "Traceback" not in done.stderr, what + done.stderr[-3000:]
        assert done.returncode == 0 or done.stderr.count("error: ") == 1, what + done.stderr[-3000:]
    detected = sum(done.returncode == 2 for done in results)
    return {"detected": detected, "whole": len(results) - detected}


@pytest.mark.thorough
@pytest.mark.parametrize("state", ["killed", "finished"])
def test_no_flipped_bit_is_silent(workdirs, tmp_path, state):
    root, whole = workdirs
    choice, files = random.Random(state), files_of(root / state)
    damages: dict[str, Damage] = {}
    # Every file once, and the rest of the flips wherever.
    for file in files + choice.choices(files, k=max(0, FLIPS - len(files))):
        bit = choice.randrange(8 * (root / state / file).stat().st_size)
        damages[f"bit {bit} of {file}: "] = lambda workdir, file=file, bit=bit: flip(workdir / file, bit)
    counts = outcomes(root / state, whole, damages, tmp_path)
    print(f"{state}: {counts}, flips in {len(files)} files")
    assert min(counts.values()) > 0


@pytest.mark.thorough
@pytest.mark.parametrize("state", ["killed", "finished"])
def test_no_cut_and_no_foreign_line_is_silent(workdirs, tmp_path, state):
    root, whole = workdirs
    texts = [file for file in files_of(root / state) if file.suffix in (".json", ".jsonl")]
    cuts = {f"half of {file}: ": lambda workdir, file=file: cut(workdir / file) for file in texts}
    lines = {f"a line more in {file}: ": lambda workdir, file=file: lengthen(workdir / file) for file in texts}
    counts = outcomes(root / state, whole, cuts | lines, tmp_path)
    print(f"{state}: {counts} of {2 * len(texts)}")
    assert counts["detected"] > 0
