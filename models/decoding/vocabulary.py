"""Which tokens of two vocabularies are the same bytes, and how one spells the tokens of the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from models.decoding.tokenizers import ByteTokenizer

_PAIRED_ROLES = ("eos", "bos")


@dataclasses.dataclass(frozen=True, eq=False)
class VocabularyMap:
    """The vocabularies of a target and of the model that drafts for it; arrays are int32.

    Tokens are the same where their bytes are. Special tokens have none: beginning and end of text are paired by
    role, so that a draft may end the text, and no other special token has a counterpart. Where several ids of a
    vocabulary share their bytes, one stands for all: the id that its tokenizer writes for them, and the lowest
    where it writes none. (SentencePiece has both `,` and a byte-fallback token of the same byte. The lower id is
    that of the byte, which a trained model never writes.)

    Fields:
      target_ids, draft_ids: [n] the pairs, by ascending target id; no id is in two of them.
      target_to_draft: [V_T] the id of the other vocabulary, or -1. draft_to_target: [V_D], likewise.
      pieces: [V_T, M] the draft's ids for the bytes of every target token, filled up with -1: what the drafter
        reads where the target wrote that token.
      lengths: [V_T] how many they are; 0 for what the drafter does not read (special tokens, rows without a
        token). Above M the row of `pieces` is all -1, and the host has to encode the token's bytes.
      target_size, draft_size, shared: distinct byte strings of each vocabulary and of both.
    """

    target_ids: np.ndarray
    draft_ids: np.ndarray
    target_to_draft: np.ndarray
    draft_to_target: np.ndarray
    pieces: np.ndarray
    lengths: np.ndarray
    target_size: int
    draft_size: int
    shared: int

    @classmethod
    def build(
        cls,
        target: ByteTokenizer,
        draft: ByteTokenizer,
        target_vocab: int | None = None,
        draft_vocab: int | None = None,
        max_pieces: int = 8,
    ) -> VocabularyMap:
        """The map of two tokenizers; equal ones on any machine and in any process.

        Args:
          target_vocab, draft_vocab: V_T and V_D, rows of the models' embeddings, which are often padded; default
            the tokenizers' own sizes.
          max_pieces: the largest M. Longer spellings are rare except for drafters of bytes, and each column costs
            the drafter a position in every step.

        Raises:
          ValueError: a tokenizer has ids that its model has no row for.
        """
        V_T = _rows("target", target, target_vocab)
        V_D = _rows("draft", draft, draft_vocab)
        target_tokens, draft_tokens = _representatives(target), _representatives(draft)
        pairs = _pairs(target, draft, target_tokens, draft_tokens)
        target_ids, draft_ids = np.array(pairs, np.int32).reshape(-1, 2).T
        target_to_draft, draft_to_target = np.full(V_T, -1, np.int32), np.full(V_D, -1, np.int32)
        target_to_draft[target_ids], draft_to_target[draft_ids] = draft_ids, target_ids
        pieces, lengths = _spell(target, draft, target_to_draft, max_pieces)
        sizes = len(target_tokens), len(draft_tokens), len(target_tokens.keys() & draft_tokens.keys())
        return cls(target_ids, draft_ids, target_to_draft, draft_to_target, pieces, lengths, *sizes)

    @property
    def is_empty(self) -> bool:
        """Whether no text token is shared: drafts over the intersection could at most end the text."""
        return self.shared == 0

    @property
    def jaccard(self) -> float:
        """Shared byte strings over those of either vocabulary; 0 of two empty ones."""
        return self.shared / max(self.target_size + self.draft_size - self.shared, 1)

    def summary(self) -> str:
        """The overlap in one line."""
        shares = (self.shared / max(size, 1) for size in (self.target_size, self.draft_size))
        of_target, of_draft = (f"{share:.1%}" for share in shares)
        return (
            f"{self.shared:,} shared tokens: {of_target} of the target's {self.target_size:,}, "
            f"{of_draft} of the draft's {self.draft_size:,}, {self.jaccard:.1%} of the union"
        )


def _rows(name: str, tokenizer: ByteTokenizer, rows: int | None) -> int:
    ends = (i for role in _PAIRED_ROLES for i in tokenizer.roles[role])
    needed = max(tokenizer.vocab_size, 1 + max(ends, default=-1))
    if rows is not None and rows < needed:
        raise ValueError(
            f"the {name} tokenizer has ids up to {needed - 1}, but its model has {rows} rows; "
            "use the tokenizer that the model was trained with"
        )
    return needed if rows is None else rows


def _representatives(tokenizer: ByteTokenizer) -> dict[bytes, int]:
    """The one id of every byte string that tokens stand for."""
    ids: dict[bytes, list[int]] = {}
    for i, data in enumerate(tokenizer.table):
        if data:
            ids.setdefault(data, []).append(i)
    return {data: same[0] if len(same) == 1 else _written(tokenizer, data, same) for data, same in ids.items()}


def _written(tokenizer: ByteTokenizer, data: bytes, same: Sequence[int]) -> int:
    encoded = tokenizer.encode(data)
    return encoded[0] if len(encoded) == 1 and encoded[0] in same else min(same)


def _pairs(
    target: ByteTokenizer, draft: ByteTokenizer, target_tokens: dict[bytes, int], draft_tokens: dict[bytes, int]
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


def _spell(
    target: ByteTokenizer, draft: ByteTokenizer, target_to_draft: np.ndarray, max_pieces: int
) -> tuple[np.ndarray, np.ndarray]:
    """`pieces` and `lengths`; M is as small as the spellings allow."""
    spellings: list[list[int]] = [[]] * len(target_to_draft)
    for i, j in enumerate(target_to_draft):
        data = target.token_bytes(i)
        spellings[i] = [int(j)] if j >= 0 else draft.encode(data) if data else []
    lengths = np.array([len(ids) for ids in spellings], np.int32)
    M = min(max_pieces, int(lengths.max(initial=1)))
    pieces = np.full((len(spellings), M), -1, np.int32)
    for i, ids in enumerate(spellings):
        if len(ids) <= M:
            pieces[i, : len(ids)] = ids
    return pieces, lengths
