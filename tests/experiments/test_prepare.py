import pytest

from atlas.data import load
from tests.atlas.data.corpora import write_corpus
from tests.experiments.binaries import run_binaries

MISTAKES = (
    (["--source=jsonl", "--workdir=a"], "data.input='' is missing"),
    ([], "--workdir is missing"),
    (["--workdir=b", "--languages=xx"], "synthetic language 'xx'"),
    (["--workdir=c", "stray"], "'stray'"),
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The directory of a corpus, and what its build, two more of it and the mistakes left."""
    root = tmp_path_factory.mktemp("prepare")
    text = write_corpus(root / "text", {"en": ["the first document"] * 9, "fr": ["le premier"] * 8})
    command = ["--source=jsonl", f"--input={text}", f"--workdir={root / 'corpus'}", "--window=8"]
    commands = (command, [*command, "--languages=en"], command, *(arguments for arguments, _ in MISTAKES))
    return root / "corpus", run_binaries(*(["experiments.prepare", *arguments] for arguments in commands))


def test_builds_a_corpus_and_prints_its_sizes(done):
    directory, (result, other, again, *_) = done
    assert result.returncode == 0, result.stderr
    built = load(directory)
    assert built.languages == ("en", "fr")
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line}
    assert rows["en"] == ["9", str(built.sizes["en"]["train"]["windows"]), str(built.unique_tokens["en"]), "162"]
    assert rows["total"][0] == "17"
    assert other.returncode == 2
    assert again.stdout == result.stdout


def test_mistakes_end_in_one_line_and_exit_code_2(done):
    for result, (_, words) in zip(done[1][3:], MISTAKES, strict=True):
        assert result.returncode == 2
        assert words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
