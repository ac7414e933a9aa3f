import dataclasses
import gzip
import itertools
import json
import os
import shutil

import fsspec
import numpy as np
import pytest
import tensorflow_datasets as tfds

from atlas.data import fingerprint, sources
from atlas.data.config import DataConfig
from checked import UserError
from tests.atlas.data.corpora import write_corpus, write_jsonl

TEXTS = [f"document {i}" for i in range(400)]


def documents(source, language="en"):
    return {split: list(source.documents(language, split)) for split in sources.SPLITS}


def test_jsonl_reads_its_splits(tmp_path):
    write_corpus(tmp_path, {"en": ["one", "two"], "fr": ["trois"]})
    (tmp_path / "notes").mkdir()  # a directory without text is no language
    (tmp_path / "manifest.csv").touch()
    source = sources.open_source(DataConfig(source="jsonl", input=str(tmp_path)))
    assert source.languages == ("en", "fr")
    assert documents(source) == {"train": ["one", "two"], "validation": ["one"], "test": ["one"]}
    assert sum(part.work for part in source.parts("en")) == source.work["en"] > 0


def test_lone_surrogates_and_blank_lines_do_not_stop_a_build(tmp_path):
    write_corpus(tmp_path, {"en": ["x"]})
    with gzip.open(tmp_path / "en/train.jsonl.gz", "wt") as file:
        file.write('{"text": "a\\ud800b"}\n\n{"text": "é"}\n')
    source = sources.open_source(DataConfig(source="jsonl", input=str(tmp_path)))
    assert list(source.documents("en", "train")) == ["a?b", "é"]


@pytest.mark.parametrize("name", ["clean_0000.jsonl.gz", "sw_clean_0000.jsonl.gz"])
def test_madlad_from_any_file_system(name):
    root = f"memory://madlad-{name}"
    lines = "".join(json.dumps({"text": f"line {i}\\nbreak"}) + "\n" for i in range(200))
    fs = fsspec.filesystem("memory")
    fs.pipe(f"{root}/sw/{name}", gzip.compress(lines.encode()))
    fs.pipe(f"{root}/sw/{name.replace('clean', 'noisy')}", gzip.compress(b"{}"))
    source = sources.open_source(DataConfig(source="madlad", input=root))
    assert source.languages == ("sw",)
    splits = documents(source, "sw")
    everything = [text for texts in splits.values() for text in texts]
    assert sorted(everything) == sorted(f"line {i}\nbreak" for i in range(200))


def test_text_folders(tmp_path):
    (tmp_path / "en").mkdir()
    for i, text in enumerate(TEXTS):
        (tmp_path / "en" / f"{i:03}.txt").write_text(text)
    splits = documents(sources.open_source(DataConfig(source="text", input=str(tmp_path))))
    assert sorted(itertools.chain(*splits.values())) == sorted(TEXTS)


def test_hashing_splits_off_its_shares_and_keeps_copies_together():
    splits = {split: list(sources.split_by_hash(TEXTS * 2, split)) for split in sources.SPLITS}
    sets = [set(texts) for texts in splits.values()]
    assert sum(map(len, sets)) == len(set.union(*sets)) == len(TEXTS)
    assert len(splits["test"]) / 800 == pytest.approx(0.2, abs=0.05)
    assert len(splits["validation"]) / 800 == pytest.approx(0.05, abs=0.03)


def test_held_out_splits_end_when_they_are_full(monkeypatch):
    monkeypatch.setattr(sources, "HELD_OUT_BYTES", 100)
    splits = {split: list(sources.split_by_hash(TEXTS, split)) for split in sources.SPLITS}
    assert 100 <= sum(map(len, splits["test"])) < 120
    assert sorted(itertools.chain(*splits.values())) == sorted(TEXTS)


def test_only_missing_splits_are_split_off():
    train = list(sources.split_by_hash(TEXTS, "train", ["validation"]))
    assert 0.9 < len(train) / len(TEXTS) < 1


