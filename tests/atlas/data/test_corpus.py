import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers import models as backends

from atlas.data import DataConfig, corpus, load, prepare, tokenizers, windows
from atlas.data.batches import Sampler
from checked import UserError
from tests.atlas.data.corpora import write_corpus

TEXTS = {"en": ["the first document", "the second one"] * 20, "fr": ["un document", "çà et là"] * 30}
SYNTHETIC = DataConfig(window=32, synthetic_tokens=20_000)


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    return str(write_corpus(tmp_path_factory.mktemp("jsonl"), TEXTS))


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    return prepare(SYNTHETIC, tmp_path_factory.mktemp("synthetic"))


def config(jsonl, **fields):
    return DataConfig(**{"source": "jsonl", "input": jsonl, "window": 16, **fields})


def stream(built, language, split):
    """The tokens of a split, put together from its windows."""
    rows = built.windows(language, split)[np.arange(built.sizes[language][split]["windows"])]
    return np.concatenate([rows[0, :1], rows[:, 1:].ravel()])


def test_windows_hold_the_documents_and_their_separators(jsonl, tmp_path):
    built = prepare(config(jsonl), tmp_path)
    for language, texts in TEXTS.items():
        expected = [token for text in texts for token in (*text.encode(), 256)]
        got = stream(built, language, "train")
        assert got.tolist() == expected[: len(got)]
        assert 0 <= len(expected) - len(got) < 16
        held_out = stream(built, language, "validation")
        text = texts[0].encode()
        assert held_out.tolist() == [*text, 256] + [257] * (len(held_out) - len(text) - 1)


def test_sizes(jsonl, tmp_path):
    built = prepare(config(jsonl), tmp_path)
    assert built.languages == ("en", "fr")
    assert built.sizes["fr"]["train"]["documents"] == 60
    assert built.num_bytes["fr"] == 30 * (len(b"un document") + len("çà et là".encode()))
    assert built.sizes["fr"]["train"]["windows"] == (built.num_bytes["fr"] + 60 - 1) // 16
    assert built.unique_tokens["fr"] == built.sizes["fr"]["train"]["windows"] * 16
    assert built.sizes["en"]["test"]["windows"] == 2
    assert built.relatedness is None


