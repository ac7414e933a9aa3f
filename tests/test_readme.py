import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from tests.experiments.binaries import run_binaries

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "experiments" / "README.md"]
BLOCKS = [block for page in PAGES for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)]
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


@pytest.mark.thorough
def test_the_five_lines_print_what_the_readme_shows():
    code, printed = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGES[0].read_text(), re.DOTALL).groups()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, printed), done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_that_a_page_links_exist(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert links
    assert [link for link in links if not (page.parent / link).exists()] == []
