"""Corpora: building one out of a config, and reading what was built."""

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from tqdm import tqdm

from atlas.data import sources, synthetic, tokenizers, windows
from atlas.data.config import TRAINED_TOKENIZERS, DataConfig
from atlas.data.tokenizers import Tokenizer
from atlas.data.windows import WindowSource
from atlas.errors import UserError, unknown
from atlas.files import write_atomically

_FILE = "corpus.json"
_FORMAT = 1
_IN_MEMORY_BYTES = 1 << 30
# A tokenizer's statistics settle long before: ATLAS's own was trained on a sample, too.
_TOKENIZER_SAMPLE_BYTES = 64_000_000


class Corpus:
    """A built corpus. Its text is needed no more.

    languages: names, in the order of the config. tokenizer: see `atlas.data.tokenizers.Tokenizer`. window: T.
    fingerprint: see `fingerprint`.
    """

    def __init__(self, directory: Path, description: dict):
        """Of the content of a `corpus.json`; use `load`."""
        self.directory = directory
        self.languages: tuple[str, ...] = tuple(description["identity"]["languages"])
        self.window: int = description["identity"]["window"]
        self.fingerprint: str = description["fingerprint"]
        self.tokenizer = _saved_tokenizer(directory, description)
        self._statistics = description["statistics"]
        self._relatedness = description["relatedness"]
        self._windows = lru_cache(maxsize=None)(self._read)

    def num_windows(self, language: str, split: str = "train") -> int:
        """Windows of a split."""
        return self._of(language, split)["windows"]

    def unique_tokens(self, language: str) -> int:
        """U: tokens of the train split that are targets in one epoch."""
        return self.num_windows(language) * self.window

    def num_documents(self, language: str, split: str = "train") -> int:
        """Documents of a split."""
        return self._of(language, split)["documents"]

    def num_bytes(self, language: str, split: str = "train") -> int:
        """UTF-8 bytes of a split's text."""
        return self._of(language, split)["bytes"]

    def windows(self, language: str, split: str) -> WindowSource:
        """Random access to a split: `len` and `rows(indices)`; a small corpus is read into memory once."""
        self._of(language, split)
        return self._windows(language, split)

    def relatedness(self) -> dict[tuple[str, str], float] | None:
        """Share of the target's running words that the source has, by (target, source); None if unknown."""
        if self._relatedness is None:
            return None
        return {(target, source): share for target, source, share in self._relatedness}

    def _read(self, language: str, split: str) -> WindowSource:
        total = sum(split["windows"] for splits in self._statistics.values() for split in splits.values())
        in_memory = total * (self.window + 1) * 4 <= _IN_MEMORY_BYTES
        try:
            read = windows.read(self.directory, language, split, self.window, in_memory)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._damaged(language, " ".join(str(error).split())) from error
        if len(read) != self.num_windows(language, split):
            raise self._damaged(language, f"{len(read)} of {self.num_windows(language, split)} in {split}")
        return read

    def _damaged(self, language: str, reason: str) -> UserError:
        return UserError(
            f"{self.directory}: the windows of {language} cannot be read ({reason}); "
            "delete the directory and build the corpus again"
        )

    def _of(self, language: str, split: str) -> dict[str, int]:
        if language not in self._statistics:
            raise unknown("language", language, self.languages)
        if split not in self._statistics[language]:
            raise unknown("split", split, self._statistics[language])
        return self._statistics[language][split]


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
    languages = config.languages or sources.open_source(dataclasses.replace(config, tasks=())).languages
    return (*languages, *config.tasks)


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
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory} cannot be a directory ({error}); give another --workdir") from error
    with _locked(directory), tqdm(unit="B", unit_scale=True, delay=0.5, disable=None) as bar:
        source = sources.open_source(config, on_read=bar.update)
        identity = _identity(config, source)
        description = _description(directory) or {"identity": identity, "statistics": {}}
        _check_same(description["identity"], identity, directory)
        if "fingerprint" not in description:
            bar.reset(sum(map(source.work, source.languages)))
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
    for language in source.languages:
        bar.set_description(f"prepare {language}")
        if language not in description["statistics"]:
            description["statistics"][language] = _build_language(config, source, language, tokenizer, directory)
            _write(directory, description)
        done += source.work(language)
        # A split may end before its files do, and what was built before is not read at all.
        bar.update(done - bar.n)
    spoken = [language for language in source.languages if language not in config.tasks]
    pairs = synthetic.relatedness(spoken, config.seed) if config.source == "synthetic" else None
    description["relatedness"] = [[*pair, share] for pair, share in pairs.items()] if pairs is not None else None
    description["fingerprint"] = _digest(description["identity"])
    _write(directory, description)


