"""Where text comes from: documents by language and split, of files, TFDS data sets or synthetic ones."""

import contextlib
import fnmatch
import functools
import gzip
import hashlib
import importlib
import itertools
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import fsspec

from atlas.data import synthetic, tasks
from atlas.data.config import NAME, DataConfig
from checked import UserError, unknown
from checked.files import parse_json

SPLITS = ("train", "validation", "test")
# MADLAD-400's rule (ATLAS, section 6): test = min(20M tokens, 20 %), here at 4 bytes a token; validation is
# kept like it.
HELD_OUT_BYTES = 80_000_000
_HELD_OUT_SHARES = {"test": 0.2, "validation": 0.05}
_TEXTS_BYTES = 2**25  # of plain files that are read as one part
_SYNTHETIC_HELD_OUT, _SYNTHETIC_HELD_OUT_LEAST = 0.05, 32_768
_FILES = {"jsonl": "*.jsonl.gz", "madlad": "*clean_*.jsonl.gz", "text": "*.txt"}


class Part(NamedTuple):
    """A file of a language, or what is read at one go as a file is.

    split: of its documents, but for those that a hash claims for one of the splits `held_out`. work: as of a Source.
    """

    name: str
    split: str = "train"
    held_out: tuple[str, ...] = ()
    work: int = 0


