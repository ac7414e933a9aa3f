"""Whole generation: one text whatever drafts, and the target's law where the text may differ."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from models import Decoder, ModelConfig
from models.decoding import Sampling, make_voice, write, write_text
from models.decoding.proposers import StringRejection
from tests.models.decoding.toys import DRAFT, TARGET, exact_law, tokenizer, voice

PROMPTS = [[0, 1, 2], [4], [3, 3, 1, 0, 2, 2]]
NEW, LENGTH = 12, 3
CHANCES = {"greedy": Sampling(), "coupled": Sampling(temperature=1.0, seed=[1, 2, 3])}
ROWS = {"greedy": 8, "coupled": 6}  # of the target's embedding; the tokenizer has 6 ids
thorough = functools.partial(pytest.param, marks=pytest.mark.thorough)


@pytest.fixture(autouse=True, scope="module")
def double_precision():
    with jax.enable_x64(True):
        yield


def plain(target, sampling, prompts=PROMPTS, new=NEW, **options):
    return write(target, prompts, new, method="ar", sampling=sampling, **options).tokens


@pytest.mark.parametrize(
    "chance, method, length",
    [
        ("coupled", "tli", 3),
        ("greedy", "tli", 1),
        ("coupled", "slem", 3),
        ("greedy", "lookup", 3),
        ("coupled", "slrs", 2),
        *(thorough("coupled", method, 1) for method in ("tli", "slem", "lookup", "slrs")),
        *(thorough("greedy", method, 3) for method in ("tli", "slem", "slrs")),
    ],
)
def test_exact_verification_writes_the_plain_text(chance, method, length):
    target, drafter, sampling = voice(TARGET, 0, rows=ROWS[chance]), voice(DRAFT, 1), CHANCES[chance]
    written = write(target, PROMPTS, NEW, drafter=drafter, method=method, sampling=sampling, draft_length=length)
    assert written.tokens == plain(target, sampling)
    assert sum(written.calls) <= sum(map(len, written.tokens))


@pytest.mark.parametrize("method", ["tli", thorough("slem"), thorough("lookup")])
def test_eight_ragged_prompts_and_two_tokenizers(method):
    """A batch writes what every prompt alone is continued with, each row with its own seed."""
    target, drafter = voice(TARGET, 0), voice(DRAFT, 1)
    prompts = [[(3 * i + j) % 5 for j in range(1 + i)] for i in range(8)]
    sampling = Sampling(temperature=0.8, seed=list(range(8)))
    written = write(target, prompts, NEW, drafter=drafter, method=method, sampling=sampling, draft_length=LENGTH)
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
        thorough((b"a", b"a", b"b"), 3, 1.0, "tli"),  # duplicates
        (TARGET, 0, 1.0, "slem"),
        (TARGET, 7, 30.0, "slem"),
        ((b"a",), 3, 1.0, "slem"),
    ],
)
def test_adversarial_drafters_change_nothing_but_speed(words, seed, peak, method):
    target, sampling = voice(TARGET, 0), CHANCES["coupled"]
    drafter = voice(words, seed, peak=peak, rows=max(6, len(words) + 1))
    written = write(target, PROMPTS, NEW, drafter=drafter, method=method, sampling=sampling, draft_length=LENGTH)
    assert written.tokens == plain(target, sampling)
    if (words, seed, method) == (TARGET, 0, "tli"):
        # Its drafts are the target's own samples: all are accepted, but for those cut off at the end of a row.
        assert sum(written.calls) == sum(-(-len(row) // (1 + LENGTH)) for row in written.tokens)


@pytest.mark.parametrize("new, stop_at", [(9, None), (10, None), (12, None), (12, 1), (12, 2), (12, 3)])
def test_an_accepted_draft_that_ends_a_row_counts(new, stop_at):
    """Every fourth token is the target's own, all others are accepted drafts, the last of a row too."""
    target, sampling = voice(TARGET, 0), CHANCES["coupled"]
    whole = plain(target, sampling, new=new, stop=())
    stop = () if stop_at is None else (whole[2][stop_at],)
    written = write(
        target, PROMPTS, new, drafter=target, method="tli", sampling=sampling, draft_length=LENGTH, stop=stop
    )
    lengths = list(map(len, written.tokens))
    assert written.calls == [-(-n // (1 + LENGTH)) for n in lengths]
    assert written.accepted == [n - n // (1 + LENGTH) for n in lengths]
    assert written.drafted == [LENGTH * calls for calls in written.calls]
    if stop:
        assert lengths[2] == whole[2].index(*stop) + 1


def test_disjoint_vocabularies_draft_by_text_or_are_refused():
    target, drafter = voice(TARGET, 0), voice((b"x", b"y"), 1, end=False)
    with pytest.raises(ValueError, match="share no token"):
        write(target, PROMPTS, NEW, drafter=drafter, method="tli")
    expected = plain(target, CHANCES["coupled"])
    written = write(target, PROMPTS, NEW, drafter=drafter, sampling=CHANCES["coupled"], draft_length=LENGTH)
    assert written.method == "slem" and written.tokens == expected


@pytest.mark.parametrize(
    "attention, method", [("gated_sparse", "tli"), thorough("gated", "tli"), thorough("gated_sparse", "lookup")]
)
def test_our_attention_kinds_decode_speculatively(attention, method):
    target = voice(TARGET, 0, attention=attention)
    prompts = [[0, 1, 2, 3], [4, 2]]
    written = write(target, prompts, 4, drafter=voice(DRAFT, 1), method=method, draft_length=2)
    assert written.tokens == plain(target, Sampling(), prompts, 4)


def test_the_draft_length_may_fall_to_none(monkeypatch):
    """The fourth of the lengths that are compiled first, then plain decoding; the text is that of plain decoding."""
    monkeypatch.setattr("models.decoding.generate.measure", lambda voice, batch, capacity, tokens: float(tokens))
    target, drafter, sampling = voice(TARGET, 0), voice(DRAFT, 1), CHANCES["coupled"]
    written = write(target, PROMPTS, 40, drafter=drafter, method="tli", sampling=sampling)
    assert written.tokens == plain(target, sampling, new=40)
    assert 0 < sum(written.drafted) < 4 * sum(written.calls)


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["tli", "slem", "auto"])
def test_draft_lengths_adapt_to_measured_costs(method):
    target, drafter, sampling = voice(TARGET, 0), voice(DRAFT, 1), CHANCES["coupled"]
    written = write(target, PROMPTS, 40, drafter=drafter, method=method, sampling=sampling)
    assert written.tokens == plain(target, sampling, new=40)


def test_without_a_drafter_the_text_drafts_for_itself():
    assert write(voice(TARGET, 0, rows=8), PROMPTS, NEW, draft_length=LENGTH).method == "lookup"


# Method, verification, draft length. Every one draws three tokens, in rounds that start and end anywhere in them.
SAMPLERS = [
    ("ar", "exact", None),
    ("tli", "exact", 2),
    ("tli", "block", 3),
    thorough("tli", "rejection", 3),
    ("same", "rejection", 2),
    ("lookup", "exact", 2),
    ("slem", "exact", 2),
    ("slrs", "rejection", 2),
    thorough("slrs", "block", 2),
]


def chi_square(method, verify, length, draws, batch):
    """z of the chi-square statistic of the joint law of three tokens, against the exact law."""
    small = {"end": False, "rows": None, "dtype": "float32", "peak": 0.7}
    target = voice(TARGET[:4], 0, **small)
    words, seed = (TARGET[:4], 5) if method == "same" else (DRAFT, 1)
    drafter = voice(words, seed, **small)
    options = {"drafter": drafter, "method": "tli" if method == "same" else method, "verify": verify}
    prompt, counts = [0, 1, 0], np.zeros((4,) * 3)
    for start in range(0, draws, batch):
        sampling = Sampling(temperature=1.0, seed=list(range(start, start + batch)))
        written = write(target, [prompt] * batch, 3, sampling=sampling, draft_length=length, **options)
        np.add.at(counts, tuple(np.array(written.tokens).T), 1)
    expected = exact_law(target, prompt, 3) * counts.sum()
    statistic, freedom = np.sum((counts - expected) ** 2 / expected), counts.size - 1
    return (statistic - freedom) / np.sqrt(2 * freedom), expected


@pytest.mark.parametrize("draws", [10_000, thorough(100_000)])
@pytest.mark.parametrize("method, verify, length", SAMPLERS)
def test_whole_generation_obeys_the_targets_law(method, verify, length, draws, monkeypatch):
    """|z| < 4.5 fails a right sampler about once in 1e5; with all draws, one at a distance of 0.015 has z near 8.

    A law at a total variation of d from the expected one adds at least 4·n·d² to the statistic (Cauchy–Schwarz): 90
    for n = 1e5 and d = 0.015, where one unit of z is sqrt(2·63) = 11.2. A tenth of the draws has z near 7 at 0.045.
    """
    laws, block_law = {}, StringRejection._block

    def once(self, b, length):
        """Rows of one text have one law, and here most texts are the same."""
        context = tuple(self.rows[b].tokens)
        if context not in laws:
            laws[context] = block_law(self, b, length)
        return laws[context]

    monkeypatch.setattr(StringRejection, "_block", once)
    with jax.enable_x64(False):
        z, expected = chi_square(method, verify, length, draws, 10_000)
    assert expected.min() > 0.0001 * draws
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
    prompts, pieces = ["ab", "c", "bc"], ["", "", ""]
    whole, _ = write_text(target, prompts, 30, method="ar", sampling=Sampling(1.0, seed=5), stop=[])
    needle = whole[0][4:7]

    def collect(row, text):
        pieces[row] += text

    for method in ("ar", "tli"):
        pieces[:] = ["", "", ""]
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
    decoder, own = Decoder(ModelConfig(vocab_size=5, layers=1), rngs=nnx.Rngs(0)), tokenizer(TARGET[:4])
    for fits in (own, tokenizer(TARGET, end=False)):
        make_voice(decoder, fits)
    with pytest.raises(ValueError, match="has 6 ids"):
        make_voice(decoder, tokenizer(TARGET))
    with pytest.raises(ValueError, match="has 10 ids"):
        make_voice(decoder, dataclasses.replace(own, roles=own.roles | {"eos": (9,)}))
