"""Tokenizers as bytes: what each id stands for, and the ids of bytes that continue a text.

Two models with different vocabularies share one thing, the bytes they have written. Strings would not do: a
token may be a part of a character, vocabularies spell spaces in their own ways, and a decoder cleans up.
"""

from __future__ import annotations

import codecs
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from checked.tokenizer_json import ROLES, TokenizerJson, read, separator_and_padding
from models.decoding import chat

FILE = "tokenizer.json"
_LONE_BYTES = re.compile("([\udc80-\udcff]+)")

Encoder = Callable[[bytes, bytes], list[int]]


@dataclasses.dataclass(frozen=True, eq=False)
class ByteView:
    """A tokenizer as bytes: what its ids stand for, and the ids of bytes.

    Fields:
      table: the bytes of every id below `vocab_size`; None for special tokens (beginning and end of text,
        padding, unknown, markers of a chat) and for ids that no token has.
      encoder: `encode` without its default.
      prompter: ids of a prompt without `begin`; None means those of `encode`.
      roles: ids of "bos", "eos", "pad" and "unk"; a role that no file gives is (). Of several ends of text the
        tokenizer's own is first.
      begin: the special ids that a prompt starts with.
      template: how a chat is written as one text, if the model has a template.
    """

    table: tuple[bytes | None, ...] = dataclasses.field(repr=False)
    encoder: Encoder
    prompter: Callable[[str], list[int]] | None = None
    roles: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=lambda: dict.fromkeys(ROLES, ()))
    begin: tuple[int, ...] = ()
    template: chat.Template | None = dataclasses.field(default=None, repr=False)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id. A model may have more rows."""
        return len(self.table)

    def token_bytes(self, token: int) -> bytes | None:
        """Bytes of an id; None for special tokens and for ids outside the vocabulary."""
        return self.table[token] if 0 <= token < len(self.table) else None

    def encode(self, text: bytes, left: bytes = b"") -> list[int]:
        """Ids of `text` as the continuation of `left`.

        Neither a beginning of text nor the space that SentencePiece puts before a text is added, and what
        looks like a special token is text. Bytes that are not UTF-8 become tokens of single bytes, also a
        character whose end is missing: hold that back (`complete_prefix`) if the rest is to come.

        Of `left` the last few bytes are enough: they matter where it ends inside a character.
        """
        return self.encoder(text, left)

    def below(self, rows: int) -> ByteView:
        """The same tokenizer without what it says of ids from `rows` on."""
        roles = {role: tuple(i for i in ids if i < rows) for role, ids in self.roles.items()}
        return dataclasses.replace(self, table=self.table[:rows], roles=roles)

    def with_separator(self) -> ByteView:
        """The same tokenizer with the two ids behind its own that our training adds: see `separator_and_padding`."""
        separator, padding = separator_and_padding(self.vocab_size)
        roles = {"bos": (separator,), "eos": (separator,), "pad": (padding,), "unk": ()}
        return ByteView((*self.table, None, None), self.encoder, roles=roles, begin=(separator,))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a chat whose next message the model is to write, in the form that its template gives.

        Args:
          messages: with "role" and "content".

        Raises:
          ValueError: the tokenizer has no template, or the template refuses the messages.
        """
        if not self.template or self.prompter is None:
            raise ValueError("the model's tokenizer has no chat template; give prompts as text")
        return self.prompter(chat.render(self.template, messages))

    def encode_prompt(self, text: str) -> list[int]:
        """Ids that the model was trained to see for a text from its beginning.

        Those of the tokenizer's own library: with `begin`, with SentencePiece's space before the text, and
        with special tokens where the text names them. So `decode` gives the text up to that space, to special
        tokens and to normalization.
        """
        return [*self.begin, *(self.encode(text.encode()) if self.prompter is None else self.prompter(text))]

    def decode(self, ids: Iterable[int]) -> bytes:
        """Concatenated bytes of the ids; special tokens stand for nothing."""
        return b"".join(self.token_bytes(i) or b"" for i in ids)


