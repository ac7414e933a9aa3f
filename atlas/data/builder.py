"""The TFDS data set behind a corpus; a module of its own, so that TFDS is imported only to build."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

with tfds.core.registered.skip_registration():

    class Windows(tfds.core.GeneratorBasedBuilder):
        """Windows of one language, a TFDS config each, as ArrayRecord, which needs no TensorFlow."""

        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, directory: Path, language: str, window: int, splits: Mapping[str, Iterable[np.ndarray]]):
            """Writes below `directory` what `splits` yields: int32 windows [T+1] by split."""
            self._window, self._splits = window, splits
            config = tfds.core.BuilderConfig(name=language)
            super().__init__(data_dir=directory, config=config, file_format="array_record")

        def _info(self) -> tfds.core.DatasetInfo:
            # Bytes are decoded in one go; the default spells each token as a variable-length integer.
            tokens = tfds.features.Tensor(shape=(self._window + 1,), dtype=np.int32, encoding="bytes")
            features = tfds.features.FeaturesDict({"tokens": tokens})
            # The order of the text is kept: batches are shuffled when drawn, with a seed of their own.
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, download_manager: object) -> dict[str, Iterator[tuple[int, dict[str, np.ndarray]]]]:
            return {split: self._generate_examples(windows) for split, windows in self._splits.items()}

        def _generate_examples(self, windows: Iterable[np.ndarray]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
            for i, tokens in enumerate(windows):
                yield i, {"tokens": tokens}
