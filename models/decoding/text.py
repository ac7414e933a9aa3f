"""Text in, text out: prompts as strings or chats, several samples, stop strings, text as it comes."""

import codecs
import dataclasses
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from models.decoding.language_model import Voice, log_probabilities
from models.decoding.sampling import Sampling, require
from models.decoding.tokenizers import ByteView
from models.decoding.writing import Written, writing

Chat = Sequence[Mapping[str, str]]
Prompt = str | Chat

_NEW = 128  # tokens to write where nobody says how many, and as many fit


class Generated(NamedTuple):
    """What texts were continued with; rows are the samples of the first prompt, those of the second, and so on.

    texts: without stop strings and what follows them. logprobs: per row and token of `written`, the natural logarithm
    of its probability by the model itself (temperature 1, nothing cut or penalised), float32; None unless wanted.
    """

    texts: list[str]
    written: Written
    logprobs: list[list[float]] | None = None


def generate(
    target: Voice,
    prompts: Sequence[Prompt],
    *,
    logprobs: bool = False,
    on_text: Callable[[int, str], object] = lambda row, text: None,
    **options: Any,
) -> Generated:
    """Continues texts.

    Args:
      prompts: texts, or chats: messages with "role" and "content", for models whose tokenizer has a template.
      logprobs: whether probabilities of the new tokens are wanted, which costs another reading of the texts.
      on_text: called with a row and its next characters as soon as they are certain.
      options: those of `stream`.

    Raises:
      ValueError: one line that names what is wrong.
    """
    rows = _Rows(target, prompts, **options)
    for piece in rows.pieces():
        on_text(*piece)
    scores = log_probabilities(target, rows.prompts, rows.written.tokens) if logprobs else None
    return Generated([row.text for row in rows.rows], rows.written, scores)


def stream(target: Voice, prompts: Sequence[Prompt], **options: Any) -> Iterator[tuple[int, str]]:
    """Continues texts, and yields a row and its next characters as soon as they are certain.

    Args:
      prompts: as in `generate`.
      max_new_tokens: most tokens to write in a row; default what fits the model's window, at most 128.
      n: samples of every prompt. Where the sampling has one seed, they take that and the next ones.
      stop_strings: end a row where its text reaches one of them; neither it nor what follows is part of the text.
      options: those of `writing`.
    """
    return _Rows(target, prompts, **options).pieces()


class _Rows:
    """A batch of prompts and what is written behind them."""

    written: Written

    def __init__(
        self,
        target: Voice,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        n: int = 1,
        stop_strings: Sequence[str] = (),
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        **options: Any,
    ):
        require(not isinstance(prompts, str), "prompts", prompts, "must be a list of prompts")
        require(n > 0, "n", n, "must be at least 1")
        encode = target.tokenizer.encode_prompt, target.tokenizer.encode_chat
        self.prompts = [encode[not isinstance(prompt, str)](prompt) for prompt in prompts for _ in range(n)]
        if n > 1 and isinstance(sampling.seed, int):
            sampling = dataclasses.replace(sampling, seed=[sampling.seed + i for _ in prompts for i in range(n)])
        if max_new_tokens is None:
            room = (target.model.context or math.inf) - max(map(len, self.prompts), default=0)
            max_new_tokens = int(max(1, min(_NEW, room)))
        self._run = writing(target, self.prompts, max_new_tokens, sampling=sampling, **options)
        self.rows = [_Row(target.tokenizer, stop_strings) for _ in self.prompts]

    def pieces(self) -> Generator[tuple[int, str], None, None]:
        """Rows and their next characters, until all is written."""
        ended = None
        while True:
            try:
                tokens = self._run.send(ended)
            except StopIteration as end:
                self.written = end.value
                break
            yield from self._push(tokens)
            ended = [row.ended for row in self.rows]
        yield from self._push([()] * len(self.rows), final=True)

    def _push(self, tokens: Sequence[Sequence[int]], final: bool = False) -> Iterator[tuple[int, str]]:
        for i, (row, ids) in enumerate(zip(self.rows, tokens, strict=True)):
            if piece := row.push(ids, final):
                yield i, piece


class _Row:
    """The text of one row, as far as it is certain: what may be the beginning of a stop string is held back."""

    def __init__(self, tokenizer: ByteView, stop_strings: Sequence[str]):
        self._tokenizer, self._stops = tokenizer, [s for s in stop_strings if s]
        # Characters are certain when they are complete; what is not UTF-8 becomes U+FFFD.
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._read = 0
        self._held = ""
        self.text, self.ended = "", False

    def push(self, ids: Sequence[int], final: bool = False) -> str:
        """All tokens so far, or the end of them; returns the characters that are new and certain."""
        if self.ended:
            return ""
        self._held += self._characters.decode(self._tokenizer.decode(ids[self._read :]), final)
        self._read = len(ids)
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        self.ended = bool(found)
        # The longest end of the held text that begins a stop string is doubtful.
        starts = [n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])]
        end = min(found, default=len(self._held) - (0 if final else max(starts, default=0)))
        piece, self._held = self._held[:end], self._held[end:]
        self.text += piece
        return piece
