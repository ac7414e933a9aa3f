"""A tokenizer.json of every kind that is read, trained on the spot."""

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from models.decoding.tokenizers import ByteView, load_tokenizer

PROSE = (
    "the quick brown fox jumps over lazy dog play playing player played unplayable reading reads read model models "
    "token tokens tokenize tokenizer tokenization language languages I'm don't we'll café naïve über Straße мир привет "
    "слово 日本語 言語 東京 θεωρία 😀 👩‍💻 🇫🇷 12 345 2024 def return self.x == None: {key} (value) [0] // # -> \t\t"
)
WORDS = PROSE.split(" ")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTES = [f"<0x{i:02X}>" for i in range(256)]
CONTROLS = ["<unk>", "<s>", "</s>"]


@functools.cache
def corpus(seed: int = 0) -> tuple[str, ...]:
    """Sentences of words that return, joined by the usual spaces and line ends."""
    rng = random.Random(seed)
    ends = (" ", " ", " ", " ", " ", ", ", ". ", "\n", "\r\n", "  ")
    return tuple("".join(rng.choice(WORDS) + rng.choice(ends) for _ in range(12)) for _ in range(250))


def _train(tokenizer: Tokenizer, trainer: type, vocab_size: int, **options) -> Tokenizer:
    tokenizer.train_from_iterator(corpus(), trainer(vocab_size=vocab_size, show_progress=False, **options))
    return tokenizer


def _begin_with(tokenizer: Tokenizer, name: str) -> None:
    tokenizer.add_special_tokens([name])
    special = [(name, tokenizer.token_to_id(name))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{name} $A", special_tokens=special)


def _bytes() -> Tokenizer:
    """Our own: id = byte, 256 the separator that documents begin and end with, 257 padding."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [c for c in characters if ord(c) >= 0x100]
    vocabulary = {chr(i) if i in printable else others.pop(0): i for i in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    _begin_with(tokenizer, "<|separator|>")
    tokenizer.add_special_tokens(["<|padding|>"])
    return tokenizer


def _byte_level(vocab_size: int, *, space: bool = False, split: str = "", nfc: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=not split)
    pattern = pre_tokenizers.Split(Regex(split), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pattern, bytes_of]) if split else bytes_of
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, trainers.BpeTrainer, vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    _begin_with(tokenizer, "<|begin_of_text|>")
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer.add_special_tokens(["<|end_of_text|>"])
    return tokenizer


def _byte_unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _train(tokenizer, trainers.UnigramTrainer, 400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def _sentence_piece(kind: str, *, metaspace: bool, vocab_size: int = 700) -> Tokenizer:
    """With byte fallback. Space before the text: by a normalizer as Llama 2 has it, or by Metaspace."""
    is_bpe = kind == "bpe"
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True) if is_bpe else models.Unigram())
    # Trained on words, as SentencePiece does, whatever the tokenizer splits later.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    options = {"special_tokens": CONTROLS + BYTES} | ({} if is_bpe else {"unk_token": "<unk>"})
    _train(tokenizer, trainers.BpeTrainer if is_bpe else trainers.UnigramTrainer, vocab_size, **options)
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=not is_bpe)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] in CONTROLS]
    description["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(description))
    _begin_with(tokenizer, "<s>")
    return tokenizer


def _gemma() -> Tokenizer:
    """Runs of spaces and of line ends are tokens of the model, and listed as added tokens that are not special."""
    description = json.loads(_sentence_piece("bpe", metaspace=False).to_str())
    model, runs = description["model"], ["\n\n", "▁▁", "▁▁▁", "▁▁▁▁"]
    model["vocab"] |= {run: len(model["vocab"]) + i for i, run in enumerate(runs) if run not in model["vocab"]}
    model["merges"] = [["▁", "▁"], ["▁▁", "▁▁"], ["▁▁", "▁"], *model["merges"]]
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    description["added_tokens"] += [{"id": model["vocab"][run], "content": run} | plain for run in runs]
    description["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer = Tokenizer.from_str(json.dumps(description | {"pre_tokenizer": split}))
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


def _t5() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return _train(tokenizer, trainers.UnigramTrainer, 400, special_tokens=["</s>", "<unk>"], unk_token="<unk>")


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": _bytes,
    "gpt2": lambda: _byte_level(700),
    "roberta": lambda: _byte_level(500, space=True),
    "llama3": lambda: _byte_level(900, split=LLAMA3),
    "qwen": lambda: _byte_level(600, split=LLAMA3, nfc=True),
    "byte unigram": _byte_unigram,
    "llama2": lambda: _sentence_piece("bpe", metaspace=False),
    "mistral": lambda: _sentence_piece("bpe", metaspace=True, vocab_size=600),
    "unigram": lambda: _sentence_piece("unigram", metaspace=True),
    "gemma": _gemma,
    "t5": _t5,
}
COMPLETE = [name for name in KINDS if name != "t5"]
# Kinds that put a space before a text, which must not come back where a text goes on.
SPACED = ["roberta", "llama2", "mistral", "unigram", "t5"]


@functools.cache
def library(kind: str) -> Tokenizer:
    """The library's own tokenizer."""
    return KINDS[kind]()


def save(directory: Path, content: str | dict, **files: dict) -> Path:
    """A directory with a tokenizer.json and other JSON files by their stems."""
    contents = {"tokenizer": content, **files}
    for stem, value in contents.items():
        text = value if isinstance(value, str) else json.dumps(value)
        (directory / f"{stem}.json").write_text(text, encoding="utf-8")
    return directory


def load(kind: str, directory: Path, **files: dict) -> ByteView:
    return load_tokenizer(save(directory, library(kind).to_str(), **files))
