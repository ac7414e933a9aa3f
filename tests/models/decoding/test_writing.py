"""Whole generation: one text whatever drafts, and the target's law where the text may differ."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from models import Decoder, ModelConfig
from models.decoding import Sampling, generate, make_voice, stream, write
from models.decoding.language_model import prefill, right_padded, with_room
from models.decoding.proposers import StringRejection
from models.decoding.writing import writing
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
    monkeypatch.setattr("models.decoding.writing.measure", lambda voice, batch, capacity, tokens: float(tokens))
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
LAWS = {"plain": {}, "min-p": {"min_p": 0.3}, "penalty": {"repetition_penalty": 2.5}}
# The same for laws that are cut, and for one that depends on all of the text, so that it differs from place to place.
LAW_SAMPLERS = [
    ("penalty", "tli", "rejection", 2),
    thorough("min-p", "tli", "block", 2),
    thorough("penalty", "tli", "block", 3),
    thorough("penalty", "ar", "exact", None),
    thorough("penalty", "lookup", "exact", 2),
    thorough("penalty", "slem", "exact", 2),
    thorough("min-p", "slrs", "rejection", 2),
]


def chi_square(method, verify, length, draws, batch, law="plain"):
    """z of the chi-square statistic of the joint law of three tokens, against the exact law."""
    small = {"end": False, "rows": None, "dtype": "float32", "peak": 0.7}
    target = voice(TARGET[:4], 0, **small)
    words, seed = (TARGET[:4], 5) if method == "same" else (DRAFT, 1)
    drafter = voice(words, seed, **small)
    options = {"drafter": drafter, "method": "tli" if method == "same" else method, "verify": verify}
    prompt, counts = [0, 1, 0], np.zeros((4,) * 3)
    for start in range(0, draws, batch):
        sampling = Sampling(temperature=1.0, seed=list(range(start, start + batch)), **LAWS[law])
        written = write(target, [prompt] * batch, 3, sampling=sampling, draft_length=length, **options)
        np.add.at(counts, tuple(np.array(written.tokens).T), 1)
    expected = exact_law(target, prompt, 3, **LAWS[law]) * counts.sum()
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0]
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


@pytest.mark.parametrize("law, method, verify, length", LAW_SAMPLERS)
def test_cut_and_penalised_laws_are_obeyed(law, method, verify, length):
    """As the test before, which says what it can see; the other law is far away."""
    with jax.enable_x64(False):
        z, expected = chi_square(method, verify, length, 10_000, 10_000, law)
    assert abs(z) < 4.5
    assert expected.size < 64 if law == "min-p" else expected.size == 64


@pytest.mark.parametrize("method", ["tli", thorough("slem"), "lookup"])
def test_a_penalised_text_is_the_plain_one_whatever_drafts(method):
    target, sampling = voice(TARGET, 0), Sampling(1.0, min_p=0.1, repetition_penalty=1.5, seed=[1, 2, 3])
    written = write(target, PROMPTS, NEW, drafter=voice(DRAFT, 1), method=method, sampling=sampling, draft_length=3)
    assert written.tokens == plain(target, sampling) != plain(target, CHANCES["coupled"])


@pytest.mark.parametrize("method", ["ar", thorough("tli"), thorough("slem")])
def test_a_text_outgrows_its_cache(method, monkeypatch):
    """Caches that begin with 32 slots, beside one with slots for all of the text."""
    target, drafter, sampling = voice(TARGET, 0), voice(DRAFT, 1), Sampling(1.0, seed=[1, 2])
    prompts, options = [[0, 1] * 5, [4]], {"stop": (), "sampling": sampling}
    whole = plain(target, prompts=prompts, new=30, **options)
    for name, value in {"language_model._SLOTS": 32, "language_model._WIDE": 32, "writing._ROOM": 4}.items():
        monkeypatch.setattr(f"models.decoding.{name}", value)
    assert write(target, prompts, 30, drafter=drafter, method=method, draft_length=4, **options).tokens == whole


def test_slots_are_for_what_is_written(monkeypatch):
    """A text that may have 8,000 tokens has slots for the 300 that it has."""
    target, sizes = voice(TARGET, 0), []

    def grow(voice, cache, tokens):
        cache = with_room(voice, cache, tokens)
        sizes.append(cache.capacity)
        return cache

    monkeypatch.setattr("models.decoding.writing.with_room", grow)
    for tokens in writing(target, [[0, 1]], 8000, method="ar", stop=()):
        if len(tokens[0]) > 300:
            break
    assert sizes[0] == 256 and sizes[-1] == 512


def test_prompts_are_read_piece_by_piece():
    """The cache of a prompt of any length is that of its tokens read at once."""
    target, at_once = voice(TARGET, 0), jax.jit(voice(TARGET, 0).model.extend)
    for n in (2, 31, 33, 250, 257, 300):
        row = np.random.default_rng(n).integers(0, 5, n).tolist()
        cache = prefill(target, [row, row[: n // 2 + 1]], 1)
        assert cache.length.tolist() == [n - 1, n // 2]
        empty = target.model.init_cache(target.params, 1, cache.capacity)
        _, read = at_once(target.params, right_padded([row], cache.capacity), empty)
        for piece, whole in zip(cache.layers, read.layers, strict=True):
            np.testing.assert_allclose(piece.key[0, : n - 1], whole.key[0, : n - 1], atol=1e-12)
            np.testing.assert_allclose(piece.value[1, : n // 2], whole.value[0, : n // 2], atol=1e-12)


def test_prompts_of_all_lengths_share_their_programs():
    """Lookup of two drafts at most, for four lengths of prompts: one program reads them, and one a width writes."""
    target, compiled = voice(TARGET, 0, layers=2), []

    def count(event, seconds, **_):
        compiled.append(event) if event == "/jax/core/compile/backend_compile_duration" else None

    jax.monitoring.register_event_duration_secs_listener(count)
    for n in (3, 30, 100, 170):
        write(target, [[0] * n], 20, stop=(), draft_length=2)
    assert 2 <= len(compiled) <= 4


def test_broken_weights_are_said():
    target = voice(TARGET, 0)
    broken = target._replace(params=tuple(leaf.at[(0,) * leaf.ndim].set(np.nan) for leaf in target.params))
    with pytest.raises(ValueError, match="logits are no finite numbers"):
        write(broken, PROMPTS, NEW, method="ar")


def test_samples_of_a_prompt_and_their_probabilities():
    target, options = voice(TARGET, 0), {"method": "ar", "max_new_tokens": 6, "stop": ()}
    sampling = Sampling(1.0, seed=7)
    several = generate(target, ["ab", "c"], n=2, logprobs=True, sampling=sampling, **options)
    alone = [
        generate(target, [prompt], sampling=Sampling(1.0, seed=seed), **options).texts[0]
        for prompt in ("ab", "c")
        for seed in (7, 8)
    ]
    assert several.texts == alone and len(set(alone)) > 2
    for prompt, tokens, logprobs in zip(("ab", "ab", "c", "c"), several.written.tokens, several.logprobs, strict=True):
        law = exact_law(target, target.tokenizer.encode_prompt(prompt), 3)
        assert sum(logprobs[:3]) == pytest.approx(np.log(law[tuple(tokens[:3])]), abs=1e-5)
        assert len(logprobs) == len(tokens)


def test_new_tokens_are_those_that_fit():
    target = voice(TARGET, 0)
    short = target._replace(model=dataclasses.replace(target.model, context=20))
    options = {"method": "ar", "stop": ()}
    assert len(generate(short, ["abcab", "c"], **options).written.tokens[1]) == 20 - len(
        short.tokenizer.encode_prompt("abcab")
    )
    with pytest.raises(ValueError, match=r"max_new_tokens=20 and the 1 tokens of .* window of 20 tokens; give max_new"):
        generate(short, ["c"], max_new_tokens=20, **options)
    with pytest.raises(ValueError, match="give a prompt of fewer than 20"):
        generate(short, ["c" * 20], **options)


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
    options = {"max_new_tokens": 30, "sampling": Sampling(1.0, seed=5), "stop": []}
    whole = generate(target, prompts, method="ar", **options).texts
    needle = whole[0][4:7]
    options |= {"stop_strings": [needle], "drafter": voice(DRAFT, 1)}
    for method in ("ar", "tli"):
        pieces[:] = ["", "", ""]
        for row, piece in stream(target, prompts, method=method, **options):
            pieces[row] += piece
        texts = generate(target, prompts, method=method, **options).texts
        assert texts == [text.split(needle)[0] for text in whole] == pieces


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": [[0], []]}, r"prompts\[1\].*empty"),
        ({"prompts": [[99]]}, "outside 0 to"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"draft_length": 0}, "draft_length=0"),
        ({"draft_length": 17}, "draft_length=17 must be from 1 to 16"),
        ({"sampling": Sampling(1.0, seed=[1, 2])}, r"seed=\[1, 2\] must be one number, or one for each of 3"),
        ({"method": "tly"}, "must be one of"),
        ({"method": "slem", "drafter": None}, "needs a model that drafts"),
        ({"method": "slem", "verify": "block"}, "use exact"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"prompts": PROMPTS, "max_new_tokens": 4, "drafter": voice(DRAFT, 1), "method": "tli"} | change
    with pytest.raises(ValueError, match=message):
        write(voice(TARGET, 0), **arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"seed": -1},
        {"seed": 2**32},
        {"seed": [0, 1.5]},
    ],
)
def test_bad_sampling_is_named(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))}="):
        Sampling(**change)


def test_a_tokenizer_that_does_not_fit_the_embedding_is_refused():
    decoder, own = Decoder(ModelConfig(vocab_size=5, layers=1), rngs=nnx.Rngs(0)), tokenizer(TARGET[:4])
    for fits in (own, tokenizer(TARGET, end=False)):
        make_voice(decoder, fits)
    # Special ids beyond the embedding that no text has and none begins or ends with.
    more = dataclasses.replace(own, table=(*own.table, None, None), roles=own.roles | {"pad": (6,)})
    assert make_voice(decoder, more).tokenizer.roles == own.roles
    assert make_voice(decoder, more).tokenizer.vocab_size == 5
    with pytest.raises(ValueError, match="has 6 ids"):
        make_voice(decoder, tokenizer(TARGET))
    with pytest.raises(ValueError, match="has 10 ids"):
        make_voice(decoder, dataclasses.replace(own, roles=own.roles | {"eos": (9,)}))
