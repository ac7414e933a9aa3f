import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
COMMANDS = [" ".join(line.split()) for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
# Continuous integration runs the two long ones; capitals stand for the reader's own directories.
LONG = re.compile(r"quickstart\.py|[A-Z]{3,}")
SLOW = re.compile(r"study|benchmark|plan mixture")
SHORT = [command for command in COMMANDS if command.startswith("python -m experiments") and not LONG.search(command)]


def test_readme_has_commands_to_check():
    assert len(SHORT) >= 5


@pytest.mark.parametrize(
    "command",
    [pytest.param(command, marks=[pytest.mark.thorough] if SLOW.search(command) else []) for command in SHORT],
)
def test_readme_command_works(command, tmp_path):
    arguments = shlex.split(command.replace("/tmp/", f"{tmp_path}/"), comments=True)[1:]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def test_paths_that_the_readme_links_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
