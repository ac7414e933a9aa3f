"""What text a corpus is made of and how it is cut."""

import re
from dataclasses import dataclass
from pathlib import Path

from atlas.data import tasks
from atlas.errors import UserError, unknown

SOURCES = ("synthetic", "jsonl", "madlad", "text", "tfds")
TRAINED_TOKENIZERS = ("bpe", "unigram")


@dataclass
class DataConfig:
    """Which text, in which tokens, in windows of which length.

    `input` by source: `jsonl` a directory of `<language>/{train,validation,test}.jsonl.gz`; `madlad` one of
    MADLAD-400's `<language>/clean_*.jsonl.gz`; `text` one of `<language>/*.txt` (one document a file); each
    may be any fsspec path, such as `gs://bucket/data`. `tfds` a TFDS name such as `wiki40b/{language}`, where
    `{language}` stands for each of `languages` (without it, `languages` is one label for the data set).
    `synthetic` takes none. `tasks` adds languages that are no languages: see `atlas.data.tasks`.
    """

    source: str = "synthetic"
    input: str = ""
    languages: tuple[str, ...] = ()  # none: all that the source has
    tokenizer: str = "bytes"  # "bytes", "bpe", "unigram", or the path of a tokenizer.json
    vocab_size: int = 64_000  # of a trained tokenizer, before separator, padding and rounding
    tokenizer_temperature: float = 100.0  # of the tokenizer's training mixture: 1 proportional, large uniform
    window: int = 256  # T, input tokens a window
    max_train_windows: int = 0  # cap on a language's unique training windows; 0: all
    tasks: tuple[str, ...] = ()  # retrieval tasks beside the languages of the source
    synthetic_tokens: int = 1_000_000  # bytes of training text a language or task, synthetic ones only
    seed: int = 0  # of the synthetic languages and of the tasks

    def validate(self) -> None:
        """Raises UserError naming the first field that no corpus can be made of."""
        if self.source not in SOURCES:
            raise unknown("data.source", self.source, SOURCES)
        if isinstance(self.languages, str) or len(set(self.languages)) < len(tuple(self.languages)):
            raise UserError(f"data.languages={self.languages!r}: give a list of different names")
        if self.source == "synthetic" and self.input:
            raise UserError(f"data.input={self.input!r}: the synthetic source reads nothing; set data.source")
        if self.source != "synthetic" and not self.input:
            raise UserError(f"data.input is missing: data.source={self.source} needs the place of the text")
        self._validate_numbers()
        self._validate_tokenizer()
        tasks.check(self.tasks, self.window, self.tokenizer)

    def _validate_numbers(self) -> None:
        at_least = {
            "window": 2,
            "max_train_windows": 0,
            "synthetic_tokens": 1,
            "seed": 0,
            "tokenizer_temperature": 1,
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise UserError(f"data.{name}={getattr(self, name)}: must be at least {least}")

    def _validate_tokenizer(self) -> None:
        if self.tokenizer in TRAINED_TOKENIZERS:
            # 256 byte symbols must always fit, or some text could not be encoded.
            if self.vocab_size < 257:
                raise UserError(f"data.vocab_size={self.vocab_size}: a trained tokenizer needs at least 257")
        elif self.tokenizer != "bytes" and not Path(self.tokenizer).is_file():
            names = ("bytes", *TRAINED_TOKENIZERS)
            if not re.search(r"[./\\]", self.tokenizer):
                raise unknown("data.tokenizer", self.tokenizer, (*names, "path/to/tokenizer.json"))
            raise UserError(f"data.tokenizer={self.tokenizer!r}: no such file; give a tokenizer.json or one of {names}")
