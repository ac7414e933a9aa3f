import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.decoding.tokenizers import ByteView
from models.decoding.vocabulary import VocabularyMap
from tests.models.decoding import tokenizer_files as files

ROLES = {"bos": (), "eos": (), "pad": (), "unk": ()}


def toy(*table: bytes | None, writes: dict[bytes, int] | None = None, **roles: tuple[int, ...]) -> ByteView:
    """Encodes by the longest token that fits, of equal ones the highest id, unless `writes` names another."""
    ids = {data: i for i, data in enumerate(table) if data} | (writes or {})

    def encode(text: bytes, left: bytes) -> list[int]:
        found = []
        while text:
            n = next((n for n in range(len(text), 0, -1) if text[:n] in ids), None)
            if n is not None:
                found.append(ids[text[:n]])
            text = text[n or 1 :]
        return found

    return ByteView(tuple(table), encode, roles=ROLES | roles)


def build(target: ByteView, draft: ByteView) -> VocabularyMap:
    return VocabularyMap.build(target, draft, target.vocab_size)


def pairs(vocabulary: VocabularyMap) -> list[tuple[int, int]]:
    return list(zip(vocabulary.target_ids.tolist(), vocabulary.draft_ids.tolist(), strict=True))


@pytest.fixture(scope="module", name="load")
def make_load(tmp_path_factory):
    ends = {"llama3": "<|end_of_text|>", "gpt2": "<|end_of_text|>", "bytes": "<|separator|>", "llama2": "</s>"}

    def load(kind: str) -> ByteView:
        end = files.library(kind).token_to_id(ends.get(kind, "</s>"))
        return files.load(kind, tmp_path_factory.mktemp("tokenizer"), generation_config={"eos_token_id": end})

    return load


tables = st.lists(st.none() | st.text("ab", max_size=2).map(str.encode), min_size=1, max_size=8)
roles = st.fixed_dictionaries({role: st.lists(st.integers(0, 7), max_size=3, unique=True) for role in ("bos", "eos")})


@settings(deadline=None)
@given(tables, tables, roles, roles)
def test_pairs_are_the_same_bytes_or_role_and_one_to_one(target, draft, target_roles, draft_roles):
    tokenizers = [
        toy(*table, **{role: tuple(i for i in ids if i < len(table)) for role, ids in some.items()})
        for table, some in ((target, target_roles), (draft, draft_roles))
    ]
    made = VocabularyMap.build(*tokenizers, len(target) + 2)
    found = pairs(made)
    assert found == sorted(found)
    assert len({i for i, _ in found}) == len({j for _, j in found}) == len(found)
    for i, j in found:
        same_role = any(i in tokenizers[0].roles[r] and j in tokenizers[1].roles[r] for r in ("bos", "eos"))
        assert same_role or (target[i] == draft[j] and target[i])
    to_draft = np.full(len(target) + 2, -1)
    for i, j in found:
        to_draft[i] = j
    np.testing.assert_array_equal(made.target_to_draft, to_draft)


@given(tables, tables)
def test_every_shared_string_is_paired(target, draft):
    made = build(toy(*target), toy(*draft))
    assert [target[i] for i, _ in pairs(made)] == [draft[j] for _, j in pairs(made)]
    assert {target[i] for i, _ in pairs(made)} == ({*target} & {*draft}) - {None, b""}


def test_equal_bytes_are_represented_by_what_is_written_and_else_by_the_lowest_id():
    target = toy(b"a", b"b", b"a", b"ab", b"ab", writes={b"a": 2, b"ab": 1})
    assert pairs(build(target, toy(b"ab", b"a"))) == [(2, 1), (3, 0)]
    assert pairs(build(toy(b"ab", b"a"), target)) == [(0, 3), (1, 2)]


def test_byte_fallback_does_not_stand_for_what_has_a_piece(load):
    """SentencePiece: `,` is a piece, and a token of the same byte has a lower id."""
    llama, gpt2 = load("llama2"), load("gpt2")
    fallback, comma = (files.library("llama2").token_to_id(name) for name in ("<0x2C>", ","))
    assert llama.token_bytes(fallback) == llama.token_bytes(comma) == b","
    made = build(llama, gpt2)
    assert made.target_to_draft[comma] == gpt2.encode(b",")[0]
    assert made.target_to_draft[fallback] == -1
    assert made.pieces[fallback, : made.lengths[fallback]].tolist() == gpt2.encode(b",")


