"""Which tokens of two vocabularies are the same bytes, and how one spells the tokens of the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from models.decoding.language_model import right_padded
from models.decoding.tokenizers import ByteView

_PAIRED_ROLES = ("eos", "bos")
# The largest M. Longer spellings are rare except for drafters of bytes, and each column costs the drafter a position
# in every step.
_MAX_PIECES = 8

Array = np.ndarray | jax.Array


class VocabularyMap(NamedTuple):
    """The vocabularies of a target and of the model that drafts for it; arrays are int32.

    Tokens are the same where their bytes are. Special tokens have none: beginning and end of text are paired by
    role, so that a draft may end the text, and no other special token has a counterpart. Where several ids of a
    vocabulary share their bytes, one stands for all: the id that its tokenizer writes for them, and the lowest
    where it writes none. (SentencePiece has both `,` and a byte-fallback token of the same byte. The lower id is
    that of the byte, which a trained model never writes.)

    Fields:
      target_ids, draft_ids: [X] the pairs, by ascending target id; no id is in two of them.
      target_to_draft: [V] the id of the other vocabulary, or -1.
      pieces: [V, M] what the drafter reads where the target wrote a token: its own ids for the token's bytes. It must
        read something, or it would have no new law to draw from: a token that it cannot spell with M ids is its
        unknown one, or its first. A wrong reading costs speed, never a wrong text.
      lengths: [V] how many they are, at least 1; the rest of a row of `pieces` is 0.
    """

    target_ids: Array
    draft_ids: Array
    target_to_draft: Array
    pieces: Array
    lengths: Array

    @classmethod
    def build(cls, target: ByteView, draft: ByteView, target_vocab: int) -> VocabularyMap:
        """The map of two tokenizers, for a target of V = `target_vocab` rows; equal on any machine."""
        pairs = _pairs(target, draft, _representatives(target), _representatives(draft))
        target_ids, draft_ids = np.array(pairs, np.int32).reshape(-1, 2).T
        target_to_draft = np.full(target_vocab, -1, np.int32)
        target_to_draft[target_ids] = draft_ids
        return cls(target_ids, draft_ids, target_to_draft, *_spell(target, draft, target_to_draft))


def _representatives(tokenizer: ByteView) -> dict[bytes, int]:
    """The one id of every byte string that tokens stand for."""
    ids: dict[bytes, list[int]] = {}
    for i, data in enumerate(tokenizer.table):
        if data:
            ids.setdefault(data, []).append(i)
    return {data: same[0] if len(same) == 1 else _written(tokenizer, data, same) for data, same in ids.items()}


def _written(tokenizer: ByteView, data: bytes, same: Sequence[int]) -> int:
    encoded = tokenizer.encode(data)
    return encoded[0] if len(encoded) == 1 and encoded[0] in same else min(same)


def _pairs(
    target: ByteView, draft: ByteView, target_tokens: dict[bytes, int], draft_tokens: dict[bytes, int]
) -> list[tuple[int, int]]:
    """Pairs of ids, sorted. A role goes before bytes, and end of text before its beginning, where an id has both."""
    to_draft: dict[int, int] = {}
    by_role = (pair for role in _PAIRED_ROLES for pair in zip(target.roles[role], draft.roles[role], strict=False))
    by_bytes = ((i, draft_tokens[data]) for data, i in target_tokens.items() if data in draft_tokens)
    taken: set[int] = set()
    for i, j in (*by_role, *by_bytes):
        if i not in to_draft and j not in taken:
            to_draft[i] = j
            taken.add(j)
    return sorted(to_draft.items())


def _spell(target: ByteView, draft: ByteView, target_to_draft: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`pieces` and `lengths`; M is as small as the spellings allow."""
    fallback = (*draft.roles["unk"], 0)[0]

    def spelling(i: int, j: int) -> list[int]:
        data = target.token_bytes(i)
        ids = [j] if j >= 0 else draft.encode(data) if data else []
        return ids if 0 < len(ids) <= _MAX_PIECES else [fallback]

    spellings = [spelling(i, int(j)) for i, j in enumerate(target_to_draft)]
    return right_padded(spellings), np.array(list(map(len, spellings)), np.int32)
