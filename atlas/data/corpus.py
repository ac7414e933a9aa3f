"""Corpora: building one out of a config, and reading what was built."""

import functools
import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from atlas.data import sources, synthetic, tokenizers, windows
from atlas.data.config import TRAINED_TOKENIZERS, DataConfig
from atlas.data.tokenizers import Tokenizer
from atlas.data.windows import WindowSource
from checked import UserError
from checked.files import disk_errors, locked, read_sealed, write_sealed

_LOG = logging.getLogger(__name__)
_FILE = "corpus.json"
_FORMAT = 1
_IN_MEMORY_BYTES = 1 << 30
# A tokenizer's statistics settle long before: ATLAS's own was trained on a sample, too.
_TOKENIZER_SAMPLE_BYTES = 64_000_000


class Corpus:
    """A built corpus. Its text is needed no more.

    languages: names, in the order of the config. tokenizer: see `atlas.data.tokenizers.Tokenizer`. window: T.
    fingerprint: see `fingerprint`.
    sizes: documents, bytes of UTF-8 text, tokens and windows by language and split; and `altered`, the documents whose
      tokens stand for other bytes than their text has (normalisation, unknown tokens).
    unique_tokens: by language U, tokens of the train split that are targets in one epoch. num_bytes: bytes of its text.
    windows(language, split): random access to a split by an array of indices; a small corpus is read into memory once.
    relatedness: share of the target's running words that the source has, by (target, source); None if unknown.
    """

    def __init__(self, directory: Path, description: dict):
        """Of the content of a `corpus.json`; use `load`."""
        self.directory = directory
        self.languages: tuple[str, ...] = tuple(description["identity"]["languages"])
        self.window: int = description["identity"]["window"]
        self.fingerprint: str = description["fingerprint"]
        self.tokenizer = _saved_tokenizer(directory, description)
        self.sizes: dict[str, dict[str, dict[str, int]]] = description["statistics"]
        train = {language: splits["train"] for language, splits in self.sizes.items()}
        self.unique_tokens = {language: size["windows"] * self.window for language, size in train.items()}
        self.num_bytes = {language: size["bytes"] for language, size in train.items()}
        pairs = description["relatedness"]
        self.relatedness = None if pairs is None else {(target, source): share for target, source, share in pairs}
        self.windows = functools.cache(self._read)

    def token_bytes(self, language: str, split: str) -> np.ndarray:
        """Bytes of text that a token stands for, [vocab_size]; the split's mean where the tokenizer alters its text."""
        size = self.sizes[language][split]
        if not size.get("altered"):
            return self.tokenizer.token_bytes
        return np.full(self.tokenizer.vocab_size, size["bytes"] / size["tokens"])

    def _read(self, language: str, split: str) -> WindowSource:
        total = sum(size["windows"] for splits in self.sizes.values() for size in splits.values())
        in_memory = total * (self.window + 1) * 4 <= _IN_MEMORY_BYTES
        expected = self.sizes[language][split]["windows"]
        try:
            read = windows.read(self.directory, language, split, in_memory)
            if len(read) != expected:
                raise ValueError(f"{len(read)} of {expected} in {split}")
        except Exception as error:  # TFDS and ArrayRecord raise what their many readers raise
            raise UserError(
                f"{self.directory}: the windows of {language} cannot be read ({' '.join(str(error).split())[:200]}); "
                "delete the directory and build the corpus again"
            ) from error
        return read


def load(directory: Path | str) -> Corpus:
    """The corpus in a directory; UserError where there is none, or only part of one."""
    directory = Path(directory)
    description = _description(directory)
    if description is None:
        raise UserError(f"{directory} holds no corpus (no {_FILE}); build one with experiments.prepare")
    if "fingerprint" not in description:
        raise UserError(f"{directory} holds an unfinished corpus; run its experiments.prepare again to complete it")
    return Corpus(directory, description)


