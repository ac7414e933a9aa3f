"""Where text comes from: documents by language and split, of files, TFDS data sets or synthetic ones."""

import contextlib
import fnmatch
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import fsspec

from atlas.data import synthetic, tasks
from atlas.data.config import DataConfig
from atlas.errors import UserError, unknown

SPLITS = ("train", "validation", "test")
# MADLAD-400's rule (ATLAS, section 6): test = min(20M tokens, 20 %), here at 4 bytes a token; validation is
# kept like it.
_HELD_OUT_BYTES = 80_000_000
_HELD_OUT_SHARES = {"test": 0.2, "validation": 0.05}
_SYNTHETIC_HELD_OUT, _SYNTHETIC_HELD_OUT_LEAST = 0.05, 32_768


class Source(Protocol):
    """Text by language and split."""

    languages: tuple[str, ...]

    def documents(self, language: str, split: str) -> Iterator[str]:
        """Texts of a split, in an order that never changes."""

    def identity(self) -> dict[str, object]:
        """What the text depends on, wherever it lies: equal for equal texts."""

    def work(self, language: str) -> int:
        """Bytes to read for a language, or another measure of the time it takes beside its neighbours."""


def open_source(config: DataConfig, on_read: Callable[[int], object] = lambda _: None) -> Source:
    """The source that a config names.

    Args:
      config: validated.
      on_read: is told the size of each file when it has been read, in bytes.

    Raises:
      UserError: an unknown or missing language, no such input.
    """
    source: Source
    if config.source == "synthetic":
        source = SyntheticSource(config)
    elif config.source == "tfds":
        source = TfdsSource(config)
    else:
        source = {"jsonl": JsonlSource, "madlad": MadladSource, "text": TextSource}[config.source](config, on_read)
    return WithTasks(source, config) if config.tasks else source


class SyntheticSource:
    """The artificial family; `config.synthetic_tokens` bytes of training text a language."""

    def __init__(self, config: DataConfig):
        self.languages = config.languages or synthetic.DEFAULT_LANGUAGES
        self._config = config

    def documents(self, language: str, split: str) -> Iterator[str]:
        return synthetic.documents(language, split, _synthetic_bytes(self._config, split), self._config.seed)

    def identity(self) -> dict[str, object]:
        return {"seed": self._config.seed, "synthetic_tokens": self._config.synthetic_tokens}

    def work(self, language: str) -> int:
        return self._config.synthetic_tokens


class WithTasks:
    """A source and, as further languages, the tasks of the config, each of `config.synthetic_tokens` bytes."""

    def __init__(self, source: Source, config: DataConfig):
        if both := set(source.languages) & set(config.tasks):
            raise UserError(f"data.tasks names {min(both)}, which is a language of the source, too; rename that one")
        self.languages = (*source.languages, *config.tasks)
        self._source, self._config = source, config

    def documents(self, language: str, split: str) -> Iterator[str]:
        config = self._config
        if language not in config.tasks:
            return self._source.documents(language, split)
        return tasks.documents(language, split, _synthetic_bytes(config, split), config.window, config.seed)

    def identity(self) -> dict[str, object]:
        config = self._config
        own = {"names": list(config.tasks), "seed": config.seed, "synthetic_tokens": config.synthetic_tokens}
        return self._source.identity() | {"tasks": own}

    def work(self, language: str) -> int:
        return self._config.synthetic_tokens if language in self._config.tasks else self._source.work(language)


def _synthetic_bytes(config: DataConfig, split: str) -> int:
    if split == "train":
        return config.synthetic_tokens
    return max(_SYNTHETIC_HELD_OUT_LEAST, round(config.synthetic_tokens * _SYNTHETIC_HELD_OUT))


class File(NamedTuple):
    """path within the file system; size in bytes."""

    path: str
    size: int