def test_bytes_count_and_not_spelling(load):
    gpt2, llama = load("gpt2"), load("llama2")
    made = build(gpt2, llama)
    spelled, other = (files.library(kind).get_vocab() for kind in ("gpt2", "llama2"))
    assert made.target_to_draft[spelled["Ġthe"]] == other["▁the"]
    assert made.target_to_draft[spelled["Ġмир".replace("мир", "Ð¼Ð¸ÑĢ")]] == other["▁мир"]
    # Ã spells the byte C3 there and the character Ã here; the byte pairs with the byte.
    assert made.target_to_draft[spelled["Ã"]] == other["<0xC3>"]
    assert spelled.keys() & other.keys() != {gpt2.token_bytes(i) for i in made.target_ids}


def test_special_tokens_are_paired_by_role():
    target = toy(None, None, None, None, b"a", eos=(3, 0), bos=(1,))
    draft = toy(b"a", None, None, None, bos=(3,), eos=(2,))
    made = build(target, draft)
    assert pairs(made) == [(1, 3), (3, 2), (4, 0)]
    # One id begins and ends texts in GPT-2: it ends them.
    both = toy(None, b"a", eos=(0,), bos=(0,))
    assert pairs(build(both, draft)) == [(0, 2), (1, 0)]
    assert pairs(build(draft, both)) == [(0, 1), (2, 0)]


@pytest.mark.parametrize("target, draft", [("llama3", "llama2"), ("llama2", "llama3"), ("gpt2", "bytes")])
def test_pieces_spell_every_token_of_the_target(load, target, draft, monkeypatch):
    monkeypatch.setattr("models.decoding.vocabulary._MAX_PIECES", 2)
    target, draft = load(target), load(draft)
    made = VocabularyMap.build(target, draft, target.vocab_size + 7)
    assert made.pieces.shape == (target.vocab_size + 7, 2)
    fallback, long = list(draft.roles["unk"] or (0,)), 0
    for i, (row, length) in enumerate(zip(made.pieces, made.lengths, strict=True)):
        held, data = row[:length].tolist(), target.token_bytes(i)
        assert held and (row[length:] == 0).all()
        if i in target.roles["eos"]:
            assert held == list(draft.roles["eos"])
        elif data is None or len(draft.encode(data)) > 2:
            assert held == fallback and made.target_to_draft[i] == -1
            long += data is not None
        else:
            assert draft.decode(held) == data
            assert made.target_to_draft[i] in (-1, *held)
    assert long
    assert (made.target_to_draft[target.vocab_size :] == -1).all()


def test_equal_vocabularies_map_to_themselves(load):
    llama = load("llama3")
    made = VocabularyMap.build(llama, load("llama3"), 640)
    text = [i for i in range(llama.vocab_size) if llama.token_bytes(i) is not None or i in llama.roles["eos"]]
    assert pairs(made) == [(i, i) for i in text]
    assert made.pieces.shape == (640, 1)


def test_disjoint_vocabularies_share_the_end_of_text_at_most():
    made = build(toy(b"a", None, eos=(1,)), toy(b"b", b"c", None, eos=(2,)))
    assert pairs(made) == [(1, 2)]
    assert made.pieces.tolist() == [[0], [2]]
    made = build(toy(b"a"), toy(b"b"))
    assert made.target_ids.shape == made.draft_ids.shape == (0,)


def digest(directory: str) -> str:
    from models.decoding.tokenizers import load_tokenizer

    made = build(load_tokenizer(f"{directory}/a"), load_tokenizer(f"{directory}/b"))
    arrays = tuple(made)
    assert all(array.dtype == np.int32 for array in arrays)
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def test_every_process_makes_the_same_map(tmp_path):
    for name, kind in (("a", "llama2"), ("b", "llama3")):
        (tmp_path / name).mkdir()
        files.load(kind, tmp_path / name)
    code = f"from tests.models.decoding.test_vocabulary import digest; print(digest({str(tmp_path)!r}))"
    command = [sys.executable, "-c", code]
    other = subprocess.run(
        command, env=os.environ | {"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == digest(str(tmp_path))