def fingerprint(config: DataConfig) -> str:
    """What tells the corpus of a config from others, without building it: 16 hexadecimal digits.

    It is the hash of all that determines the tokens: the parameters of synthetic text; the names, sizes and contents of
    files wherever they lie (of compressed ones the checksum that they end in); the name and version of a TFDS data
    set; the tokenizer's definition or content; window and cap. Two configs with equal ones build equal corpora.

    Raises UserError where the text cannot be reached.
    """
    return _digest(_identity(config, sources.open_source(config)))


def languages_of(config: DataConfig) -> tuple[str, ...]:
    """The names of a corpus' languages and tasks; text is looked for only where the config does not name them."""
    return (*config.languages, *config.tasks) if config.languages else sources.open_source(config).languages


def prepare(config: DataConfig, directory: Path | str) -> Corpus:
    """Builds the corpus of a config in a directory, or reuses it; shows a bar on a terminal.

    An interrupted build goes on with the language it was in.

    Args:
      config: see DataConfig.
      directory: where `corpus.json`, the windows and the tokenizer go.

    Raises:
      UserError: for a bad text, or a directory that holds another corpus.
    """
    directory = Path(directory)
    bar = tqdm(unit="B", unit_scale=True, delay=0.5, disable=None)
    # One process at a time builds; those that waited find it built.
    with locked(directory / ".lock", f"corpus {directory}", wait=True), bar:
        source = sources.open_source(config, on_read=bar.update)
        identity = _identity(config, source)
        description = _description(directory) or {"identity": identity, "statistics": {}}
        _check_same(description["identity"], identity, directory)
        if "fingerprint" not in description:
            bar.reset(sum(source.work.values()))
            with disk_errors(directory):
                _build(config, source, directory, description, bar)
    return load(directory)


def _build(config: DataConfig, source: sources.Source, directory: Path, description: dict, bar: tqdm) -> None:
    """Builds what `description` lacks, adding to it and to the directory language by language."""
    _write(directory, description)
    if "tokenizer" in description:
        tokenizer = _saved_tokenizer(directory, description)
    else:
        tokenizer = _make_tokenizer(config, source)
        tokenizer.save(directory)
        description["tokenizer"] = tokenizer.fingerprint
        _write(directory, description)
    done = 0
    for language, work in source.work.items():
        bar.set_description(f"prepare {language}")
        if language not in description["statistics"]:
            description["statistics"][language] = _build_language(config, source, language, tokenizer, directory)
            _write(directory, description)
        done += work
        # A split may end before its files do, and what was built before is not read at all.
        bar.update(done - bar.n)
    spoken = [language for language in source.languages if language not in config.tasks]
    pairs = synthetic.relatedness(spoken, config.seed) if config.source == "synthetic" else None
    description["relatedness"] = None if pairs is None else [[*pair, share] for pair, share in pairs.items()]
    description["fingerprint"] = _digest(description["identity"])
    _write(directory, description)


def _build_language(
    config: DataConfig, source: sources.Source, language: str, tokenizer: Tokenizer, directory: Path
) -> dict[str, Counter[str]]:
    """Writes the windows of a language; returns the sizes of each split."""
    sizes = {split: Counter() for split in sources.SPLITS}
    cuts = {split: _cut(config, source, language, split, tokenizer, sizes[split]) for split in sources.SPLITS}
    windows.write(directory, language, config.window, cuts)
    if altered := sum(size["altered"] for size in sizes.values()):
        _LOG.warning("the tokenizer alters %d documents of %s: bits per byte go by bytes of text", altered, language)
    if config.max_train_windows:
        # Text is read some documents ahead of its windows: what a cap kept is known by proportion.
        train = sizes["train"]
        kept = min(1.0, train["windows"] * config.window / train["tokens"])
        for name in ("documents", "bytes", "tokens"):
            train[name] = round(train[name] * kept)
    return sizes