class Source(NamedTuple):
    """Text by language.

    parts: of a language, those of one split in the order of their documents, which never changes.
    texts: documents of a language's part, by its name.
    identity: gives what the text depends on, wherever it lies: equal for equal texts.
    work: by language, bytes to read, or another measure of the time it takes beside its neighbours.
    """

    parts: Callable[[str], list[Part]]
    texts: Callable[[str, str], Iterator[str]]
    identity: Callable[[], dict[str, object]]
    work: dict[str, int]

    @property
    def languages(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(self.work)

    def documents(self, language: str, split: str) -> Iterator[str]:
        """Texts of a language and a split."""
        parts = [part for part in self.parts(language) if split in (part.split, *part.held_out)]
        texts = itertools.chain.from_iterable(self.texts(language, part.name) for part in parts)
        held_out = next((part.held_out for part in parts), ())
        return split_by_hash(texts, split, held_out) if held_out else texts


def open_source(config: DataConfig) -> Source:
    """The source that a config names, with its tasks as further languages.

    Args:
      config: validated.

    Raises:
      UserError: an unknown or missing language, no such input.
    """
    origin: dict[str, object] = {"seed": config.seed, "synthetic_tokens": config.synthetic_tokens}
    drawn = [Part(split, split, work=config.synthetic_tokens * (split == "train")) for split in SPLITS]
    if config.source == "synthetic":
        names = config.languages or synthetic.DEFAULT_LANGUAGES
        work = dict.fromkeys(names, config.synthetic_tokens)
        source = Source(lambda _: drawn, functools.partial(_synthetic, config), lambda: origin, work)
    else:
        source = _tfds(config) if config.source == "tfds" else _Files(config).source()
    if not config.tasks:
        return source
    if both := set(source.languages) & set(config.tasks):
        raise UserError(f"data.tasks names {min(both)}, which is a language of the source, too; rename that one")
    return Source(
        lambda name: drawn if name in config.tasks else source.parts(name),
        lambda name, part: _synthetic(config, name, part) if name in config.tasks else source.texts(name, part),
        lambda: source.identity() | {"tasks": {"names": list(config.tasks), **origin}},
        source.work | dict.fromkeys(config.tasks, config.synthetic_tokens),
    )


def _synthetic(config: DataConfig, name: str, split: str) -> Iterator[str]:
    """Text of an artificial language or of a task."""
    size = config.synthetic_tokens
    if split != "train":
        size = max(_SYNTHETIC_HELD_OUT_LEAST, round(size * _SYNTHETIC_HELD_OUT))
    if name in config.tasks:
        return tasks.documents(name, split, size, config.window, config.seed)
    return synthetic.documents(name, split, size, config.seed)


class _Files:
    """A directory a language, at any fsspec path, in one of the layouts that DataConfig describes."""

    def __init__(self, config: DataConfig):
        self._layout, self._input = config.source, config.input
        try:
            self._fs, root = fsspec.core.url_to_fs(config.input)
            if not self._fs.isdir(root):
                raise NotADirectoryError("it is not a directory")
        except (ImportError, ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"data.input={config.input!r} cannot be opened ({reason}); give a directory with one for each language"
            ) from error
        directories = {
            _name(entry): entry
            for entry in sorted(self._fs.ls(root, detail=False))
            if not _name(entry).startswith(".") and self._fs.isdir(entry)  # editors and notebooks leave theirs there
        }
        for language in config.languages:
            if language not in directories:
                raise unknown(f"language in {config.input}", language, directories)
        found = {language: self._list(directories[language]) for language in config.languages or directories}
        if not config.languages:
            found = {language: files for language, files in found.items() if files}
        if wrong := [language for language in found if not re.fullmatch(NAME, language)]:
            raise UserError(
                f"{config.input}/{wrong[0]} cannot be the name of a language in mixtures and tables: rename it to "
                f"letters, digits, '_', '.' and '-', or name those to read in data.languages"
            )
        lacking = [language for language, files in found.items() if not files] if found else ["<language>"]
        if lacking:
            pattern = _FILES[config.source]
            raise UserError(f"data.input={config.input!r} holds no {lacking[0]}/{pattern}; check data.source")
        self._files = found

    def _list(self, directory: str) -> dict[str, dict[str, Any]]:
        """What the file system says of each file of the layout, by name."""
        entries = {_name(entry["name"]): entry for entry in self._fs.ls(directory, detail=True)}
        names = (name for name in sorted(fnmatch.filter(entries, _FILES[self._layout])) if not name.startswith("."))
        return {name: entries[name] for name in names if entries[name]["type"] != "directory"}

    def source(self) -> Source:
        work = {name: sum(file["size"] for file in files.values()) for name, files in self._files.items()}
        return Source(self._parts, self._texts, self._identity, work)

    def _parts(self, language: str) -> list[Part]:
        files = self._files[language]
        if self._layout != "jsonl":
            works = {name: sum(file["size"] for file in group) for name, group in self._groups(language).items()}
            return [Part(name, held_out=tuple(_HELD_OUT_SHARES), work=work) for name, work in works.items()]
        names = {split: f"{split}.jsonl.gz" for split in SPLITS}
        if lacking := [name for name in names.values() if name not in files]:
            raise UserError(f"{self._input}/{language} lacks {lacking[0]}; put that split there")
        return [Part(name, split, work=files[name]["size"]) for split, name in names.items()]

    def _texts(self, language: str, part: str) -> Iterator[str]:
        read = {"text": self._read_text, "madlad": self._read_madlad, "jsonl": self._read_jsonl}[self._layout]
        return itertools.chain.from_iterable(map(read, self._groups(language)[part]))

    def _groups(self, language: str) -> dict[str, list[dict[str, Any]]]:
        """What is read at one go, by the name of its first file: small files together, as whole texts are."""
        groups: dict[str, list[dict[str, Any]]] = {}
        size = 0
        for name, file in self._files[language].items():
            if self._layout != "text" or not groups or size >= _TEXTS_BYTES:
                groups[name], size, last = [], 0, name
            groups[last].append(file)
            size += file["size"]
        return groups

    def _identity(self) -> dict[str, object]:
        digests = {}
        for language, files in self._files.items():
            listing = "\n".join(f"{name} {file['size']} {self._stamp(file)}" for name, file in files.items())
            digests[language] = _digest(listing.encode())
        return {"files": digests}

    def _stamp(self, file: dict[str, Any]) -> str:
        """What tells another content of the same size; unlike a time it survives copying."""
        # A gzip file ends in the checksum and length of its text, so that large files need not be read.
        with _reading(file):
            if file["name"].endswith(".gz"):
                return self._fs.read_block(file["name"], max(0, file["size"] - 8), 8).hex()
            return _digest(self._fs.cat_file(file["name"]))

    def _read_text(self, file: dict[str, Any]) -> Iterator[str]:
        try:
            with _reading(file):
                data = self._fs.cat_file(file["name"])
            yield data.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{file['name']} is not UTF-8 ({error}); convert it, for instance with iconv") from error

    def _read_madlad(self, file: dict[str, Any]) -> Iterator[str]:
        # MADLAD-400 writes a line break as a backslash and an n.
        return (text.replace("\\n", "\n") for text in self._read_jsonl(file))

    def _read_jsonl(self, file: dict[str, Any]) -> Iterator[str]:
        """Texts of a gzipped file of one JSON object a line; UserError names the line that is none."""
        path, number = file["name"], 0
        try:
            with _reading(file), self._fs.open(path, "rb") as raw, gzip.open(raw, "rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield _text(line, path, number)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            where = f"after line {number}" if number else "at its start"
            raise UserError(f"{path} is not a whole gzip file ({where}: {error}); compress or copy it again") from error
        if not number:
            raise UserError(f"{path} is empty; a split needs at least one document")


@contextlib.contextmanager
def _reading(file: dict[str, Any]) -> Iterator[None]:
    """Names the file that the system will not read."""
    try:
        yield
    except gzip.BadGzipFile:
        raise
    except OSError as error:
        raise UserError(
            f"{file['name']} cannot be read ({error.strerror or error}); mend it, or take it out of there"
        ) from error


def split_by_hash(texts: Iterable[str], split: str, held_out: Iterable[str] = tuple(_HELD_OUT_SHARES)) -> Iterator[str]:
    """The documents of one split, of texts that come without splits.

    A hash of its text decides where a document belongs, so that copies never fall on both sides. A held-out
    split ends when it is full; what its hashes would still claim goes to training.

    Args:
      texts: all documents, always in the same order.
      split: the split to yield.
      held_out: the splits to take from the texts.
    """
    room = dict.fromkeys(held_out, HELD_OUT_BYTES)
    for text in texts:
        data = text.encode()
        belongs = claimant(data)
        if room.get(belongs, 0) <= 0:
            belongs = "train"
        if belongs == split:
            yield text
        if belongs != "train":
            room[belongs] -= len(data)
            if belongs == split and room[belongs] <= 0:
                return


def claimant(data: bytes) -> str:
    """The split that a document belongs to by its hash, where that is made by hash and is not full."""
    position = int(_digest(data), 16) / 2**64
    for name, share in _HELD_OUT_SHARES.items():
        if position < share:
            return name
        position -= share
    return "train"


def _text(line: bytes, path: str, number: int) -> str:
    try:
        document = parse_json(line)
    except ValueError as error:
        reason = getattr(error, "msg", error)
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


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _tfds(config: DataConfig) -> Source:
    """A text data set of TFDS, by name or by the directory of a prepared one.

    What is not there yet is downloaded and prepared as ArrayRecord. Splits that it lacks are split off by hash.
    """
    if not config.languages:
        raise UserError("data.languages is missing: data.source=tfds cannot list a data set's languages; name them")
    if "{language}" not in config.input and len(config.languages) > 1:
        raise UserError(f"data.input={config.input!r} is one data set; write {{language}} where it varies")

    @functools.cache
    def find(language: str, prepare: bool = False) -> Any:
        return _tfds_builder(config.input.format(language=language), prepare)

    def parts(language: str) -> list[Part]:
        splits = find(language, prepare=True).info.splits
        missing = tuple(name for name in _HELD_OUT_SHARES if name not in splits)
        return [
            Part(name, name, missing if name == "train" else (), int(name == "train"))
            for name in SPLITS
            if name not in missing
        ]

    def texts(language: str, part: str) -> Iterator[str]:
        return _tfds_texts(find(language, prepare=True), part)

    def identity() -> dict[str, object]:
        # Name, config and version, which TFDS promises to mean one content.
        return {"dataset": {language: find(language).info.full_name for language in config.languages}}

    return Source(parts, texts, identity, dict.fromkeys(config.languages, 1))


def _tfds_texts(builder: Any, split: str) -> Iterator[str]:
    import tensorflow_datasets as tfds

    names = [name for name, feature in builder.info.features.items() if isinstance(feature, tfds.features.Text)]
    if "text" not in names and len(names) != 1:
        raise UserError(f"TFDS data set {builder.info.name!r} has text features {names}, and none is named 'text'")
    key = "text" if "text" in names else names[0]
    examples = builder.as_data_source(split=split)
    for start in range(0, len(examples), 1000):
        for example in examples.__getitems__(list(range(start, min(start + 1000, len(examples))))):
            yield _clean(example[key].decode(errors="replace"))


def _tfds_builder(name: str, prepare: bool) -> Any:
    import tensorflow_datasets as tfds

    try:
        if fsspec.core.url_to_fs(name)[0].isdir(name):
            return tfds.builder_from_directory(name)
        # Registers the text data sets; most cannot be found by name before.
        importlib.import_module("tensorflow_datasets.text")
        builder = tfds.builder(name)
        if prepare and not builder.is_prepared():
            builder.download_and_prepare(file_format="array_record")
        return builder
    except (tfds.core.DatasetNotFoundError, ValueError, ImportError, OSError) as error:
        # TFDS's own lists every data set there is.
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"TFDS data set {name!r} cannot be prepared ({reason}); see tensorflow.org/datasets/catalog"
        ) from error
