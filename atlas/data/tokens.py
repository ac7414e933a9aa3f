"""Tokens of parts of a corpus: made by this process or by workers, and kept in files until windows are cut."""

import collections
import contextlib
import io
import itertools
import logging
import multiprocessing
import os
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from atlas.data import tokenizers
from atlas.data.config import DataConfig
from atlas.data.sources import HELD_OUT_BYTES, SPLITS, Part, Source, claimant, open_source
from atlas.data.tokenizers import Tokenizer
from checked import UserError
from checked.files import write_atomically
from checked.processes import follow_parent

Unit = tuple[str, Part]  # a language, and a part of it

_LOG = logging.getLogger(__name__)
_DIRECTORY = "tokens"
_DAMAGED = (zipfile.BadZipFile, ValueError, KeyError, EOFError)  # what reading such a file raises
_SPARE = 2  # parts that are ready before a worker would have to wait for one


class Tokens(NamedTuple):
    """The documents of a part.

    ids: uint16 or int32, of all documents one after another, each with its separator at the end. length, num_bytes:
    int64 [n], tokens of each document, and bytes of its text. split: uint8 [n], the number of its split in SPLITS,
    unless that is full. altered: bool [n], whether its tokens stand for other bytes than its text has.
    """

    ids: np.ndarray
    length: np.ndarray
    num_bytes: np.ndarray
    split: np.ndarray
    altered: np.ndarray


def tokenize(part: Part, texts: Iterable[str], tokenizer: Tokenizer, most: float) -> Tokens:
    """The tokens of a part's documents, without those for training that come after `most` tokens for it."""
    facts: list[tuple[int, int]] = []  # of documents on their way
    room, train = dict.fromkeys(part.held_out, HELD_OUT_BYTES), 0

    def wanted() -> Iterator[str]:
        for text in filter(None, texts):
            data = text.encode()
            split = claimant(data) if part.held_out else part.split
            if part.held_out and room.get(split, 0) <= 0:
                split = part.split
            if split in room:
                room[split] -= len(data)
            elif split == "train" and train >= most:
                if any(left > 0 for left in room.values()):
                    continue
                return
            facts.append((SPLITS.index(split), len(data)))
            yield text

    documents = []
    for document in tokenizer.encode_documents(wanted()):
        train += len(document) * (facts[len(documents)][0] == SPLITS.index("train"))
        documents.append(document)
    small = tokenizer.vocab_size <= np.iinfo(np.uint16).max + 1
    ids = np.concatenate([np.empty(0, np.int32), *documents]).astype(np.uint16 if small else np.int32)
    length = np.array([len(document) for document in documents], np.int64)
    split, num_bytes = np.array(facts, np.int64).reshape(-1, 2).T
    upto = np.cumsum(tokenizer.token_bytes[ids])[np.cumsum(length) - 1] if len(ids) else length
    stands_for = np.diff(upto, prepend=0)
    return Tokens(ids, length, num_bytes, split.astype(np.uint8), stands_for != num_bytes)


class Maker:
    """Gives the tokens of units, asked for in their order; with several workers they are made ahead.

    Tokens that an earlier process has made are taken from their files. A context manager, which ends the workers.
    """

    def __init__(self, config: DataConfig, directory: Path, tokenizer: Tokenizer, units: Iterable[Unit], workers: int):
        self._config, self._directory, self._tokenizer = config, directory, tokenizer
        self._source = open_source(config)
        self._units, self._workers = collections.deque(units), workers
        self._futures: dict[Unit, Future] = {}
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Maker":
        self._others = set(multiprocessing.active_children())
        if self._workers > 1 and self._units:
            # Not by fork: a process that has started JAX, or its tokenizer's threads, must not be copied.
            spawn = multiprocessing.get_context("spawn")
            # Not the tokenizer itself, which a process that is slow to start would be slow to take.
            start = self._config, self._directory, self._tokenizer.fingerprint
            self._pool = ProcessPoolExecutor(self._workers, spawn, _begin, start)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            own = set(multiprocessing.active_children()) - self._others
            self._pool.shutdown(wait=False, cancel_futures=True)
            for process in own:
                process.terminate()

    def __call__(self, language: str, part: Part) -> Tokens:
        """The tokens of a unit; those before it are no longer wanted."""
        unit = language, part
        while self._units and self._units[0] != unit:
            if future := self._futures.pop(self._units.popleft(), None):
                future.cancel()
        if self._pool:
            try:
                for ahead in itertools.islice(self._units, self._workers + _SPARE):
                    if ahead not in self._futures:
                        self._futures[ahead] = self._pool.submit(_work, ahead)
                self._futures.pop(unit).result()
            except BrokenProcessPool as error:
                raise UserError(
                    f"a worker died over {language}/{part.name} or its neighbours, perhaps for memory; the same "
                    "command with fewer --workers goes on"
                ) from error
        if self._units:
            self._units.popleft()
        return _make(self._config, self._directory, self._source, self._tokenizer, unit)


def enough(config: DataConfig, directory: Path, language: str, parts: Iterable[Part]) -> bool:
    """Whether the files of these parts, the first of a language, hold all that it needs: not without a cap."""
    train, room = 0, dict.fromkeys(SPLITS[1:], 0)
    for part in parts:
        try:
            with np.load(_path(directory, language, part)) as file:
                length, num_bytes, split = file["length"], file["num_bytes"], file["split"]
        except (FileNotFoundError, *_DAMAGED):
            return False
        train += int(length[split == SPLITS.index("train")].sum())
        room |= {name: room[name] + int(num_bytes[split == SPLITS.index(name)].sum()) for name in part.held_out}
        held_out = part.held_out
    return train >= most_tokens(config) and all(room[name] >= HELD_OUT_BYTES for name in held_out)


def place(directory: Path, language: str = "") -> Path:
    """Where tokens lie, of a language or of all, to be deleted once windows are written."""
    return directory / _DIRECTORY / language


def _make(config: DataConfig, directory: Path, source: Source, tokenizer: Tokenizer, unit: Unit) -> Tokens:
    """Reads what is there, or makes and writes it."""
    language, part = unit
    path = _path(directory, language, part)
    with contextlib.suppress(FileNotFoundError):
        try:
            with np.load(path) as file:
                return Tokens(*(file[name] for name in Tokens._fields))
        except _DAMAGED:
            _LOG.warning("%s is damaged and is made anew", path)
    tokens = tokenize(part, source.texts(language, part.name), tokenizer, most_tokens(config))
    buffer = io.BytesIO()
    np.savez(buffer, **tokens._asdict())
    write_atomically(path, buffer.getvalue())
    return tokens


def _path(directory: Path, language: str, part: Part) -> Path:
    return place(directory, language) / f"{part.name}.npz"


def most_tokens(config: DataConfig) -> float:
    """Tokens that the windows for training of a language are cut from, at most."""
    return config.max_train_windows * config.window + 1 if config.max_train_windows else float("inf")


def _begin(config: DataConfig, directory: Path, tokenizer: str) -> None:
    """What a worker process does first."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # workers are the parallelism
    follow_parent()
    _here.append((config, directory, open_source(config), tokenizers.saved(directory, tokenizer)))


_here: list[tuple[DataConfig, Path, Source, Tokenizer]] = []  # of a worker process


def _work(unit: Unit) -> None:
    _make(*_here[0], unit)