class _FileSource:
    """A directory a language, at any fsspec path."""

    pattern = ""
    passes = len(SPLITS)  # how often each file is read: once a split where splits are made by hash

    def __init__(self, config: DataConfig, on_read: Callable[[int], object]):
        self._input, self._on_read = config.input, on_read
        try:
            self._fs, self._root = fsspec.core.url_to_fs(config.input)
            self._exists = self._fs.isdir(self._root)
        except (ImportError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"data.input={config.input!r} cannot be opened ({reason}); check the path and its protocol"
            ) from error
        if not self._exists:
            raise UserError(
                f"data.input={config.input!r} is not a directory; give one with a directory for each language"
            )
        found = self._find_languages(config.languages)
        self.languages = tuple(config.languages) or found
        self._files = {language: self._list(language) for language in self.languages}

    def _find_languages(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        names = sorted(_name(entry) for entry in self._fs.ls(self._root, detail=False) if self._fs.isdir(entry))
        for language in wanted:
            if language not in names:
                raise unknown(f"language in {self._input}", language, names)
        if not wanted:
            names = [name for name in names if self._matching(name)]
        if not names:
            raise UserError(f"data.input={self._input!r} holds no <language>/{self.pattern}; check data.source")
        return tuple(names)

    def _matching(self, language: str) -> list[dict]:
        entries = self._fs.ls(f"{self._root}/{language}", detail=True)
        return sorted((e for e in entries if fnmatch.fnmatch(_name(e["name"]), self.pattern)), key=lambda e: e["name"])

    def _list(self, language: str) -> list[File]:
        entries = self._matching(language)
        if not entries:
            raise UserError(f"{self._input}/{language} holds no {self.pattern}; data.source says that is the layout")
        return [File(e["name"], e["size"]) for e in entries]

    def _stamp(self, file: File) -> str:
        """What tells another content of the same size; unlike a time it survives copying."""
        # A gzip file ends in the checksum and length of its text, so that large files need not be read.
        if file.path.endswith(".gz"):
            return self._fs.read_block(file.path, max(0, file.size - 8), 8).hex()
        return hashlib.blake2b(self._fs.cat_file(file.path), digest_size=8).hexdigest()

    def identity(self) -> dict[str, object]:
        digests = {}
        for language, files in self._files.items():
            listing = "\n".join(f"{_name(f.path)} {f.size} {self._stamp(f)}" for f in files)
            digests[language] = hashlib.blake2b(listing.encode(), digest_size=8).hexdigest()
        return {"files": digests}

    def work(self, language: str) -> int:
        return self.passes * sum(file.size for file in self._files[language])

    def _read_jsonl(self, file: File) -> Iterator[str]:
        """Texts of a gzipped file of one JSON object a line; UserError names the line that is none."""
        number = 0
        try:
            with self._fs.open(file.path, "rb") as raw, gzip.open(raw, "rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield _text(line, file.path, number)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            where = f"after line {number}" if number else "at its start"
            raise UserError(
                f"{file.path} is not a whole gzip file ({where}: {error}); compress or copy it again"
            ) from error
        if not number:
            raise UserError(f"{file.path} is empty; a split needs at least one document")
        self._on_read(file.size)


class JsonlSource(_FileSource):
    """`<language>/{train,validation,test}.jsonl.gz`."""

    pattern = "*.jsonl.gz"
    passes = 1

    def documents(self, language: str, split: str) -> Iterator[str]:
        name = f"{split}.jsonl.gz"
        file = next((file for file in self._files[language] if _name(file.path) == name), None)
        if file is None:
            raise UserError(f"{self._input}/{language} lacks {name}; put that split there")
        return self._read_jsonl(file)


class MadladSource(_FileSource):
    """MADLAD-400: `<language>/clean_*.jsonl.gz`, or `<language>/<language>_clean_*.jsonl.gz`.

    In it a line break is written as a backslash and an n, which is undone here.
    """

    pattern = "*clean_*.jsonl.gz"

    def documents(self, language: str, split: str) -> Iterator[str]:
        texts = (text.replace("\\n", "\n") for file in self._files[language] for text in self._read_jsonl(file))
        return split_by_hash(texts, split)


class TextSource(_FileSource):
    """`<language>/*.txt`, one document a file."""

    pattern = "*.txt"

    def documents(self, language: str, split: str) -> Iterator[str]:
        return split_by_hash(map(self._read, self._files[language]), split)

    def _read(self, file: File) -> str:
        try:
            text = self._fs.cat_file(file.path).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{file.path} is not UTF-8 ({error}); convert it, for instance with iconv") from error
        self._on_read(file.size)
        return text


class TfdsSource:
    """A text data set of TFDS, by name or by the directory of a prepared one.

    `{language}` in it stands for the language. What is not there yet is downloaded and prepared as
    ArrayRecord. Splits that the data set lacks are split off by hash.
    """

    def __init__(self, config: DataConfig):
        if not config.languages:
            raise UserError("data.languages is missing: data.source=tfds cannot list a data set's languages; name them")
        if "{language}" not in config.input and len(config.languages) > 1:
            raise UserError(f"data.input={config.input!r} is one data set; write {{language}} where it varies")
        self.languages, self._input = tuple(config.languages), config.input
        self._builders: dict[str, Any] = {}

    def identity(self) -> dict[str, object]:
        # Name, config and version, which TFDS promises to mean one content.
        return {"dataset": {language: self._find(language).info.full_name for language in self.languages}}

    def work(self, language: str) -> int:
        return 1

    def documents(self, language: str, split: str) -> Iterator[str]:
        builder = self._find(language)
        _tfds_prepare(builder)
        key, splits = _text_feature(builder), set(builder.info.splits)
        if split in splits and split != "train":
            return self._read(builder, split, key)
        return split_by_hash(
            self._read(builder, "train", key),
            split,
            [name for name in _HELD_OUT_SHARES if name not in splits],
        )

    def _read(self, builder: Any, split: str, key: str) -> Iterator[str]:
        import numpy as np

        examples = builder.as_data_source(split=split)
        for start in range(0, len(examples), 1000):
            for example in examples.__getitems__(np.arange(start, min(start + 1000, len(examples))).tolist()):
                yield _clean(example[key].decode(errors="replace"))

    def _find(self, language: str) -> Any:
        if language not in self._builders:
            self._builders[language] = _tfds_builder(self._input.format(language=language))
        return self._builders[language]


def split_by_hash(texts: Iterable[str], split: str, held_out: Iterable[str] = tuple(_HELD_OUT_SHARES)) -> Iterator[str]:
    """The documents of one split, of texts that come without splits.

    A hash of its text decides where a document belongs, so that copies never fall on both sides. A held-out
    split ends when it is full; what its hashes would still claim goes to training.

    Args:
      texts: all documents, always in the same order.
      split: the split to yield.
      held_out: the splits to take from the texts.
    """
    room = dict.fromkeys(held_out, _HELD_OUT_BYTES)
    for text in texts:
        data = text.encode()
        belongs = _split_of(data, room)
        if belongs == split:
            yield text
        if belongs != "train":
            room[belongs] -= len(data)
            if belongs == split and room[belongs] <= 0:
                return


def _split_of(data: bytes, room: dict[str, int]) -> str:
    position = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) / 2**64
    for name, share in _HELD_OUT_SHARES.items():
        if 0 <= position < share and room.get(name, 0) > 0:
            return name
        position -= share
    return "train"


def _text(line: bytes, path: str, number: int) -> str:
    try:
        document = json.loads(line)
    except ValueError as error:
        reason = getattr(error, "msg", "not UTF-8")
        raise UserError(f"{path} line {number} is not JSON ({reason}); each line is an object with a text") from error
    text = document.get("text") if isinstance(document, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{path} line {number} has no string \'text\'; each line is an object like {{"text": "…"}}')
    return _clean(text)


def _clean(text: str) -> str:
    """Replaces lone surrogates, which JSON can escape but UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode() if not text.isascii() else text


def _name(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


@contextlib.contextmanager
def _tfds_errors(name: str) -> Iterator[None]:
    import tensorflow_datasets as tfds

    try:
        yield
    except (tfds.core.DatasetNotFoundError, ValueError, ImportError, OSError) as error:
        # TFDS's own lists every data set there is.
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"TFDS data set {name!r} cannot be prepared ({reason}); see tensorflow.org/datasets/catalog"
        ) from error


def _tfds_builder(name: str) -> Any:
    import tensorflow_datasets as tfds

    with _tfds_errors(name):
        if (fsspec.core.url_to_fs(name)[0]).isdir(name):
            return tfds.builder_from_directory(name)
        # Registers the text data sets; most cannot be found by name before.
        import tensorflow_datasets.text

        return tfds.builder(name)


def _tfds_prepare(builder: Any) -> None:
    if not builder.is_prepared():
        with _tfds_errors(builder.info.full_name):
            builder.download_and_prepare(file_format="array_record")


def _text_feature(builder: Any) -> str:
    import tensorflow_datasets as tfds

    names = [name for name, feature in builder.info.features.items() if isinstance(feature, tfds.features.Text)]
    if "text" not in names and len(names) != 1:
        raise UserError(f"TFDS data set {builder.info.name!r} has text features {names}, and none is named 'text'")
    return "text" if "text" in names else names[0]
