"""What text a corpus is made of and how it is cut."""

import re
from dataclasses import dataclass

from atlas.data import tasks
from checked import Checked, UserError, field, unknown

SOURCES = ("synthetic", "jsonl", "madlad", "text", "tfds")
TRAINED_TOKENIZERS = ("bpe", "unigram")
NAME = r"\w[\w.-]{0,99}"  # of a language: part of mixtures, columns and paths
_LEAST_VOCABULARY = 257  # 256 byte symbols must always fit, or some text could not be encoded


@dataclass(frozen=True)
class DataConfig(Checked, section="data"):
    """Which text, in which tokens, in windows of which length.

    `input` by source: `jsonl` a directory of `<language>/{train,validation,test}.jsonl.gz`; `madlad` one of
    MADLAD-400's `<language>/clean_*.jsonl.gz`; `text` one of `<language>/*.txt` (one document a file); each
    may be any fsspec path, such as `gs://bucket/data`. `tfds` a TFDS name such as `wiki40b/{language}`, where
    `{language}` stands for each of `languages` (without it, `languages` is one label for the data set).
    `synthetic` takes none. `tasks` adds languages that are no languages: see `atlas.data.tasks`.
    """

    source: str = field("synthetic", "where text comes from", choices=SOURCES)
    input: str = field("", "directory, fsspec path or TFDS name; none for synthetic")
    languages: tuple[str, ...] = field((), "names; none takes all that the source has", pattern=NAME)
    tokenizer: str = field("bytes", "bytes, bpe, unigram, or the path of a tokenizer.json")
    vocab_size: int = field(64_000, "of a trained tokenizer, before padding and rounding", unit="tokens", least=1)
    tokenizer_temperature: float = field(100.0, "of its training mixture: 1 as sizes are, large uniform", least=1)
    window: int = field(256, "T, input of a window", unit="tokens", least=2)
    max_train_windows: int = field(0, "unique training windows a language, at most; 0: all", least=0)
    tasks: tuple[str, ...] = field((), "retrieval tasks beside the languages of the source", choices=tasks.TASKS)
    synthetic_tokens: int = field(1_000_000, "training text of a synthetic language or task", unit="bytes", least=1)
    seed: int = field(0, "of the synthetic languages and of the tasks", least=0)

    def check(self) -> None:
        for name in ("languages", "tasks"):
            values = getattr(self, name)
            self.require(len(set(values)) == len(values), name, "must be different names")
        if self.source == "synthetic":
            self.require(not self.input, "input", "is not read by the synthetic source; set data.source")
            for name in self.languages:
                if not re.fullmatch(r"[a-z][1-9]\d?", name):
                    raise UserError(
                        f"synthetic language {name!r}: names are a family's letter and a number, such as a1, a2, b1"
                    )
        else:
            self.require(
                self.input != "", "input", f"is missing: data.source={self.source} needs the place of the text"
            )
        known = ("bytes", *TRAINED_TOKENIZERS)
        if self.tokenizer not in known and not re.search(r"[./\\]", self.tokenizer):
            raise unknown("data.tokenizer", self.tokenizer, (*known, "path/to/tokenizer.json"))
        if self.tokenizer in TRAINED_TOKENIZERS:
            self.require(self.vocab_size >= _LEAST_VOCABULARY, "vocab_size", f"must be {_LEAST_VOCABULARY} or more")
        if self.tasks:
            self.require(self.window >= tasks.SHORTEST, "window", f"must hold a task's {tasks.SHORTEST} tokens")
            self.require(self.tokenizer == "bytes", "tokenizer", "must be 'bytes': the lengths of tasks are in bytes")
