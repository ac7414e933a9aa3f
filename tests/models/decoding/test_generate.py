"""Whole generation: one text whatever drafts, and the target's law where the text may differ."""

import jax
import numpy as np
import pytest
from flax import nnx

from models import Decoder, ModelConfig
from models.decoding import Sampling, make_voice, write, write_text
from models.decoding.proposers import StringRejection
from tests.models.decoding.toys import DRAFT, TARGET, exact_law, tokenizer, voice

PROMPTS = [[0, 1, 2], [4], [3, 3, 1, 0, 2, 2]]
NEW = 12
CHANCES = {"greedy": Sampling(), "coupled": Sampling(temperature=1.0, seed=[1, 2, 3])}


@pytest.fixture(autouse=True, scope="module")
def double_precision():
    with jax.enable_x64(True):
        yield


def plain(target, sampling, prompts=PROMPTS):
    return write(target, prompts, NEW, method="ar", sampling=sampling).tokens


@pytest.mark.parametrize("chance", CHANCES)
@pytest.mark.parametrize(
    "method, length", [("tli", 1), ("tli", 3), ("slem", 1), ("slem", 3), ("lookup", 3), ("slrs", 2)]
)
def test_exact_verification_writes_the_plain_text(chance, method, length):
    target, drafter, sampling = voice(TARGET, 0, padding=2), voice(DRAFT, 1, padding=1), CHANCES[chance]
    written = write(target, PROMPTS, NEW, drafter=drafter, method=method, sampling=sampling, draft_length=length)
    assert written.tokens == plain(target, sampling)
    assert sum(written.calls) <= sum(map(len, written.tokens))
    if chance == "coupled" and length > 1:
        alone = Sampling(sampling.temperature, seed=3)
        single = write(target, PROMPTS[2:], NEW, drafter=drafter, method=method, sampling=alone, draft_length=length)
        assert single.tokens == written.tokens[2:]


@pytest.mark.parametrize("method", ["tli", "slem"])
def test_eight_ragged_prompts_and_two_tokenizers(method):
    """A batch writes what plain decoding writes for every prompt alone, each row with its own seed."""
    target, drafter = voice(TARGET, 0), voice(DRAFT, 1)
    prompts = [[(3 * i + j) % 5 for j in range(1 + i)] for i in range(8)]
    sampling = Sampling(temperature=0.8, seed=list(range(8)))
    written = write(target, prompts, NEW, drafter=drafter, method=method, sampling=sampling, draft_length=3)
    for i, prompt in enumerate(prompts):
        assert written.tokens[i] == plain(target, Sampling(temperature=0.8, seed=i), [prompt])[0]


