from atlas.data import load
from tests.atlas.data.corpora import write_corpus
from tests.experiments.binaries import run_binaries


def test_builds_a_corpus_and_prints_its_sizes(tmp_path):
    root = write_corpus(tmp_path / "text", {"en": ["the first document"] * 9, "fr": ["le premier"] * 8})
    flags = ["--source=jsonl", f"--input={root}", f"--workdir={tmp_path / 'corpus'}", "--window=8"]
    command = ["experiments.prepare", *flags]
    result, other, again = run_binaries(command, [*command, "--languages=en"], command)
    assert result.returncode == 0, result.stderr
    built = load(tmp_path / "corpus")
    assert built.languages == ("en", "fr")
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line}
    assert rows["en"] == ["9", str(built.sizes["en"]["train"]["windows"]), str(built.unique_tokens["en"]), "162"]
    assert rows["total"][0] == "17"
    assert other.returncode == 2
    assert again.stdout == result.stdout


def test_mistakes_end_in_one_line_and_exit_code_2(tmp_path):
    mistakes = (
        (["--source=jsonl", f"--workdir={tmp_path / 'a'}"], "data.input='' is missing"),
        ([], "--workdir is missing"),
        ([f"--workdir={tmp_path / 'b'}", "--languages=xx"], "synthetic language 'xx'"),
        ([f"--workdir={tmp_path / 'c'}", "stray"], "'stray'"),
    )
    results = run_binaries(*(["experiments.prepare", *flags] for flags, _ in mistakes))
    for result, (_, words) in zip(results, mistakes, strict=True):
        assert result.returncode == 2
        assert words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