def complete_prefix(data: bytes) -> int:
    """Length of `data` without a character at its end that more bytes could complete.

    >>> complete_prefix("aé".encode()), complete_prefix("aé".encode()[:-1]), complete_prefix(b"a\\xff")
    (3, 1, 2)
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    # A character has at most four bytes, so that an unfinished one has at most three.
    decoder.decode(data[-3:])
    return len(data) - len(decoder.getstate()[0])


def load_tokenizer(path: Path | str) -> ByteView:
    """The tokenizer of a tokenizer.json.

    Supported are byte-level BPE and Unigram (GPT-2, Llama 3, Qwen) and SentencePiece-style BPE and Unigram with or
    without byte fallback (Llama 2, Mistral, Gemma); which one it is, is read from the file's normalizer,
    pre-tokenizer and model.

    Args:
      path: the file, or the directory that holds it. Ids by role come from generation_config.json, config.json,
        tokenizer_config.json and special_tokens_map.json beside it, from the first that gives the role.

    Raises:
      ValueError: a file is missing or damaged, or the kind of tokenizer is not supported.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    file = TokenizerJson(read(path), path)
    file.check()
    roles = file.roles(path.parent)
    table = file.table(roles)
    encoder = _Encoder(file.continuing(), table, file.unknown)
    if not (encoder.exact or file.unknown or file.model == "BPE"):
        raise ValueError(f"{path}: {file.model} without an unknown token cannot encode every text; give it one")
    return ByteView(
        table=table,
        encoder=encoder,
        prompter=lambda text: file.library.encode(text, add_special_tokens=False).ids,
        roles=roles,
        begin=file.begin(),
        template=chat.read_template(path.parent),
    )


def byte_tokenizer() -> ByteView:
    """Bytes as they are: id = byte."""
    return ByteView(tuple(bytes([i]) for i in range(256)), lambda text, left: list(text))


class _Encoder:
    """Bytes to ids, exactly where every byte has a token."""

    def __init__(self, backend: Tokenizer, table: Sequence[bytes | None], unknown: tuple[int, ...]):
        self._backend, self._table, self._unknown = backend, table, unknown
        self._byte_ids: dict[int, int] = {}
        for i, data in enumerate(table):
            if data is not None and len(data) == 1:
                self._byte_ids.setdefault(data[0], i)
        self.exact = len(self._byte_ids) == 256

    def __call__(self, text: bytes, left: bytes) -> list[int]:
        unfinished = left[complete_prefix(left) :]
        if unfinished and self.exact:
            # Byte-level tokens end inside characters, and what is left of one may be one token with what follows.
            ids = self._runs(unfinished + text)
            sizes = list(itertools.accumulate(len(self._table[i]) for i in ids))
            if len(unfinished) in sizes:
                return ids[sizes.index(len(unfinished)) + 1 :]
        return self._runs(text)

    def _runs(self, text: bytes) -> list[int]:
        ids: list[int] = []
        for run in _LONE_BYTES.split(text.decode(errors="surrogateescape")):
            if run and _LONE_BYTES.match(run):
                ids += self._bytes(run.encode(errors="surrogateescape"))
            elif run:
                ids += self._characters(run)
        return ids

    def _bytes(self, data: bytes) -> list[int]:
        if self.exact:
            return [self._byte_ids[byte] for byte in data]
        return list(self._unknown[:1])

    def _characters(self, text: str) -> list[int]:
        ids = self._backend.encode(text, add_special_tokens=False).ids
        if not self.exact:
            # Unigram finds the names of special tokens in the text.
            return [i for i in ids if self._table[i] is not None or i in self._unknown]
        data = [self._table[i] for i in ids]
        if None not in data and b"".join(data) == text.encode():
            return ids
        # A normalizer, or a text with the mark for spaces or a special token's name in it: what differs is
        # spelled by its bytes. Halving finds it, and leaves the rest in few pieces.
        if len(text) == 1:
            return self._bytes(text.encode())
        half = len(text) // 2
        return self._characters(text[:half]) + self._characters(text[half:])