def word_pieces():
    backend = Tokenizer(backends.WordPiece({"[UNK]": 0, "le": 1, "##s": 2, "été": 3}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    return backend


def byte_fallback(*characters, **options):
    pieces = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *characters]
    ids = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(backends.BPE(ids, [], unk_token="<unk>", byte_fallback=True, **options))
    backend.normalizer = normalizers.Replace(" ", "▁")
    return backend


def suffixed():
    ids = {piece: i for i, piece in enumerate(["<unk>", "l", "e", "é", "t", "s</w>", "e</w>", "é</w>"])}
    backend = Tokenizer(backends.BPE(ids, [], unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return backend


def composing():
    backend = Tokenizer.from_str(tokenizers.train("bpe", 256, ["a"])._json)
    backend.normalizer = normalizers.NFC()
    return backend


ALTERING = {
    "word pieces": word_pieces,
    "a space by its mark's bytes": byte_fallback,
    "suffix": suffixed,
    "unknown": lambda: Tokenizer(backends.BPE({"<unk>": 0, "e": 1, "t": 2}, [], unk_token="<unk>")),
    "composing": composing,
}


@pytest.mark.parametrize("kind", ALTERING)
def test_a_tokenizer_that_alters_text_is_measured_by_the_text(kind, tmp_path, caplog):
    texts = {"fr": ["LE\u0301s e\u0301te\u0301s les été  é", "les", "été e\u0301"]}
    root, file = write_corpus(tmp_path / "text", texts), tmp_path / "made.json"
    ALTERING[kind]().save(str(file))
    built = prepare(config(str(root), window=4, tokenizer=str(file)), tmp_path / "corpus")
    tokens = stream(built, "fr", "validation")
    tokens = tokens[tokens != built.tokenizer.padding]
    expected = built.sizes["fr"]["validation"]["bytes"]
    assert built.token_bytes("fr", "validation")[tokens].sum() == pytest.approx(expected)
    assert built.tokenizer.token_bytes[tokens].sum() != expected
    assert "alters" in caplog.text and "fr" in caplog.text


def test_a_tokenizer_that_keeps_the_text_is_measured_token_by_token(tmp_path, caplog):
    root, file = write_corpus(tmp_path / "text", {"fr": ["le  <0x41>", "été <unk>"]}), tmp_path / "made.json"
    byte_fallback("▁", "é", "<", "l").save(str(file))
    built = prepare(config(str(root), window=4, tokenizer=str(file)), tmp_path / "corpus")
    assert built.token_bytes("fr", "test") is built.tokenizer.token_bytes
    assert not caplog.text


def test_a_cap_keeps_the_first_windows(jsonl, tmp_path):
    whole = prepare(config(jsonl), tmp_path / "whole")
    capped = prepare(config(jsonl, max_train_windows=7), tmp_path / "capped")
    assert capped.unique_tokens["en"] == 7 * 16
    assert np.array_equal(stream(capped, "en", "train"), stream(whole, "en", "train")[: 7 * 16 + 1])
    assert capped.num_bytes["en"] == pytest.approx(7 * 16, rel=0.1)
    assert capped.sizes["en"]["test"]["windows"] == whole.sizes["en"]["test"]["windows"]


def test_loading_needs_no_sources(tmp_path):
    root = write_corpus(tmp_path / "text", TEXTS)
    built = prepare(config(str(root)), tmp_path / "corpus")
    shutil.rmtree(root)
    loaded = load(tmp_path / "corpus")
    assert loaded.fingerprint == built.fingerprint
    assert np.array_equal(stream(loaded, "fr", "train"), stream(built, "fr", "train"))


def test_preparing_again_builds_nothing(jsonl, tmp_path, monkeypatch):
    built = prepare(config(jsonl), tmp_path)
    monkeypatch.setattr(windows, "write", None)
    assert prepare(config(jsonl), tmp_path).fingerprint == built.fingerprint


def test_an_interrupted_build_is_not_taken_for_whole_and_goes_on(jsonl, tmp_path, monkeypatch):
    write, written = windows.write, []

    def interrupted(directory, language, *rest):
        written.append(language)
        if written == ["en", "fr"]:
            (directory / "windows/fr/1.0.0").mkdir(parents=True)  # half a data set
            raise KeyboardInterrupt
        write(directory, language, *rest)

    monkeypatch.setattr(windows, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(jsonl), tmp_path / "cut")
    with pytest.raises(UserError, match="unfinished"):
        load(tmp_path / "cut")
    built = prepare(config(jsonl), tmp_path / "cut")
    assert written == ["en", "fr", "fr"]
    whole = prepare(config(jsonl), tmp_path / "whole")
    assert built.fingerprint == whole.fingerprint
    assert np.array_equal(stream(built, "fr", "train"), stream(whole, "fr", "train"))


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"window": 8}, "data.window=16, but this config has 8"),
        ({"languages": ("en",)}, "data.languages"),
        ({"tokenizer": "bpe"}, "data.tokenizer='bytes'"),
        ({"max_train_windows": 3}, "data.max_train_windows=0"),
    ],
)
def test_a_directory_of_another_config_is_refused(jsonl, tmp_path, fields, name):
    prepare(config(jsonl), tmp_path)
    with pytest.raises(UserError, match=name) as error:
        prepare(config(jsonl, **fields), tmp_path)
    assert "\n" not in str(error.value)


def test_changed_text_is_refused_naming_its_language(tmp_path):
    root = write_corpus(tmp_path / "text", TEXTS)
    prepare(config(str(root)), tmp_path / "corpus")
    write_corpus(root, {"fr": ["autre chose"] * 9})
    with pytest.raises(UserError, match=r"data\.files\.fr"):
        prepare(config(str(root)), tmp_path / "corpus")


def test_a_damaged_description_is_named(jsonl, tmp_path):
    prepare(config(jsonl), tmp_path)
    file = tmp_path / "corpus.json"
    file.write_text(file.read_text()[:50])
    with pytest.raises(UserError, match=r"corpus\.json' is no corpus"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("texts", "words"),
    [(["short"], ["fr", "6 training tokens", "window of 16"]), ([""], ["fr", "no documents", "train"])],
)
def test_too_little_text_is_named(tmp_path, texts, words):
    root = write_corpus(tmp_path / "text", {"en": TEXTS["en"], "fr": texts})
    with pytest.raises(UserError) as error:
        prepare(config(str(root)), tmp_path / "corpus")
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_bad_lines_are_named_through_the_whole_build(tmp_path):
    root = write_corpus(tmp_path / "text", TEXTS)
    (root / "en/test.jsonl.gz").write_bytes(b"plain text")
    with pytest.raises(UserError, match=r"en/test\.jsonl\.gz is not a whole gzip") as error:
        prepare(config(str(root)), tmp_path / "corpus")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_trained_tokenizers(jsonl, tmp_path, kind):
    built = prepare(config(jsonl, tokenizer=kind, vocab_size=290, window=4), tmp_path)
    loaded = load(tmp_path)
    assert loaded.tokenizer.vocab_size <= 320
    assert loaded.tokenizer.fingerprint == built.tokenizer.fingerprint
    tokens = stream(loaded, "fr", "train")
    expected = np.concatenate(list(loaded.tokenizer.encode_documents(TEXTS["fr"])))
    assert np.array_equal(tokens, expected[: len(tokens)])
    # The same tokenizer by its file gives the same windows.
    by_path = config(jsonl, tokenizer=str(tmp_path / "tokenizer.json"), window=4)
    again = prepare(by_path, tmp_path / "again")
    assert np.array_equal(stream(again, "en", "train"), stream(loaded, "en", "train"))


