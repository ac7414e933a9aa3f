"""Tokenizers that know the bytes behind each token: bytes, BPE and Unigram trained here, tokenizer.json.

All have

token_bytes: int32 [vocab_size], bytes of text that each token stands for, 0 for separator, padding and unused ids.
    Where the tokenizer is lossless the bytes of a text's tokens sum to the bytes of the text.
vocab_size: a multiple of 32, with two ids after the vocabulary proper: `separator` follows every document, `padding`
    fills the last window of an evaluation split. No text encodes to either.
fingerprint: equal for tokenizers that give the same ids.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from atlas.data import mixtures
from checked import UserError
from checked.files import parse_json, write_atomically
from checked.tokenizer_json import TokenizerJson, separator_and_padding

_ROUND_TO = 32
FILE = "tokenizer.json"
_ENCODE_AT_ONCE = 1000


class ByteTokenizer:
    """UTF-8 bytes: id = byte, 256 the separator, 257 padding.

    >>> print(*ByteTokenizer().encode_documents(["é"]))
    [195 169 256]
    """

    separator, padding, vocab_size = 256, 257, 288
    token_bytes = (np.arange(vocab_size) < 256).astype(np.int32)
    fingerprint = "bytes"

    def encode_documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Ids of each document, int32, with its separator at the end."""
        for text in texts:
            data = np.frombuffer(text.encode(), np.uint8)
            yield np.append(data, np.int32(self.separator))

    def decode(self, ids: np.ndarray) -> str:
        """Text of ids; what is no text is left out, and bytes that are no UTF-8 are replaced."""
        return bytes(ids[ids < 256].tolist()).decode(errors="replace")

    def save(self, directory: Path) -> None:
        """Nothing to write."""


class JsonTokenizer:
    """A tokenizer.json of the `tokenizers` library, with separator and padding behind its vocabulary.

    A space that it would put before each text (SentencePiece's dummy prefix) is switched off: it is no part
    of the text, and with it the bytes of the tokens would not sum to those of the text. Beginning- and
    end-of-text marks are not added, and the name of a special token is text.
    """

    def __init__(self, json_text: str, name: str = FILE):
        """Raises UserError where the text is no tokenizer."""
        try:
            file = TokenizerJson(parse_json(json_text), name)
        except ValueError as error:
            raise UserError(f"{name} is not a tokenizer.json ({error}); write one with Tokenizer.save") from error
        self._json, self._backend = json.dumps(file.without_space(), ensure_ascii=False), file.continuing()
        sizes = [len(data or b"") for data in file.table({})]
        self.separator, self.padding = separator_and_padding(len(sizes))
        self.vocab_size = -(-(len(sizes) + 2) // _ROUND_TO) * _ROUND_TO
        self.token_bytes = np.pad(np.array(sizes, np.int32), (0, self.vocab_size - len(sizes)))
        self.fingerprint = hashlib.blake2b(self._json.encode(), digest_size=8).hexdigest()

    def encode_documents(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Ids of each document, int32, with its separator at the end."""
        texts = iter(texts)
        while batch := list(itertools.islice(texts, _ENCODE_AT_ONCE)):
            # Encodes on all cores; "fast" leaves out offsets into the text.
            for encoding in self._backend.encode_batch_fast(batch, add_special_tokens=False):
                yield np.array([*encoding.ids, self.separator], np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """Text of ids; what is no text is left out, and bytes that are no UTF-8 are replaced."""
        return self._backend.decode(ids[self.token_bytes[ids] > 0].tolist(), skip_special_tokens=False)

    def save(self, directory: Path) -> None:
        """Writes the directory's tokenizer.json."""
        write_atomically(directory / FILE, self._json)


Tokenizer = ByteTokenizer | JsonTokenizer


def from_file(path: Path | str) -> JsonTokenizer:
    """A tokenizer.json; UserError where it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"tokenizer {str(path)!r} cannot be read ({error}); give the path of a tokenizer.json"
        ) from error
    return _read(text, str(path))


@functools.lru_cache(maxsize=2)
def _read(text: str, name: str) -> JsonTokenizer:
    """One that was just read is asked for again: the vocabulary of a large one takes a second."""
    return JsonTokenizer(text, name)


def named(name: str) -> Tokenizer:
    """The tokenizer that needs no training: "bytes", or the path of a tokenizer.json."""
    return ByteTokenizer() if name == "bytes" else from_file(name)


def saved(directory: Path, fingerprint: str) -> Tokenizer:
    """The tokenizer of a corpus' directory; UserError where its file has become another than that of a fingerprint."""
    if fingerprint == ByteTokenizer.fingerprint:
        return ByteTokenizer()
    found = from_file(directory / FILE)
    if found.fingerprint != fingerprint:
        raise UserError(
            f"{directory / FILE} is not the tokenizer that this corpus was built with; "
            "put that one back, or delete the directory and build the corpus again"
        )
    return found


def train(kind: str, vocab_size: int, texts: Iterable[str]) -> JsonTokenizer:
    """A byte-level BPE or Unigram tokenizer of at most `vocab_size` tokens: lossless on any text.

    Byte level instead of SentencePiece's character coverage: no text is unknown, whatever its script, and no
    coverage need be chosen.

    Args:
      kind: "bpe" or "unigram".
      vocab_size: tokens, the 256 byte symbols included; small samples give fewer.
      texts: training sample.
    """
    backend = Backend(models.BPE() if kind == "bpe" else models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    make_trainer = trainers.BpeTrainer if kind == "bpe" else trainers.UnigramTrainer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, make_trainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    return JsonTokenizer(backend.to_str())


def sample(texts: Mapping[str, Callable[[], Iterator[str]]], temperature: float, max_bytes: int) -> Iterator[str]:
    """Documents of a mixture of languages with shares ∝ bytes^(1/temperature), language by language.

    A language smaller than its share is repeated, as in training. Sizes are counted up to `max_bytes` a
    language: above it a language is as large as the whole sample, and differs little from its neighbours at
    any usual temperature.

    Args:
      texts: by language, what gives its documents from the start.
      temperature: ATLAS trains its vocabulary with 100.
      max_bytes: most bytes of the sample, over all languages; there are no more than the texts have.

    Raises:
      UserError: a language without text.
    """
    sizes = {language: sum(map(_size, _take(documents(), max_bytes))) for language, documents in texts.items()}
    for language, size in sizes.items():
        if not size:
            raise no_documents(language, "train")
    total = min(max_bytes, sum(sizes.values()))
    for language, share in mixtures.temperature(sizes, temperature).items():
        again = itertools.chain.from_iterable(texts[language]() for _ in itertools.count())
        yield from _take(again, total * share)


def no_documents(language: str, split: str) -> UserError:
    """The error of a language without text."""
    return UserError(f"{language} has no documents in its {split} split; add some, or leave the language out")


def _take(texts: Iterable[str], max_bytes: float) -> Iterator[str]:
    """The first documents, until they hold `max_bytes` bytes."""
    for text in texts:
        if max_bytes <= 0:
            return
        max_bytes -= _size(text)
        yield text


def _size(text: str) -> int:
    return len(text.encode())
