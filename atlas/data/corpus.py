"""Corpora: building one out of a config, and reading what was built."""

import functools
import hashlib
import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from atlas.data import sources, synthetic, tokenizers, tokens, windows
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
        self.tokenizer = tokenizers.saved(directory, description["tokenizer"])
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


def prepare(config: DataConfig, directory: Path | str, workers: int = 1) -> Corpus:
    """Builds the corpus of a config in a directory, or reuses it; shows a bar on a terminal.

    An interrupted build goes on with the file it was at. Its windows are the same for any number of workers.

    Args:
      config: see DataConfig.
      directory: where `corpus.json`, the windows and the tokenizer go.
      workers: processes that make tokens of text.

    Raises:
      UserError: for a bad text, or a directory that holds another corpus.
    """
    directory = Path(directory)
    # One process at a time builds; those that waited find it built.
    with locked(directory / ".lock", f"corpus {directory}", wait=True), _bar() as bar:
        source, description = _open(config, directory)
        if "fingerprint" not in description:
            bar.reset(sum(source.work.values()))
            with disk_errors(directory):
                _build(config, source, directory, description, workers, bar)
    return load(directory)


def prepare_part(config: DataConfig, directory: Path | str, number: int, count: int, workers: int = 1) -> int:
    """Makes the tokens of every `count`-th file of a corpus from `number` on, which `prepare` then cuts windows from.

    Of a language that is capped, files are left out once those before them hold what it needs.

    Args:
      number: from 0; other processes and machines that see the directory take the others.

    Returns:
      How many files that were.

    Raises:
      UserError: as `prepare`.
    """
    directory = Path(directory)
    with locked(directory / ".lock", f"corpus {directory}", wait=True):
        source, description = _open(config, directory)
        if "fingerprint" in description:
            return 0
        with disk_errors(directory):
            tokenizer = _tokenizer(config, source, directory, description)
    own, parts = _units(source, description)[number::count], functools.cache(source.parts)
    with _bar() as bar, disk_errors(directory), tokens.Maker(config, directory, tokenizer, own, workers) as make:
        bar.reset(sum(part.work for _, part in own))
        for language, part in own:
            bar.set_description(f"prepare {language}")
            before = itertools.takewhile(lambda other, part=part: other != part, parts(language))
            if part.split != "train" or not tokens.enough(config, directory, language, before):
                make(language, part)
            bar.update(part.work)
    return len(own)


def _bar() -> tqdm:
    return tqdm(unit="B", unit_scale=True, delay=0.5, disable=None)


def _open(config: DataConfig, directory: Path) -> tuple[sources.Source, dict]:
    """The source of a config, and what its directory has so far."""
    source = sources.open_source(config)
    identity = _identity(config, source)
    description = _description(directory) or {"identity": identity, "statistics": {}}
    _check_same(description["identity"], identity, directory)
    return source, description


def _units(source: sources.Source, description: dict) -> list[tokens.Unit]:
    """The parts of all languages that are not built yet."""
    languages = [language for language in source.languages if language not in description["statistics"]]
    return [(language, part) for language in languages for part in source.parts(language)]


def _tokenizer(config: DataConfig, source: sources.Source, directory: Path, description: dict) -> Tokenizer:
    """The tokenizer of a directory, made if there is none yet."""
    _write(directory, description)
    if "tokenizer" in description:
        return tokenizers.saved(directory, description["tokenizer"])
    tokenizer = _make_tokenizer(config, source)
    tokenizer.save(directory)
    description["tokenizer"] = tokenizer.fingerprint
    _write(directory, description)
    return tokenizer


def _build(
    config: DataConfig, source: sources.Source, directory: Path, description: dict, workers: int, bar: tqdm
) -> None:
    """Builds what `description` lacks, adding to it and to the directory language by language."""
    tokenizer, done = _tokenizer(config, source, directory, description), 0
    with tokens.Maker(config, directory, tokenizer, _units(source, description), workers) as make:
        for language, work in source.work.items():
            bar.set_description(f"prepare {language}")
            if language not in description["statistics"]:
                parts, most = source.parts(language), tokens.most_tokens(config)
                read = _Documents(language, parts, most, make, bar)
                description["statistics"][language] = _build_language(config, read, tokenizer, directory)
                _write(directory, description)
                shutil.rmtree(tokens.place(directory, language), ignore_errors=True)
            done += work
            # A split may end before its files do, and what was built before is not read at all.
            bar.update(done - bar.n)
    shutil.rmtree(tokens.place(directory), ignore_errors=True)
    spoken = [language for language in source.languages if language not in config.tasks]
    pairs = synthetic.relatedness(spoken, config.seed) if config.source == "synthetic" else None
    description["relatedness"] = None if pairs is None else [[*pair, share] for pair, share in pairs.items()]
    description["fingerprint"] = _digest(description["identity"])
    _write(directory, description)