def test_the_wrong_tokenizer_is_refused(jsonl, tmp_path):
    bpe = config(jsonl, tokenizer="bpe", vocab_size=290)
    prepare(bpe, tmp_path)
    tokenizers.train("bpe", 280, TEXTS["en"]).save(tmp_path)
    for use in (lambda: load(tmp_path), lambda: prepare(bpe, tmp_path)):
        with pytest.raises(UserError, match=r"tokenizer\.json is not the tokenizer"):
            use()


def test_an_old_tokenizer_is_not_taken_for_a_new_ones(jsonl, tmp_path):
    for kind, vocab_size in (("bytes", 256), ("bpe", 280)):
        directory = tmp_path / kind
        directory.mkdir()
        tokenizers.train("bpe", 270, TEXTS["en"]).save(directory)
        built = prepare(config(jsonl, tokenizer=kind, vocab_size=280), directory)
        assert built.tokenizer.separator == vocab_size


@pytest.mark.parametrize("in_memory_bytes", [0, 1 << 30])
def test_damaged_windows_are_named(jsonl, tmp_path, monkeypatch, in_memory_bytes):
    monkeypatch.setattr(corpus, "_IN_MEMORY_BYTES", in_memory_bytes)
    built = prepare(config(jsonl), tmp_path)
    file = next((tmp_path / "windows/en").rglob("*train.array_record*"))
    file.write_bytes(file.read_bytes()[:100])
    shutil.rmtree(tmp_path / "windows/fr")
    for language in ("en", "fr"):
        with pytest.raises(UserError, match=f"the windows of {language} cannot be read") as error:
            built.windows(language, "train")
        assert "\n" not in str(error.value)


def test_an_unreadable_tokenizer_leaves_nothing_behind(jsonl, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a tokenizer"):
        prepare(config(jsonl, tokenizer=str(tmp_path / "tokenizer.json")), tmp_path / "corpus")
    assert not (tmp_path / "corpus/corpus.json").exists()


def test_synthetic(synthetic):
    assert synthetic.languages == ("a1", "a2", "b1", "b2")
    for language in synthetic.languages:
        assert 20_000 <= synthetic.num_bytes[language] < 21_000
        assert synthetic.sizes[language]["validation"]["windows"] > 32_000 // 32
    assert synthetic.relatedness["a1", "a2"] > 0.7
    assert synthetic.relatedness == load(synthetic.directory).relatedness


def test_large_corpora_are_read_from_disk_with_the_same_batches(synthetic, monkeypatch):
    weights = dict.fromkeys(synthetic.languages, 0.25)
    expected = Sampler(synthetic, weights, 16, 0).batch(3)
    monkeypatch.setattr(corpus, "_IN_MEMORY_BYTES", 0)
    stored = load(synthetic.directory)
    assert isinstance(stored.windows("a1", "train"), windows.StoredWindows)
    assert np.array_equal(Sampler(stored, weights, 16, 0).batch(3).tokens, expected.tokens)


def test_identities_are_readable(synthetic):
    description = json.loads((synthetic.directory / "corpus.json").read_text())
    assert description["identity"]["synthetic_tokens"] == 20_000
    assert description["fingerprint"] == synthetic.fingerprint


def test_processes_that_build_at_once_agree_without_tensorflow(tmp_path):
    script = (
        "import sys; from atlas.data import DataConfig, prepare; "
        f"c = prepare(DataConfig(window=32, synthetic_tokens=20_000), {str(tmp_path)!r}); "
        "c.windows('a1', 'train'); print(c.fingerprint, 'tensorflow' in sys.modules, 'jax' in sys.modules)"
    )
    run = [sys.executable, "-c", script]
    processes = [subprocess.Popen(run, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {process.communicate()[0].strip() for process in processes}
    assert len(outputs) == 1
    assert outputs.pop().endswith("False False")
