import codecs
import itertools
import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from models.decoding.tokenizers import ByteView, complete_prefix, load_tokenizer
from tests.models.decoding import tokenizer_files as files

# What tokenizers stumble over: marks of spaces and bytes, names of special tokens, what normalizers change.
HARD = (" ", "  ", "\r\n", "\n\n", "\t", "▁", "<0x41>", "<s>", "</s>", "<unk>", "<tool>", "Ġ")
HARD += (
    "<|end_of_text|>",
    "<|separator|>",
    "e\u0301",
    "\u212b",
    "\u0301",
    "\ufb01",
    "\u200d",
    "😀",
    "👩‍💻",
    "\x00",
    "ß",
)
fragments = st.sampled_from([*HARD, *files.WORDS]) | st.text(max_size=5)
texts = st.lists(fragments, max_size=12).map("".join)
byte_strings = st.lists(fragments.map(str.encode) | st.binary(max_size=4), max_size=12).map(b"".join)


@pytest.fixture(scope="module", name="load")
def make_load(tmp_path_factory):
    """Tokenizers by kind, each loaded once."""
    loaded: dict[str, ByteView] = {}

    def load(kind: str) -> ByteView:
        if kind not in loaded:
            loaded[kind] = files.load(kind, tmp_path_factory.mktemp("tokenizer"))
        return loaded[kind]

    return load


@pytest.mark.parametrize("kind", files.COMPLETE)
def test_decoding_inverts_encoding(load, kind):
    tokenizer = load(kind)

    @settings(max_examples=60, deadline=None)
    @given(byte_strings, byte_strings)
    def check(text, left):
        ids = tokenizer.encode(text, left)
        assert tokenizer.decode(ids) == text
        assert b"".join(map(tokenizer.token_bytes, ids)) == text

    check()


def test_what_may_change_text_says_so(load):
    tokenizer = load("t5")
    text = "Été!".encode()
    assert tokenizer.decode(tokenizer.encode(text)) != text

    @settings(max_examples=60, deadline=None)
    @given(byte_strings, byte_strings)
    def check(text, left):
        ids = tokenizer.encode(text, left)
        assert all(tokenizer.token_bytes(i) is not None for i in ids if i not in tokenizer.roles["unk"])

    check()


@pytest.mark.parametrize("kind", files.KINDS)
def test_ordinary_text_is_encoded_as_the_library_does(load, kind):
    tokenizer, library = load(kind), files.library(kind)
    for text in files.corpus(seed=1)[:100]:
        text = unicodedata.normalize("NFC", text)
        # A sentinel before it takes the space that the library puts before a text.
        alone, joint = (library.encode(s, add_special_tokens=False).ids for s in ("\n", "\n" + text))
        if joint[: len(alone)] == alone and text[0] not in "\n\r":
            assert tokenizer.encode(text.encode(), b"\n") == joint[len(alone) :]


@pytest.mark.parametrize("kind", files.SPACED)
def test_no_space_appears_where_a_text_goes_on(load, kind):
    tokenizer = load(kind)
    library = files.library(kind)
    whole = tokenizer.encode(b"ing")
    assert tokenizer.decode(whole) == b"ing"
    with_space = library.encode("ing", add_special_tokens=False).ids
    assert tokenizer.decode(with_space) == b" ing"
    assert len(whole) <= len(with_space)
    joint = tokenizer.encode(b" playing reading")
    assert tokenizer.encode(b" reading", b" playing") == joint[-len(tokenizer.encode(b" reading")) :]
    assert tokenizer.encode(b"playing") != tokenizer.encode(b" playing")


@pytest.mark.parametrize("kind", files.KINDS)
def test_a_draft_is_encoded_as_a_part_of_the_whole(load, kind):
    """Cut where the target's tokens end; the draft's last word may go on, so that its tokens may change."""
    tokenizer, drafter = load(kind), load("gpt2" if kind != "gpt2" else "llama2")
    agree = []
    for text in files.corpus(seed=2):
        ids = tokenizer.encode(text.encode())
        for cut in range(3, len(ids) - 8, 7):
            left, rest = tokenizer.decode(ids[:cut]), tokenizer.decode(ids[cut:])
            draft = drafter.decode(drafter.encode(rest, left)[:5])
            draft = draft[: complete_prefix(draft)]
            candidates = tokenizer.encode(draft, left)
            ends = itertools.accumulate(len(tokenizer.decode([i])) for i in candidates)
            complete = sum(end <= draft.rfind(b" ") for end in ends)
            agree += [ids[cut : cut + complete] == candidates[:complete]] if complete else []
    assert len(agree) > 150
    assert all(agree)