def _cut(
    config: DataConfig, source: sources.Source, language: str, split: str, tokenizer: Tokenizer, sizes: Counter[str]
) -> Iterator[np.ndarray]:
    """Windows of a split, counting them and what they are made of."""
    texts, again = itertools.tee(filter(None, source.documents(language, split)))
    documents = _spelled(again, tokenizer.encode_documents(texts), tokenizer.token_bytes, sizes)
    if split == "train":
        cut = itertools.islice(windows.cut(documents, config.window), config.max_train_windows or None)
    else:
        cut = windows.cut(documents, config.window, tokenizer.padding)
    for row in cut:
        sizes["windows"] += 1
        yield row
    if not sizes["documents"]:
        raise tokenizers.no_documents(language, split)
    if not sizes["windows"]:
        raise UserError(
            f"{language} has {sizes['tokens']} training tokens, fewer than a window of {config.window} + 1; "
            "lower data.window, add text, or leave the language out"
        )


def _spelled(
    texts: Iterable[str], documents: Iterable[np.ndarray], token_bytes: np.ndarray, sizes: Counter[str]
) -> Iterator[np.ndarray]:
    """The same documents, counted together with the texts that they spell; `altered` are those whose bytes differ."""
    for text, document in zip(texts, documents, strict=True):
        num_bytes = len(text.encode())
        altered = int(token_bytes[document].sum() != num_bytes)
        sizes.update(documents=1, bytes=num_bytes, tokens=len(document), altered=altered)
        yield document


def _make_tokenizer(config: DataConfig, source: sources.Source) -> Tokenizer:
    if config.tokenizer == "bytes":
        return tokenizers.ByteTokenizer()
    if config.tokenizer not in TRAINED_TOKENIZERS:
        return tokenizers.from_file(config.tokenizer)
    texts = {language: functools.partial(source.documents, language, "train") for language in source.languages}
    sample = tokenizers.sample(texts, config.tokenizer_temperature, _TOKENIZER_SAMPLE_BYTES)
    return tokenizers.train(config.tokenizer, config.vocab_size, sample)


def _saved_tokenizer(directory: Path, description: dict) -> Tokenizer:
    """The tokenizer that the windows were made with; UserError where its file has become another."""
    if description["tokenizer"] == tokenizers.ByteTokenizer.fingerprint:
        return tokenizers.ByteTokenizer()
    saved = tokenizers.from_file(directory / tokenizers.FILE)
    if saved.fingerprint != description["tokenizer"]:
        raise UserError(
            f"{directory / tokenizers.FILE} is not the tokenizer that this corpus was built with; "
            "put that one back, or delete the directory and build the corpus again"
        )
    return saved


def _identity(config: DataConfig, source: sources.Source) -> dict[str, object]:
    """All that determines the windows, by name; see `fingerprint`."""
    identity = {
        "format": _FORMAT,
        "source": config.source,
        "languages": list(source.languages),
        "window": config.window,
        "max_train_windows": config.max_train_windows,
        **source.identity(),
        "tokenizer": config.tokenizer,
    }
    if config.tokenizer in TRAINED_TOKENIZERS:
        return identity | {"vocab_size": config.vocab_size, "tokenizer_temperature": config.tokenizer_temperature}
    return identity | {"tokenizer": _make_tokenizer(config, source).fingerprint}


def _check_same(built: dict[str, object], wanted: dict[str, object], directory: Path, section: str = "data") -> None:
    for key in wanted | built:
        values = built.get(key), wanted.get(key)
        if all(isinstance(value, dict) for value in values):
            _check_same(*values, directory, f"{section}.{key}")
        elif values[0] != values[1]:
            raise UserError(
                f"{directory} holds a corpus with {section}.{key}={values[0]!r}, but this config has {values[1]!r}; "
                "give another --workdir, or delete that one"
            )


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def _description(directory: Path) -> dict | None:
    file = directory / _FILE
    return read_sealed(file, "corpus", "delete its directory and build it again") if file.exists() else None


def _write(directory: Path, description: dict) -> None:
    write_sealed(directory / _FILE, description)