class _Documents:
    """The documents of a language by split, from one pass over its parts: splits are asked for in their order."""

    def __init__(self, language: str, parts: Iterable[sources.Part], most: float, make: tokens.Maker, bar: tqdm):
        self.language, self.sizes = language, {split: Counter() for split in sources.SPLITS}
        self._parts, self._most, self._make, self._bar = list(parts), most, make, bar
        self._waiting: dict[str, list[np.ndarray]] = {split: [] for split in sources.SPLITS}
        self._room = {name: sources.HELD_OUT_BYTES for part in self._parts for name in part.held_out}

    def of(self, split: str) -> Iterator[np.ndarray]:
        """Ids of documents, int32, many together."""
        for name in sources.SPLITS[: sources.SPLITS.index(split)]:
            self._waiting.pop(name, None)  # a cap has ended it
        while True:
            while self._waiting[split]:
                yield self._waiting[split].pop(0)
            mine = [part for part in self._parts if split in (part.split, *part.held_out)]
            full = self.sizes[split]["tokens"] >= self._most if split == "train" else self._room.get(split, 1) <= 0
            if not mine or full:
                return
            self._parts.remove(mine[0])
            self._add(mine[0], self._make(self.language, mine[0]))
            self._bar.update(mine[0].work)

    def _add(self, part: sources.Part, read: tokens.Tokens) -> None:
        split = read.split.copy()
        for name in part.held_out:
            claimed = split == sources.SPLITS.index(name)
            size = np.where(claimed, read.num_bytes, 0)
            full = claimed & (np.cumsum(size) - size >= self._room[name])
            split[full] = sources.SPLITS.index(part.split)
            self._room[name] -= int(size[~full].sum())
        for name in self._waiting:
            here = split == sources.SPLITS.index(name)
            self._waiting[name].append(read.ids[np.repeat(here, read.length)].astype(np.int32))
            counts = {"bytes": read.num_bytes, "tokens": read.length, "altered": read.altered}
            sums = {key: int(value[here].sum()) for key, value in counts.items()}
            self.sizes[name].update(documents=int(here.sum()), **sums)


def _build_language(
    config: DataConfig, read: _Documents, tokenizer: Tokenizer, directory: Path
) -> dict[str, Counter[str]]:
    """Writes the windows of a language; returns the sizes of each split."""
    language, sizes = read.language, read.sizes
    cuts = {split: _cut(config, read, split, tokenizer) for split in sources.SPLITS}
    windows.write(directory, language, config.window, cuts)
    if altered := sum(size["altered"] for size in sizes.values()):
        _LOG.warning("the tokenizer alters %d documents of %s: bits per byte go by bytes of text", altered, language)
    if config.max_train_windows:
        # Text is read ahead of its windows: what a cap kept is known by proportion.
        train = sizes["train"]
        kept = min(1.0, train["windows"] * config.window / train["tokens"])
        for name in ("documents", "bytes", "tokens"):
            train[name] = round(train[name] * kept)
    return sizes


def _cut(config: DataConfig, read: _Documents, split: str, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Windows of a split, counting them."""
    documents, language, sizes = read.of(split), read.language, read.sizes[split]
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


def _make_tokenizer(config: DataConfig, source: sources.Source) -> Tokenizer:
    if config.tokenizer not in TRAINED_TOKENIZERS:
        return tokenizers.named(config.tokenizer)
    texts = {language: functools.partial(source.documents, language, "train") for language in source.languages}
    sample = tokenizers.sample(texts, config.tokenizer_temperature, _TOKENIZER_SAMPLE_BYTES)
    return tokenizers.train(config.tokenizer, config.vocab_size, sample)


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
