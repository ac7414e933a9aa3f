"""Text in, text out: prompts as strings, stop strings, text as it comes."""

import codecs
from collections.abc import Callable, Sequence
from typing import Any

from models.decoding.generate import Written, write
from models.decoding.language_model import Voice
from models.decoding.tokenizers import ByteView


def write_text(
    target: Voice,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    stop_strings: Sequence[str] = (),
    on_text: Callable[[int, str], object] = lambda row, text: None,
    **options: Any,
) -> tuple[list[str], Written]:
    """Continues texts.

    Args:
      stop_strings: end a row where its text reaches one of them; neither it nor what follows is part of the text.
      on_text: called with a row and its next characters as they are certain.
      options: those of `write`, but for `on_tokens`.

    Returns:
      The new texts, and what `write` says of them. Its tokens may go beyond a stop string.

    Raises:
      ValueError: one line that names what is wrong.
    """
    rows = [_Row(target.tokenizer, stop_strings) for _ in prompts]

    def on_tokens(tokens: list[list[int]]) -> list[bool]:
        for i, (row, ids) in enumerate(zip(rows, tokens, strict=True)):
            if piece := row.push(ids):
                on_text(i, piece)
        return [row.ended for row in rows]

    encoded = [target.tokenizer.encode_prompt(prompt) for prompt in prompts]
    written = write(target, encoded, max_new_tokens, on_tokens=on_tokens, **options)
    for i, row in enumerate(rows):
        if piece := row.push((), final=True):
            on_text(i, piece)
    return [row.text for row in rows], written


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
