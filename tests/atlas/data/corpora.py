"""Small corpora for the tests of this room."""

import gzip
import json
from pathlib import Path

import numpy as np


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)


def write_corpus(root: Path, languages: dict[str, list[str]]) -> Path:
    """`<language>/{train,validation,test}.jsonl.gz`; held-out splits hold the first text."""
    for language, texts in languages.items():
        write_jsonl(root / language / "train.jsonl.gz", texts)
        for split in ("validation", "test"):
            write_jsonl(root / language / f"{split}.jsonl.gz", texts[:1])
    return root


class FakeCorpus:
    """A corpus without files: window i of a language holds only i."""

    def __init__(self, window: int = 4, **num_windows: int):
        self.languages, self.window = tuple(num_windows), window
        self._num_windows = num_windows

    def windows(self, language: str, split: str) -> "FakeCorpus._Windows":
        return self._Windows(self._num_windows[language], self.window)

    class _Windows:
        def __init__(self, n: int, window: int):
            self._n, self._window = n, window

        def __len__(self) -> int:
            return self._n

        def __getitem__(self, indices: np.ndarray) -> np.ndarray:
            return np.repeat(np.asarray(indices, np.int32)[:, None], self._window + 1, axis=1)