@pytest.mark.parametrize("kind", files.KINDS)
def test_bytes_of_every_token_are_what_the_library_decodes(load, kind):
    tokenizer, library = load(kind), files.library(kind)
    # A token before keeps the library from taking the space at the beginning away.
    (before,) = tokenizer.encode(b"x")
    checked = 0
    for i in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(i)
        decoded = library.decode([before, i], skip_special_tokens=True)
        if data is None:
            assert decoded == "x", i
        elif b"\xef\xbf\xbd" not in decoded.encode():
            assert b"x" + data == decoded.encode(), i
            checked += 1
        else:
            with pytest.raises(UnicodeDecodeError):
                data.decode()
    assert checked > 100
    assert tokenizer.token_bytes(tokenizer.vocab_size) is None
    assert tokenizer.token_bytes(-1) is None


@pytest.mark.parametrize("kind", files.KINDS)
def test_prompts_are_encoded_as_the_library_does(load, kind):
    tokenizer, library = load(kind), files.library(kind)

    @settings(max_examples=25, deadline=None)
    @given(texts)
    def check(text):
        assert tokenizer.encode_prompt(text) == library.encode(text).ids

    check()


def test_names_of_special_tokens_are_text_except_in_prompts(load):
    for kind, name in (("llama2", "</s>"), ("unigram", "</s>"), ("llama3", "<|end_of_text|>"), ("t5", "</s>")):
        tokenizer, special = load(kind), files.library(kind).token_to_id(name)
        assert special not in tokenizer.encode(name.encode())
        assert special in tokenizer.encode_prompt(name)
        assert tokenizer.token_bytes(special) is None


def test_added_tokens_that_are_not_special_are_text(load, tmp_path):
    tokenizer, library = load("llama3"), files.library("llama3")
    tool = library.token_to_id("<tool>")
    assert tokenizer.token_bytes(tool) == b"<tool>"
    assert tool in tokenizer.encode(b"read <tool> now")
    description = json.loads(library.to_str())
    next(token for token in description["added_tokens"] if token["id"] == tool)["content"] = "<é>"
    tokenizer = load_tokenizer(files.save(tmp_path, description))
    assert tokenizer.token_bytes(tool) == "<é>".encode()
    assert tool in tokenizer.encode("read <é> now".encode())


def test_our_bytes(load):
    tokenizer = load("bytes")
    data = bytes(range(256))
    assert tokenizer.encode(data) == list(data)
    assert [tokenizer.token_bytes(i) for i in range(258)] == [bytes([i]) for i in range(256)] + [None, None]
    assert tokenizer.encode_prompt("é") == [256, 195, 169]


def test_a_token_may_begin_inside_a_character(tmp_path):
    """東 is E6 9D B1, and this tokenizer has a token 9D B1."""
    description = json.loads(files.library("bytes").to_str())
    names = {i: name for name, i in description["model"]["vocab"].items()}
    description["model"]["vocab"][names[0x9D] + names[0xB1]] = 258
    description["model"]["merges"] = [[names[0x9D], names[0xB1]]]
    tokenizer = load_tokenizer(files.save(tmp_path, description))
    first, rest = tokenizer.encode("東 a".encode())[:1], tokenizer.encode("東 a".encode())[1:]
    assert (first, rest) == ([0xE6], [258, 32, 97])
    assert tokenizer.encode(b"\x9d\xb1 a", b"x\xe6") == rest
    assert tokenizer.encode(b"\x9d\xb1 a") == tokenizer.encode(b"\x9d\xb1 a", b"\xe6\x9d\xb1") == [0x9D, 0xB1, 32, 97]
    assert tokenizer.encode(b"\xb1 a", b"\xe6\x9d") == [0xB1, 32, 97]


def test_lone_bytes_without_byte_tokens_are_unknown(load):
    tokenizer = load("t5")
    (unknown,) = tokenizer.roles["unk"]
    assert tokenizer.encode(b"\xff\xfe") == [unknown]
    assert tokenizer.decode(tokenizer.encode(b" the\xff quick")) == b" the quick"


def test_roles_come_from_the_first_file_that_gives_them(tmp_path):
    ids = {
        name: files.library("llama3").token_to_id(name) for name in ("<|begin_of_text|>", "<|end_of_text|>", "<tool>")
    }
    begin, end, tool = ids.values()
    beside = {
        "generation_config": {"eos_token_id": [7, end, 7], "pad_token_id": -1},
        "config": {"eos_token_id": 9, "bos_token_id": begin, "pad_token_id": None},
        "tokenizer_config": {"eos_token": {"content": "<|end_of_text|>"}, "pad_token": "<tool>"},
    }
    tokenizer = files.load("llama3", tmp_path, **beside)
    assert tokenizer.roles == {"bos": (begin,), "eos": (end, 7), "pad": (tool,), "unk": ()}
    # A role makes an added token special, but not one of the model's own.
    assert tokenizer.token_bytes(tool) is None
    assert tokenizer.token_bytes(7) == bytes([8 + 0x20])
    assert load_tokenizer(tmp_path / "tokenizer.json").roles == tokenizer.roles