@pytest.mark.parametrize(
    "words, seed, peak, method",
    [
        (TARGET, 0, 1.0, "tli"),  # the target itself
        (TARGET, 7, 0.0, "tli"),  # uniform
        (TARGET, 7, 30.0, "tli"),  # nearly always one token
        ((*TARGET, b"ca", b"bb"), 3, 1.0, "tli"),  # superset
        ((b"a",), 3, 1.0, "tli"),  # one shared token
        ((b"a", b"a", b"b"), 3, 1.0, "tli"),  # duplicates
        (TARGET, 0, 1.0, "slem"),
        (TARGET, 7, 30.0, "slem"),
        ((b"a",), 3, 1.0, "slem"),
    ],
)
def test_adversarial_drafters_change_nothing_but_speed(words, seed, peak, method):
    target, sampling = voice(TARGET, 0), CHANCES["coupled"]
    drafter = voice(words, seed, peak=peak)
    written = write(target, PROMPTS, NEW, drafter=drafter, method=method, sampling=sampling, draft_length=2)
    assert written.tokens == plain(target, sampling)
    if (words, seed, method) == (TARGET, 0, "tli"):
        # Its drafts are the target's own samples: all are accepted, but for those cut off at the end of a row.
        assert sum(written.calls) == sum(-(-len(row) // 3) for row in written.tokens)


def test_disjoint_vocabularies_draft_by_text_or_are_refused():
    target, drafter = voice(TARGET, 0), voice((b"x", b"y"), 1, end=False)
    with pytest.raises(ValueError, match="share no token"):
        write(target, PROMPTS, NEW, drafter=drafter, method="tli")
    for method in ("slem", "auto"):
        assert write(target, PROMPTS, NEW, drafter=drafter, method=method, draft_length=2).tokens == plain(
            target, Sampling()
        )


@pytest.mark.parametrize("attention", ["gated", "gated_sparse"])
def test_our_attention_kinds_decode_speculatively(attention):
    target = voice(TARGET, 0, attention=attention)
    prompts = [[0, 1, 2, 3], [4, 2]]
    expected = write(target, prompts, 4, method="ar").tokens
    for method in ("tli", "lookup"):
        written = write(target, prompts, 4, drafter=voice(DRAFT, 1), method=method, draft_length=2)
        assert written.tokens == expected


def test_draft_lengths_adapt_without_changing_the_text():
    target, drafter, sampling = voice(TARGET, 0), voice(DRAFT, 1), CHANCES["coupled"]
    for method in ("tli", "slem"):
        written = write(target, PROMPTS, 40, drafter=drafter, method=method, sampling=sampling)
        assert written.tokens == write(target, PROMPTS, 40, method="ar", sampling=sampling).tokens
    assert write(target, PROMPTS, 40, sampling=sampling).method == "lookup"


DRAWS = 100_000
# Method, verification, draft length. Every one draws three tokens, in rounds that start and end anywhere in them.
SAMPLERS = [
    ("ar", "exact", None),
    ("tli", "exact", 2),
    pytest.param("tli", "rejection", 3, marks=pytest.mark.thorough),
    pytest.param("tli", "block", 3, marks=pytest.mark.thorough),
    pytest.param("same", "rejection", 2, marks=pytest.mark.thorough),
]
HOST_SAMPLERS = [
    ("lookup", "exact", 2),
    ("slem", "exact", 2),
    ("slrs", "rejection", 2),
    pytest.param("slrs", "block", 2, marks=pytest.mark.thorough),
]


def chi_square(method, verify, length, draws, batch):
    """z of the chi-square statistic of the joint law of three tokens, against the exact law."""
    target = voice(TARGET[:4], 0, end=False, dtype="float32", peak=0.7)
    words, seed = (TARGET[:4], 5) if method == "same" else (DRAFT, 1)
    drafter = voice(words, seed, end=False, dtype="float32", peak=0.7)
    options = {"drafter": drafter, "method": "tli" if method == "same" else method, "verify": verify}
    prompt, counts = [0, 1, 0], np.zeros((4,) * 3)
    for start in range(0, draws, batch):
        sampling = Sampling(temperature=1.0, seed=list(range(start, start + batch)))
        written = write(target, [prompt] * batch, 3, sampling=sampling, draft_length=length, **options)
        np.add.at(counts, tuple(np.array(written.tokens).T), 1)
    expected = exact_law(target, prompt, 3) * counts.sum()
    statistic, freedom = np.sum((counts - expected) ** 2 / expected), counts.size - 1
    return (statistic - freedom) / np.sqrt(2 * freedom), expected


@pytest.mark.parametrize("method, verify, length", SAMPLERS)
def test_whole_generation_obeys_the_targets_law(method, verify, length):
    """|z| < 4.5 fails a right sampler about once in 1e5; one at a total variation of 0.015 has z near 8.

    A law at distance d from the expected one adds at least 4·n·d² to the statistic (Cauchy–Schwarz): 90 for n = 1e5
    and d = 0.015, where one unit of z is sqrt(2·63) = 11.2.
    """
    with jax.enable_x64(False):
        z, expected = chi_square(method, verify, length, DRAWS, 50_000)
    assert expected.min() > 5
    assert abs(z) < 4.5


# On the host every row takes its time: up to half a millisecond.
@pytest.mark.parametrize("draws", [10_000, pytest.param(DRAWS, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("method, verify, length", HOST_SAMPLERS)
def test_drafts_of_the_host_obey_the_targets_law(method, verify, length, draws, monkeypatch):
    """With all draws as sharp as the test above; with a tenth, z is near 7 at a distance of 0.045."""
    laws, block_law = {}, StringRejection._block

    def once(self, b):
        """Rows of one text have one law, and here most texts are the same."""
        context = tuple(self.rows[b].tokens)
        if context not in laws:
            laws[context] = block_law(self, b)
        return laws[context]

    monkeypatch.setattr(StringRejection, "_block", once)
    with jax.enable_x64(False):
        z, _ = chi_square(method, verify, length, draws, 10_000)
    assert abs(z) < 4.5


def test_stop_tokens_and_stop_strings_end_the_text():
    target, sampling = voice(TARGET, 0), CHANCES["coupled"]
    everything = write(target, PROMPTS, 30, method="ar", sampling=sampling, stop=[]).tokens
    stop = everything[0][5]
    for method in ("ar", "tli", "slem", "lookup"):
        written = write(
            target, PROMPTS, 30, drafter=voice(DRAFT, 1), method=method, sampling=sampling, stop=[stop], draft_length=3
        )
        for row, whole in zip(written.tokens, everything, strict=True):
            assert row == (whole[: whole.index(stop) + 1] if stop in whole else whole)
    prompts, pieces = ["ab", "c"], ["", ""]
    whole, _ = write_text(target, prompts, 30, method="ar", sampling=Sampling(1.0, seed=5), stop=[])
    needle = whole[0][4:7]

    def collect(row, text):
        pieces[row] += text

    for method in ("ar", "tli"):
        pieces[:] = ["", ""]
        texts, _ = write_text(
            target,
            prompts,
            30,
            stop_strings=[needle],
            on_text=collect,
            drafter=voice(DRAFT, 1),
            method=method,
            sampling=Sampling(1.0, seed=5),
            stop=[],
        )
        assert texts == [text.split(needle)[0] for text in whole] == pieces


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": [[0], []]}, r"prompts\[1\].*empty"),
        ({"prompts": [[99]]}, "outside 0 to"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"draft_length": 0}, "draft_length=0"),
        ({"method": "tly"}, "must be one of"),
        ({"method": "slem", "drafter": None}, "needs a model that drafts"),
        ({"method": "slem", "verify": "block"}, "use exact"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"prompts": PROMPTS, "max_new_tokens": 4, "drafter": voice(DRAFT, 1), "method": "tli"} | change
    with pytest.raises(ValueError, match=message):
        write(voice(TARGET, 0), **arguments)


@pytest.mark.parametrize("change", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_sampling_is_named(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}="):
        Sampling(**change)


def test_a_tokenizer_that_does_not_fit_the_embedding_is_refused():
    with pytest.raises(ValueError, match="has 6 ids"):
        make_voice(Decoder(ModelConfig(vocab_size=5, layers=1), rngs=nnx.Rngs(0)), tokenizer(TARGET))
