"""What a tokenizer.json, and the files beside it, say about the bytes and the roles of tokens."""

import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from checked.files import read_json

ROLES = ("bos", "eos", "pad", "unk")
read = functools.partial(read_json, kind="file of a tokenizer", remedy="give the directory of a whole model")

_MODELS = ("BPE", "Unigram")
_ID_FILES = ("generation_config.json", "config.json")
_NAME_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_CHILDREN = {"normalizers", "pretokenizers", "decoders"}
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")

Json = dict[str, Any]


class TokenizerJson:
    """The content of a tokenizer.json; `name` is what messages call it.

    Attributes:
      library: the tokenizer of the library, which encodes as the model was trained to see text from its beginning.
      model: "BPE" or "Unigram", or a kind that `check` refuses.
      names: tokens by id, those of the model and the added ones.
      unknown: the id that the model writes for what it cannot spell; () where it has none.

    Raises:
      ValueError: it is no tokenizer.
    """

    def __init__(self, description: Json, name: object):
        self._name, self._description = name, description
        try:
            self.library = Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # `tokenizers` raises bare Exception
            raise ValueError(
                f"{name} is no tokenizer of the tokenizers library ({' '.join(str(error).split())})"
            ) from error
        try:
            self._take_in()
        except (AttributeError, KeyError, TypeError) as error:  # the library takes some lists for objects
            raise ValueError(f"{name} is spelled unusually; load and save it with the tokenizers library") from error

    def _take_in(self) -> None:
        """What the file says beside how it encodes."""
        # A file may keep what its training wanted: random merges, fixed lengths.
        self.library.no_padding()
        self.library.no_truncation()
        if getattr(self.library.model, "dropout", None):
            self.library.model.dropout = None
        # Older files do not name the type of the model, but the library recognises it.
        self.model = type(self.library.model).__name__
        self._model = self._description["model"]
        self._added = {token["id"]: token for token in self._description.get("added_tokens") or ()}
        steps = [*self._parts("normalizer"), *self._parts("pre_tokenizer")]
        self._steps = {step["type"] for step in steps}
        self._space = next((mark for mark in map(_space_mark, steps) if mark), None)
        decoders = {part["type"] for part in self._parts("decoder")}
        self._falls_back = bool(self._model.get("byte_fallback")) or "ByteFallback" in decoders
        spelled = {i: name for name, i in self.library.get_vocab(with_added_tokens=False).items()}
        self.names = {i: token["content"] for i, token in self._added.items()} | spelled
        self._literal = self._added.keys() - spelled.keys()
        if self.model == "Unigram":
            unknown = self._model.get("unk_id")
        else:
            unknown = self.library.token_to_id(self._model.get("unk_token") or "")
        self.unknown = () if unknown is None else (unknown,)

    def _parts(self, component: str) -> list[Json]:
        return list(_parts(self._description.get(component)))

    def check(self) -> None:
        """Raises a ValueError of one line where this kind of tokenizer cannot be read as bytes."""
        supported = f"is not supported; supported: {', '.join(_MODELS)}"
        if self.model not in _MODELS:
            raise ValueError(f"{self._name}: tokenizer model {self.model!r} {supported}")
        for option in ("continuing_subword_prefix", "end_of_word_suffix"):
            if self.model == "BPE" and self._model.get(option):
                raise ValueError(f"{self._name}: BPE with {option}={self._model[option]!r} {supported} without it")
        if "ByteLevel" not in self._steps and self._space is None:
            steps = ", ".join(sorted(self._steps)) or "nothing"
            supported = "is not supported; supported: after ByteLevel, Metaspace, or a Replace of spaces"
            raise ValueError(f"{self._name}: {self.model} after {steps} {supported}")

    def table(self, roles: Mapping[str, tuple[int, ...]]) -> tuple[bytes | None, ...]:
        """Bytes of every id; None for special tokens and for ids that no token has."""
        with_role = {i for ids in roles.values() for i in ids}
        special = {i for i, token in self._added.items() if token["special"] or i in with_role} | set(self.unknown)
        table: list[bytes | None] = [None] * (max(self.names, default=-1) + 1)
        for i, name in self.names.items():
            if i not in special:
                # What the model has no token for is found in the text as it is spelled, before any step changes it.
                table[i] = name.encode() if i in self._literal else self._to_bytes(name)
        return tuple(table)

    def _to_bytes(self, name: str) -> bytes:
        if "ByteLevel" in self._steps:
            alphabet = _byte_of_character()
            return bytes(map(alphabet.__getitem__, name)) if all(c in alphabet for c in name) else name.encode()
        byte = _BYTE_TOKEN.fullmatch(name) if self._falls_back else None
        return bytes.fromhex(byte[1]) if byte else name.replace(self._space or " ", " ").encode()

    def begin(self) -> tuple[int, ...]:
        """The special ids that the post-processor puts before a text."""
        encoding = self.library.encode("a")
        marked = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return tuple(i for i, _ in itertools.takewhile(lambda pair: pair[1], marked))

    def roles(self, directory: Path) -> dict[str, tuple[int, ...]]:
        """Ids by role, from the first of the files of a model that gives the role; a role without is ().

        Of several ids the one that the tokenizer's own files name is first.
        """
        by_id = [directory / name for name in _ID_FILES if (directory / name).is_file()]
        by_id = [(path, read(path)) for path in by_id]
        by_name = [read(directory / name) for name in _NAME_FILES if (directory / name).is_file()]
        ids = {name: i for i, name in self.names.items()}
        roles = {}
        for role in ROLES:
            tokens = map(_content, (file.get(f"{role}_token") for file in by_name))
            own = [ids[token] for token in tokens if token in ids][:1]
            given = (_id_list(path, f"{role}_token_id", content) for path, content in by_id)
            found = next(filter(None, given), own)
            roles[role] = tuple(sorted(dict.fromkeys(found), key=lambda i, own=own: i not in own))
        roles["unk"] = roles["unk"] or self.unknown
        return roles

    def with_separator(self) -> dict[str, Json]:
        """Files, by name, of this tokenizer with the two ids that our training adds, the first before every text."""
        ids = separator_and_padding(len(self.table({})))
        names = [self._unused(name) for name in ("<|separator|>", "<|padding|>")]
        options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
        added = [{"id": i, "content": name, **options} for i, name in zip(ids, names, strict=True)]
        first = {"id": names[0], "ids": [ids[0]], "tokens": [names[0]]}
        begin, text, pair = ({"SpecialToken": {"id": names[0], "type_id": 0}}, *_sequences("A", "B"))
        process = {"type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text, pair]}
        marks = {"bos_token": names[0], "eos_token": names[0], "pad_token": names[1]}
        return {
            "tokenizer.json": self._description
            | {"added_tokens": [*self._added.values(), *added]}
            | {"post_processor": process | {"special_tokens": {names[0]: first}}},
            "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **marks},
            "generation_config.json": {f"{mark}_id": ids[name != names[0]] for mark, name in marks.items()},
        }

    def _unused(self, name: str) -> str:
        """A name that no token has: this one, or one like it."""
        return self._unused(f"{name}_") if name in self.names.values() else name

    def without_space(self) -> Json:
        """The description without the space before a text, and without its removal when decoding."""
        prepends = any(part["type"] == "Prepend" for part in self._parts("normalizer"))
        drop = {"normalizer": "Prepend", "decoder": "Strip" if prepends else None, "pre_tokenizer": None}
        return self._description | {key: _without_space(self._description.get(key), kind) for key, kind in drop.items()}

    def continuing(self) -> Tokenizer:
        """The library's tokenizer without the space before a text, and with special tokens' names as text."""
        empty = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
        steps = ("normalizer", "pre_tokenizer", "decoder")
        made = Tokenizer.from_str(json.dumps(empty | {key: self.without_space()[key] for key in steps}))
        # The model is shared, since a second copy of a large one would take long to make.
        tokenizer = Tokenizer(self.library.model)
        for key in steps:
            setattr(tokenizer, key, getattr(made, key))
        tokenizer.add_tokens([token for _, token in sorted(self.library.get_added_tokens_decoder().items())])
        tokenizer.encode_special_tokens = True
        return tokenizer


def separator_and_padding(size: int) -> tuple[int, int]:
    """The two ids that our training puts behind a vocabulary of so many: what follows every document, and padding."""
    return size, size + 1


def bytes_json() -> Json:
    """A tokenizer.json whose ids are the bytes of the text."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": _byte_of_character(), "merges": []},
    }


def _sequences(*names: str) -> Iterator[Json]:
    """A post-processor's texts."""
    return ({"Sequence": {"id": name, "type_id": 0}} for name in names)


def _parts(component: Json | None) -> Iterator[Json]:
    """A normalizer, pre-tokenizer or decoder as its parts, in order."""
    if component is None:
        return
    if component["type"] != "Sequence":
        yield component
    for key in _CHILDREN & component.keys():
        for child in component[key]:
            yield from _parts(child)


def _without_space(component: Json | None, dropped: str | None) -> Json | None:
    """A component that puts no space before the text, without its parts of one type; None if nothing is left."""
    if component is None or component["type"] == dropped:
        return None
    for key in _CHILDREN & component.keys():
        kept = [part for child in component[key] if (part := _without_space(child, dropped))]
        return component | {key: kept} if kept else None
    if component["type"] == "Metaspace":
        return component | {"prepend_scheme": "never"}
    return component | ({"add_prefix_space": False} if "add_prefix_space" in component else {})


def _space_mark(step: Json) -> str | None:
    """The character that a step writes for a space, usually ▁."""
    if step["type"] == "Metaspace":
        return step["replacement"]
    if step["type"] == "Replace" and step["pattern"] == {"String": " "}:
        return step["content"]
    return None


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for characters from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [i for i in range(256) if i not in printable]
    return {chr(i): i for i in printable} | {chr(0x100 + n): i for n, i in enumerate(others)}


def _content(token: Json | str | None) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _id_list(path: Path, key: str, content: Json) -> list[int]:
    """The ids that a file gives; -1, which older files say for none, is none."""
    value = content.get(key)
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in values):
        raise ValueError(f"{path}: {key}={value!r} must be an id or a list of ids")
    return [i for i in values if i >= 0]
