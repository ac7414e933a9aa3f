import itertools

import numpy as np
import pytest

from atlas.data import DataConfig, prepare, prepare_part, sources, tokens
from checked import UserError
from tests.atlas.data.corpora import write_jsonl

FILES, EACH = 5, 40
WINDOW = 16


@pytest.fixture(scope="module")
def madlad(tmp_path_factory):
    """Two languages of some files each, without splits; held-out ones are full within the second file."""
    root = tmp_path_factory.mktemp("madlad")
    for language, number in itertools.product(("en", "sw"), range(FILES)):
        texts = [f"{language}: document {i} of file {number}" * (1 + i % 3) for i in range(EACH)] + [""]
        write_jsonl(root / language / f"{language}_clean_{number:04}.jsonl.gz", texts)
    return str(root)


@pytest.fixture(autouse=True)
def small_held_out(monkeypatch):
    """Of worker processes it stays large, which changes nothing: what is full is decided where parts are joined."""
    for module in (sources, tokens):
        monkeypatch.setattr(module, "HELD_OUT_BYTES", 150)


def config(root, **fields):
    return DataConfig(**{"source": "madlad", "input": root, "window": WINDOW, **fields})


def rows(built, language, split):
    return np.asarray(built.windows(language, split))


def same(one, other):
    assert one.sizes == other.sizes and one.fingerprint == other.fingerprint
    for language, split in itertools.product(one.languages, sources.SPLITS):
        assert np.array_equal(rows(one, language, split), rows(other, language, split))


def test_splits_are_those_of_the_text(madlad, tmp_path):
    built, source = prepare(config(madlad), tmp_path), sources.open_source(config(madlad))
    for language, split in itertools.product(built.languages, sources.SPLITS):
        texts = list(filter(None, source.documents(language, split)))
        expected = np.concatenate(list(built.tokenizer.encode_documents(texts)))
        found = rows(built, language, split)
        stream = np.concatenate([found[0, :1], found[:, 1:].ravel()])[: len(expected)]
        assert np.array_equal(stream, expected[: len(stream)]) and len(stream) > len(expected) - WINDOW
        sizes = built.sizes[language][split]
        assert (sizes["documents"], sizes["bytes"]) == (len(texts), sum(len(text.encode()) for text in texts))
        assert sizes["tokens"] == len(expected)
    assert not (tmp_path / "tokens").exists()


def test_windows_are_the_same_whoever_makes_the_tokens(madlad, tmp_path, monkeypatch):
    alone = prepare(config(madlad), tmp_path / "alone")
    same(prepare(config(madlad), tmp_path / "workers", workers=2), alone)
    files = [prepare_part(config(madlad), tmp_path / "shards", number, 3) for number in range(3)]
    assert sum(files) == 2 * FILES and max(files) - min(files) <= 1
    monkeypatch.setattr(tokens, "tokenize", None)
    same(prepare(config(madlad), tmp_path / "shards"), alone)
    assert prepare_part(config(madlad), tmp_path / "shards", 0, 3) == 0


def counted(monkeypatch, last=None):
    """The parts that are tokenised from now on; the one after the last is interrupted."""
    tokenize, made = tokens.tokenize, []

    def count(part, *rest):
        if last is not None and len(made) == last:
            raise KeyboardInterrupt
        made.append(part.name)
        return tokenize(part, *rest)

    monkeypatch.setattr(tokens, "tokenize", count)
    return made


def test_an_interrupted_build_goes_on_with_its_file(madlad, tmp_path, monkeypatch):
    with monkeypatch.context() as cut, pytest.raises(KeyboardInterrupt):
        counted(cut, last=3)
        prepare(config(madlad), tmp_path / "cut")
    file = tmp_path / "cut/tokens/en/en_clean_0001.jsonl.gz.npz"
    file.write_bytes(file.read_bytes()[:-9])
    made = counted(monkeypatch)
    built = prepare(config(madlad), tmp_path / "cut")
    assert made[:3] == [f"en_clean_000{number}.jsonl.gz" for number in (1, 3, 4)] and len(made) == 3 + FILES
    same(built, prepare(config(madlad), tmp_path / "whole"))


def test_a_cap_reads_no_more_files_than_it_needs(madlad, tmp_path, monkeypatch):
    whole = prepare(config(madlad), tmp_path / "whole")
    made = counted(monkeypatch)
    capped = prepare(config(madlad, max_train_windows=7), tmp_path / "capped")
    assert len(made) == 4 + 2  # until the held-out splits are full
    for language in capped.languages:
        assert np.array_equal(rows(capped, language, "train"), rows(whole, language, "train")[:7])
        for split in sources.SPLITS[1:]:
            assert np.array_equal(rows(capped, language, split), rows(whole, language, split))
    made.clear()
    prepare_part(config(madlad, max_train_windows=7), tmp_path / "shards", 0, 2)
    prepare_part(config(madlad, max_train_windows=7), tmp_path / "shards", 1, 2)
    assert len(made) < 2 * FILES
    same(prepare(config(madlad, max_train_windows=7), tmp_path / "shards"), capped)


def test_a_bad_line_is_named_by_workers_too(tmp_path):
    for number in range(2):
        write_jsonl(tmp_path / f"text/en/clean_{number}.jsonl.gz", ["some text"] * 9)
    (tmp_path / "text/en/clean_1.jsonl.gz").write_bytes(b"plain text")
    with pytest.raises(UserError, match=r"clean_1\.jsonl\.gz is not a whole gzip file"):
        prepare(config(str(tmp_path / "text")), tmp_path / "corpus", workers=2)