def test_roles_without_files(load, tmp_path):
    assert load("llama2").roles == {"bos": (), "eos": (), "pad": (), "unk": (0,)}
    description = json.loads(files.library("llama2").to_str())
    description["added_tokens"] = []
    assert load_tokenizer(files.save(tmp_path, description)).token_bytes(0) is None
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": None}
    tokenizer = files.load("llama2", tmp_path, special_tokens_map=names)
    assert tokenizer.roles == {"bos": (1,), "eos": (2,), "pad": (), "unk": (0,)}


def test_what_training_left_in_a_file_changes_nothing(load, tmp_path):
    library = Tokenizer.from_str(files.library("gpt2").to_str())
    library.enable_padding(length=50)
    library.enable_truncation(3)
    library.model.dropout = 0.9
    tokenizer = load_tokenizer(files.save(tmp_path, library.to_str()))
    text = files.corpus()[0]
    assert tokenizer.encode(text.encode()) == load("gpt2").encode(text.encode())
    assert tokenizer.encode_prompt(text) == load("gpt2").encode_prompt(text)


def test_older_files(load, tmp_path):
    """No type of the model; Metaspace with add_prefix_space instead of its scheme."""
    description = json.loads(files.library("mistral").to_str())
    del description["model"]["type"]
    space = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    description["pre_tokenizer"] = space
    tokenizer = load_tokenizer(files.save(tmp_path, description))
    assert tokenizer.decode(tokenizer.encode(b"ing")) == b"ing"
    assert len(tokenizer.encode(b"playing")) == len(load("mistral").encode(b"playing"))


def _without_unknown() -> str:
    return (
        Tokenizer(models.Unigram([("a", -1.0), ("▁", -2.0)]))
        .to_str()
        .replace(
            '"pre_tokenizer":null',
            '"pre_tokenizer":{"type":"Metaspace","replacement":"▁","prepend_scheme":"always","split":true}',
        )
    )


def _whitespace_bpe() -> str:
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.to_str()


UNSUPPORTED = {
    "not json": ("not json {", "is no file of a tokenizer: Expecting"),
    "list": ("[]", "it holds no JSON object"),
    "empty": ("{}", "no tokenizer of the tokenizers library"),
    "word pieces": (Tokenizer(models.WordPiece({"[UNK]": 0})).to_str(), "'WordPiece' is not supported; .*BPE, Unigram"),
    "word level": (Tokenizer(models.WordLevel({"a": 0}, "a")).to_str(), "'WordLevel' is not supported; .*BPE, Unigram"),
    "whitespace": (_whitespace_bpe(), "BPE after Whitespace is not supported; .*ByteLevel, Metaspace"),
    "nothing": (Tokenizer(models.BPE({"a": 0}, [])).to_str(), "BPE after nothing"),
    "suffix": (Tokenizer(models.BPE({"a": 0}, [], end_of_word_suffix="</w>")).to_str(), "end_of_word_suffix='</w>'"),
    "no unknown": (_without_unknown(), "Unigram without an unknown token"),
}


@pytest.mark.parametrize("content, message", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_what_is_not_supported_is_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"tokenizer\.json.*{message}") as error:
        load_tokenizer(files.save(tmp_path, content))
    assert "\n" not in str(error.value)


def test_missing_and_mistyped_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no file of a tokenizer at .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id='</s>' must be an id"):
        files.load("llama2", tmp_path, generation_config={"eos_token_id": "</s>"})
    with pytest.raises(ValueError, match=r"[^_]config\.json' is no file of a tokenizer: Expecting"):
        files.load("llama2", tmp_path, config="{", generation_config={})


@given(st.text(max_size=6), st.binary(max_size=4))
def test_complete_prefix_holds_back_only_an_unfinished_character(text, rest):
    data = text.encode() + rest
    whole = data[: complete_prefix(data)]
    assert whole.decode(errors="replace") == codecs.getincrementaldecoder("utf-8")(errors="replace").decode(data)
    for end in range(len(text.encode()) + 1):
        prefix = text.encode()[:end]
        assert prefix[: complete_prefix(prefix)].decode() == prefix.decode(errors="ignore")
