import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from atlas.data import synthetic, tokenizers
from checked import UserError

TEXTS = {name: list(synthetic.documents(name, "train", 40_000, 0)) for name in ("a1", "b1", "c1")}
HARD = "héllo wörld\n\n  日本語 \U0001f600 foo  bar\ttab <unk> ▁ <0x41> </s>"


def metaspace_unigram() -> str:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    backend.train_from_iterator(TEXTS["a1"], trainer)
    return backend.to_str()


def llama_like() -> str:
    """BPE with byte fallback; the normalizer puts a space before each text, the decoder takes it away."""
    vocabulary = {"<unk>": 0, "<s>": 1, **{f"<0x{i:02X}>": i + 2 for i in range(256)}}
    for symbol in ("▁", "h", "e", "l", "o", "he", "▁he"):
        vocabulary[symbol] = len(vocabulary)
    merges = [("h", "e"), ("▁", "he")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<s>"])
    return backend.to_str()


def encode(tokenizer, text: str) -> list[int]:
    """Ids without the separator."""
    return next(tokenizer.encode_documents([text])).tolist()[:-1]


def decode(tokenizer, ids: list[int]) -> str:
    return tokenizer._backend.decode(ids)


def trained(kind: str) -> str:
    return tokenizers.train(kind, 400, [text for texts in TEXTS.values() for text in texts])._json


CASES = {
    "bpe": (lambda: trained("bpe"), HARD),
    "unigram": (lambda: trained("unigram"), HARD),
    "metaspace": (metaspace_unigram, TEXTS["a1"][0]),
    "byte fallback": (llama_like, "hello hé 日\n  oh"),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    make, text = CASES[request.param]
    return tokenizers.JsonTokenizer(make()), text


def test_bytes_of_tokens_sum_to_bytes_of_text(case):
    tokenizer, text = case
    for variant in (text, " " + text, text[:1]):
        ids = encode(tokenizer, variant)
        assert decode(tokenizer, ids) == variant
        assert tokenizer.token_bytes[ids].sum() == len(variant.encode())


def test_separator_and_padding_lie_behind_the_vocabulary(case):
    tokenizer, _ = case
    size = tokenizer._backend.get_vocab_size()
    assert (tokenizer.separator, tokenizer.padding) == (size, size + 1)
    assert tokenizer.vocab_size % 32 == 0
    assert 0 <= tokenizer.vocab_size - size - 2 < 32
    assert len(tokenizer.token_bytes) == tokenizer.vocab_size
    assert tokenizer.token_bytes[size:].sum() == 0


def test_documents_are_their_encodings_and_a_separator(case):
    tokenizer, text = case
    documents = list(tokenizer.encode_documents([text, text[:3]]))
    assert [document.tolist() for document in documents] == [
        [*tokenizer._backend.encode(part, add_special_tokens=False).ids, tokenizer.separator]
        for part in (text, text[:3])
    ]
    assert documents[0].dtype == np.int32


def test_saving_keeps_a_tokenizer(case, tmp_path):
    tokenizer, text = case
    tokenizer.save(tmp_path)
    loaded = tokenizers.from_file(tmp_path / tokenizers.FILE)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert encode(loaded, text) == encode(tokenizer, text)


def test_special_tokens_stand_for_no_bytes():
    tokenizer = tokenizers.JsonTokenizer(llama_like())
    assert tokenizer.token_bytes[:2].tolist() == [0, 0]


def test_bytes():
    tokenizer = tokenizers.ByteTokenizer()
    ids = encode(tokenizer, HARD)
    assert tokenizer.vocab_size == 288
    assert bytes(ids) == HARD.encode()
    assert tokenizer.token_bytes[ids].sum() == len(ids) == len(HARD.encode())
    assert tokenizer.token_bytes.sum() == 256
    (document,) = tokenizer.encode_documents(["ab"])
    assert document.tolist() == [97, 98, 256]


def test_training_covers_what_it_never_saw():
    tokenizer = tokenizers.train("bpe", 300, ["abc"])
    assert decode(tokenizer, encode(tokenizer, "日本")) == "日本"


def test_a_larger_vocabulary_gives_fewer_tokens():
    small, large = (tokenizers.train("bpe", size, TEXTS["a1"]) for size in (300, 800))
    assert large.vocab_size > small.vocab_size
    assert len(encode(large, TEXTS["a1"][0])) < len(encode(small, TEXTS["a1"][0]))


def test_sample_follows_the_temperature():
    texts = {"small": ["x" * 100] * 10, "large": ["y" * 100] * 1000}
    documents = {language: lambda some=some: iter(some) for language, some in texts.items()}

    def sizes(temperature):
        sample = "".join(tokenizers.sample(documents, temperature, 40_000))
        return sample.count("x"), sample.count("y")

    # Sizes count up to the sample's: 1,000 and 40,000. The small one is repeated.
    assert sizes(100.0) == pytest.approx((20_000, 20_000), rel=0.03)
    assert sizes(1.0) == pytest.approx((40_000 / 41, 40_000 * 40 / 41), abs=100)


def test_a_language_without_text_is_named():
    with pytest.raises(UserError, match="fr has no documents in its train split"):
        list(tokenizers.sample({"en": lambda: iter(["x"]), "fr": lambda: iter([""])}, 1.0, 100))


@pytest.mark.parametrize("content", ["not json", "{}", json.dumps({"model": {"type": "Nothing"}})])
def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json") as error:
        tokenizers.from_file(path)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        tokenizers.from_file(tmp_path / "none.json")


def test_ids_are_text_again():
    text = TEXTS["a1"][0]
    for tokenizer in (tokenizers.ByteTokenizer(), tokenizers.train("bpe", 400, TEXTS["a1"])):
        assert tokenizer.decode(next(tokenizer.encode_documents([text]))) == text
    assert tokenizers.ByteTokenizer().decode(np.array([104, 233, 256])) == "h\ufffd"
