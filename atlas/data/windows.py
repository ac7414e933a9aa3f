"""Windows of T+1 tokens: cut from a stream, written by TFDS as ArrayRecord, read by random access."""

import contextlib
import io
import itertools
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from absl import logging

_VERSION = "1.0.0"
_READ_AT_ONCE, _READ_ONE_BY_ONE = 8192, 8


def cut(documents: Iterable[np.ndarray], window: int, padding: int | None = None) -> Iterator[np.ndarray]:
    """Windows [T+1] with stride T of the concatenated documents: each token but the first is a target once.

    Args:
      documents: int32 ids, each with its separator at the end.
      window: T.
      padding: fills the last window; None drops it when it is not full.

    >>> print(*cut([np.arange(4, dtype=np.int32), np.arange(4, 6, dtype=np.int32)], 2, padding=9))
    [0 1 2] [2 3 4] [4 5 9]
    """
    stream, some, size = np.empty(0, np.int32), [], 0
    for document in itertools.chain(documents, [None]):
        if document is not None:
            some.append(document)
            size += len(document)
        # Joining documents one by one would copy the stream each time.
        if size >= 256 * window or document is None:
            stream = np.concatenate([stream, *some])
            full = max(0, (len(stream) - 1) // window) * window
            yield from (stream[start : start + window + 1] for start in range(0, full, window))
            stream, some, size = stream[full:], [], 0
    if padding is not None and len(stream) > 1:
        yield np.pad(stream, (0, window + 1 - len(stream)), constant_values=padding)


class StoredWindows:
    """Windows of a split of the TFDS data set in a directory, read when asked for."""

    def __init__(self, directory: Path, split: str):
        import tensorflow_datasets as tfds
        from tensorflow_datasets.proto import tf_example_pb2

        # TFDS would decode each record by its own general path, which takes three times as long.
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._records = tfds.builder_from_directory(directory).as_data_source(split=split, deserialize_method=raw)
        self._parse = tf_example_pb2.Example.FromString

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Windows at indices [n], int32 [n, T+1]."""
        indices = np.asarray(indices).tolist()
        # One call for many starts a pool of threads, which costs as much as some records one by one.
        few = len(indices) <= _READ_ONE_BY_ONE
        records = [self._records[i] for i in indices] if few else self._records.__getitems__(indices)
        tokens = [self._parse(record).features.feature["tokens"].bytes_list.value[0] for record in records]
        return np.frombuffer(b"".join(tokens), np.int32).reshape(len(indices), -1)


# Windows by index: `windows[indices]` is int32 [n, T+1] for indices [n].
WindowSource = np.ndarray | StoredWindows


def write(directory: Path, name: str, window: int, splits: Mapping[str, Iterable[np.ndarray]]) -> None:
    """Builds a language's TFDS data set from windows by split; it gets its name when it is whole."""
    import tensorflow_datasets as tfds

    class Builder(tfds.dataset_builders.AdhocBuilder, skip_registration=True):  # type: ignore[call-arg]
        """The inherited way to its splits imports TensorFlow, which ArrayRecord does not need."""

        def _split_generators(self, _: object) -> dict[str, Iterator]:
            return {split: self._generate_examples_iterator(its) for split, its in self._split_datasets.items()}

    # Bytes are decoded in one go; the default spells each token as a variable-length integer.
    tokens = tfds.features.Tensor(shape=(window + 1,), dtype=np.int32, encoding="bytes")
    # What an interrupted build left is not resumed: a language is the unit of that.
    shutil.rmtree(_path(directory, name).parent, ignore_errors=True)
    of_tfds = [directory / "windows" / made for made in (".downloads", ".config")]
    # Without TFDS's bars and announcements of every data set: our one bar counts languages and bytes.
    tfds.disable_progress_bar()
    with contextlib.ExitStack() as quiet:
        quiet.callback(logging.set_verbosity, logging.get_verbosity())
        quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
        logging.set_verbosity(logging.ERROR)
        # A builder makes a temporary directory for what it might download, and leaves it.
        quiet.callback(setattr, tempfile, "tempdir", tempfile.tempdir)
        tempfile.tempdir = quiet.enter_context(tempfile.TemporaryDirectory(prefix=".tfds-", dir=directory))
        builder = Builder(
            name="windows",
            config=name,
            version=_VERSION,
            data_dir=directory,
            features=tfds.features.FeaturesDict({"tokens": tokens}),
            split_datasets={k: ((i, {"tokens": row}) for i, row in enumerate(rows)) for k, rows in splits.items()},
            file_format="array_record",
            disable_shuffling=True,  # batches are shuffled when drawn, with a seed of their own
        )
        builder.download_and_prepare(download_dir=of_tfds[0])
    for made in of_tfds:
        shutil.rmtree(made, ignore_errors=True)


def read(directory: Path, name: str, split: str, in_memory: bool) -> WindowSource:
    """The windows of a split that `write` wrote."""
    stored = StoredWindows(_path(directory, name), split)
    if not in_memory:
        # A truncated file is noticed now, not in the middle of training.
        stored[np.array([len(stored) - 1])]
        return stored
    parts = np.array_split(np.arange(len(stored)), 1 + len(stored) // _READ_AT_ONCE)
    return np.concatenate([stored[part] for part in parts])


def _path(directory: Path, name: str) -> Path:
    return directory / "windows" / name / _VERSION