def _build_language(
    config: DataConfig, source: sources.Source, language: str, tokenizer: Tokenizer, directory: Path
) -> dict[str, dict[str, int]]:
    counts = {split: {"documents": 0, "bytes": 0, "tokens": 0, "windows": 0} for split in sources.SPLITS}
    cuts = {split: _cut(config, source, language, split, tokenizer, counts[split]) for split in sources.SPLITS}
    windows.write(directory, language, config.window, cuts)
    if config.max_train_windows:
        _scale_to_kept(counts["train"], config.window)
    return counts


def _cut(
    config: DataConfig,
    source: sources.Source,
    language: str,
    split: str,
    tokenizer: Tokenizer,
    counts: dict[str, int],
) -> Iterator[np.ndarray]:
    """Windows of a split, counting them and what they are made of."""
    documents = _counted(tokenizer.encode_documents(_counted_texts(source.documents(language, split), counts)), counts)
    if split == "train":
        cut = windows.cut(documents, config.window)
        cut = itertools.islice(cut, config.max_train_windows) if config.max_train_windows else cut
    else:
        cut = windows.cut(documents, config.window, tokenizer.padding)
    for window in cut:
        counts["windows"] += 1
        yield window
    if not counts["documents"]:
        raise UserError(f"{language} has no documents in its {split} split; add some, or leave the language out")
    if not counts["windows"]:
        raise UserError(
            f"{language} has {counts['tokens']} training tokens, fewer than a window of {config.window} + 1; "
            "lower data.window, add text, or leave the language out"
        )


def _counted_texts(texts: Iterable[str], counts: dict[str, int]) -> Iterator[str]:
    for text in texts:
        if text:
            counts["documents"] += 1
            counts["bytes"] += len(text.encode())
            yield text


def _counted(documents: Iterable[np.ndarray], counts: dict[str, int]) -> Iterator[np.ndarray]:
    for ids in documents:
        counts["tokens"] += len(ids)
        yield ids


def _scale_to_kept(counts: dict[str, int], window: int) -> None:
    """Sizes of what a cap kept, by proportion: text is read some documents ahead of its windows."""
    kept = min(1.0, counts["windows"] * window / counts["tokens"])
    for name in ("documents", "bytes", "tokens"):
        counts[name] = round(counts[name] * kept)


def _make_tokenizer(config: DataConfig, source: sources.Source) -> Tokenizer:
    if config.tokenizer == "bytes":
        return tokenizers.ByteTokenizer()
    if config.tokenizer not in TRAINED_TOKENIZERS:
        return tokenizers.from_file(config.tokenizer)
    texts = {language: _Texts(source, language) for language in source.languages}
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


class _Texts:
    """Training documents of a language, from the start each time they are asked for."""

    def __init__(self, source: sources.Source, language: str):
        self._source, self._language = source, language

    def __iter__(self) -> Iterator[str]:
        empty = True
        for text in self._source.documents(self._language, "train"):
            empty = empty and not text
            yield text
        if empty:
            raise UserError(
                f"{self._language} has no documents in its train split; add some, or leave the language out"
            )


def _identity(config: DataConfig, source: sources.Source) -> dict[str, object]:
    """All that determines the windows, by name; see `fingerprint`."""
    identity = {
        "format": _FORMAT,
        "source": config.source,
        "languages": list(source.languages),
        "window": config.window,
        "max_train_windows": config.max_train_windows,
        **source.identity(),
    }
    if config.tokenizer in TRAINED_TOKENIZERS:
        trained = {"vocab_size": config.vocab_size, "tokenizer_temperature": config.tokenizer_temperature}
        return identity | {"tokenizer": config.tokenizer, **trained}
    if config.tokenizer == "bytes":
        return identity | {"tokenizer": config.tokenizer}
    return identity | {"tokenizer": tokenizers.from_file(config.tokenizer).fingerprint}


def _check_same(built: dict[str, object], wanted: dict[str, object], directory: Path) -> None:
    built, wanted = _flat(built), _flat(wanted)
    for key in wanted | built:
        if built.get(key) != wanted.get(key):
            raise UserError(
                f"{directory} holds a corpus with data.{key}={built.get(key)!r}, but this config has "
                f"{wanted.get(key)!r}; give another --workdir, or delete that one"
            )


def _flat(identity: dict[str, object]) -> dict[str, object]:
    nested = {f"{k}.{name}": v for k, part in identity.items() if isinstance(part, dict) for name, v in part.items()}
    return {key: value for key, value in identity.items() if not isinstance(value, dict)} | nested


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def _description(directory: Path) -> dict | None:
    file = directory / _FILE
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); delete its directory and build the corpus again") from error


def _write(directory: Path, description: dict) -> None:
    write_atomically(directory / _FILE, json.dumps(description, indent=1, ensure_ascii=False))


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lets one process at a time build in a directory; those that waited find it built."""
    with open(directory / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
