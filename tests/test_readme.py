import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from tests.experiments.binaries import run_binaries

ROOT = pathlib.Path(__file__).parents[1]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [" ".join(line.split()) for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
# Continuous integration runs the two long ones; capitals stand for the reader's own directories.
LONG = re.compile(r"quickstart\.py|[A-Z]{3,}")
SLOW = re.compile(r"study|benchmark|plan mixture")
SHORT = [command for command in COMMANDS if command.startswith("python -m experiments") and not LONG.search(command)]


def test_readme_has_commands_to_check():
    assert len(SHORT) >= 5


# What makes a command of several minutes, or of a minute, one of seconds; its own words stay as they are.
SMALLER = {"train": ["--config.data.synthetic_tokens=20000", "--config.model.layers=1", "--config.model.d_model=32"]}


def arguments_of(command, directory):
    return shlex.split(command.replace("/tmp/", f"{directory}/"), comments=True)[1:]


def test_readme_commands_work(tmp_path):
    quick = [command for command in SHORT if not SLOW.search(command)]
    commands = [arguments_of(command, tmp_path)[1:] for command in quick]
    results = run_binaries(*([*words, *SMALLER.get(words[0].rpartition(".")[2], [])] for words in commands))
    assert {command: done.stderr for command, done in zip(quick, results, strict=True) if done.returncode} == {}


@pytest.mark.thorough
@pytest.mark.parametrize("command", list(filter(SLOW.search, SHORT)))
def test_slow_readme_commands_work(command, tmp_path):
    call = [sys.executable, *arguments_of(command, tmp_path)]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_paths_that_the_readme_links_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