class TinyText(tfds.core.GeneratorBasedBuilder):
    """A text data set with a test split of its own and no validation."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"body": tfds.features.Text(), "length": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, download_manager):
        return {"train": self._generate_examples(TEXTS), "test": self._generate_examples(["held out"])}

    def _generate_examples(self, texts):
        for text in texts:
            yield text, {"body": text, "length": len(text)}


def test_tfds(tmp_path):
    TinyText(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    config = DataConfig(source="tfds", input=f"{tmp_path}/{{language}}/1.0.0", languages=("tiny_text",))
    splits = documents(sources.open_source(config), "tiny_text")
    assert splits["test"] == ["held out"]
    assert sorted(splits["train"] + splits["validation"]) == sorted(TEXTS)
    assert 0 < len(splits["validation"]) < 50


def test_tfds_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    config = DataConfig(source="tfds", input="tiny_text", languages=("en",))
    monkeypatch.setattr(tfds, "builder", lambda name: {"tiny_text": TinyText}[name](data_dir=tmp_path))
    assert documents(sources.open_source(config))["test"] == ["held out"]
    assert next((tmp_path / "tiny_text").rglob("*.array_record*"))


@pytest.mark.parametrize(("source", "name"), [("jsonl", "train.jsonl.gz"), ("text", "a.txt")])
def test_fingerprint_follows_content_not_place_or_time(tmp_path, source, name):
    def write(root, text):
        path = tmp_path / root / "en" / name
        write_corpus(tmp_path / root, {"en": ["same"]})
        path.write_bytes(gzip.compress(text, mtime=0) if name.endswith("gz") else text)
        os.utime(path, (1, len(root)))
        return fingerprint(DataConfig(source=source, input=str(tmp_path / root)))

    first = write("one", b'{"text": "same"}')
    assert write("elsewhere", b'{"text": "same"}') == first
    assert write("two", b'{"text": "sand"}') != first


def test_fingerprint_is_of_what_determines_the_tokens(tmp_path):
    base = DataConfig(languages=("a1", "b1"))
    same = [{"vocab_size": 300}, {"tokenizer_temperature": 3.0}]  # of no tokenizer that is trained
    other = [{"window": 128}, {"max_train_windows": 9}, {"synthetic_tokens": 9}, {"seed": 1}, {"tasks": ("needle",)}]
    other += [{"languages": ("b1", "a1")}, {"tokenizer": "bpe"}, {"tokenizer": "bpe", "vocab_size": 300}]
    prints = [fingerprint(dataclasses.replace(base, **change)) for change in ({}, *other)]
    assert len(set(prints)) == len(prints)
    assert {fingerprint(dataclasses.replace(base, **change)) for change in same} == {prints[0]}


def test_fingerprint_of_a_tfds_set_is_its_version_wherever_it_lies(tmp_path):
    TinyText(data_dir=tmp_path / "a", file_format="array_record").download_and_prepare()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    places = [f"{tmp_path}/{place}/{{language}}/1.0.0" for place in "ab"]
    configs = [DataConfig(source="tfds", input=place, languages=("tiny_text",)) for place in places]
    assert fingerprint(configs[0]) == fingerprint(configs[1])


def _bad_jsonl(tmp_path, content):
    write_corpus(tmp_path, {"en": ["x"]})
    (tmp_path / "en/train.jsonl.gz").write_bytes(content)
    return DataConfig(source="jsonl", input=str(tmp_path))


def _lines(*lines):
    return gzip.compress("\n".join(lines).encode(), mtime=0)  # the same name in every process of the tests


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "plain"}\n', ["train.jsonl.gz", "not a whole gzip"]),
        (_lines(*['{"text": "long"}'] * 9)[:-9], ["train.jsonl.gz", "not a whole gzip"]),
        (b"", ["train.jsonl.gz", "empty"]),
        (_lines(), ["train.jsonl.gz", "empty"]),
        (_lines('{"text": "a"}', "{not json"), ["train.jsonl.gz line 2", "not JSON"]),
        (_lines('{"text": "a"}', '{"body": "b"}'), ["train.jsonl.gz line 2", "'text'"]),
        (_lines('{"text": 5}'), ["line 1", "'text'"]),
        (_lines('["text"]'), ["line 1", "'text'"]),
        (gzip.compress(b"\xff\xfe\n", mtime=0), ["line 1", "not JSON"]),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path, content, words):
    source = sources.open_source(_bad_jsonl(tmp_path, content))
    with pytest.raises(UserError) as error:
        list(source.documents("en", "train"))
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_bad_places_are_named(tmp_path):
    def message(**fields):
        with pytest.raises(UserError) as error:
            config = DataConfig(**fields)
            list(sources.open_source(config).documents("en", "validation"))
        assert "\n" not in str(error.value)
        return str(error.value)

    write_corpus(tmp_path / "full", {"en": ["x"], "fr": ["y"]})
    write_jsonl(tmp_path / "part/en/train.jsonl.gz", ["x"])
    (tmp_path / "empty").mkdir()
    assert "did you mean 'jsonl'" in message(source="jsonnl", input="x")
    assert "data.input='' is missing" in message(source="jsonl")
    assert "not a directory" in message(source="jsonl", input=str(tmp_path / "none"))
    assert "holds no <language>/" in message(source="jsonl", input=str(tmp_path / "empty"))
    full = str(tmp_path / "full")
    assert "did you mean 'fr'" in message(source="jsonl", input=full, languages=("frr",))
    assert "holds no en/*.txt" in message(source="text", input=full, languages=("en",))
    assert "lacks validation.jsonl.gz" in message(source="jsonl", input=str(tmp_path / "part"))
    assert "cannot be opened" in message(source="jsonl", input="nothing://place")
    assert "name them" in message(source="tfds", input="lm1b")
    assert "{language}" in message(source="tfds", input="lm1b", languages=("en", "fr"))
    assert "'no_such_set'" in message(source="tfds", input="no_such_set", languages=("en",))
    latin = tmp_path / "latin/en"
    latin.mkdir(parents=True)
    (latin / "a.txt").write_bytes("é".encode("latin-1"))
    assert "not UTF-8" in message(source="text", input=str(tmp_path / "latin"))
