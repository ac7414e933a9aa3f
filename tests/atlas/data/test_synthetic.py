import lzma

import numpy as np
import pytest

from atlas.data import synthetic


def text(language, num_bytes=30_000, split="train", seed=0):
    return " ".join(synthetic.documents(language, split, num_bytes, seed))


def words(language):
    return text(language).replace(".", "").split()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_relatedness_ranks_sisters_cousins_and_strangers(seed):
    shares = synthetic.relatedness(("a1", "a2", "a3", "b1", "d1"), seed)
    assert 0.75 < shares["a1", "a2"] < 0.95
    assert 0.3 < shares["a1", "a3"] < 0.7
    assert shares["a1", "b1"] == 0
    assert shares["a1", "d1"] < 0.05


def test_relatedness_is_what_texts_show():
    shares = synthetic.relatedness(("a1", "a2", "a3"), 0)
    for source in ("a2", "a3"):
        vocabulary = set(text(source, 400_000).replace(".", "").split())
        shown = np.mean([word in vocabulary for word in words("a1")])
        assert shown == pytest.approx(shares["a1", source], abs=0.03)


def test_texts_are_deterministic_and_independent():
    assert text("a1") == text("a1")
    others = [text("a1", seed=1), text("a2"), text("a1", split="validation")]
    assert len({text("a1"), *others}) == 4
    # Independent texts in two languages of one lexicon would agree at chance level only.
    first, second = words("a1"), words("a2")
    assert np.mean([a == b for a, b in zip(first, second, strict=False)]) < 0.2


def test_a_longer_text_begins_with_the_shorter():
    assert text("b1", 50_000).startswith(text("b1", 20_000)[:20_000])


def test_size_is_the_least_that_whole_documents_reach():
    documents = list(synthetic.documents("c1", "train", 30_000, 0))
    sizes = np.cumsum([len(document.encode()) for document in documents])
    assert sizes[-2] < 30_000 <= sizes[-1]


@pytest.mark.parametrize(("language", "first", "last"), [("a1", "a", "z"), ("b1", "а", "я"), ("c1", "α", "ω")])
def test_scripts(language, first, last):
    assert all(first <= letter <= last for letter in text(language) if letter not in " .")


def test_sisters_share_their_script_letters_one_to_one():
    assert all(len(set(script)) == len(script) == 24 for script in synthetic._SCRIPTS)


def test_frequencies_are_skewed():
    _, counts = np.unique(words("a1"), return_counts=True)
    assert np.sort(counts)[-20:].sum() > 0.3 * counts.sum()
    assert len(counts) > 300


def test_documents_keep_to_their_topic_and_protagonists():
    documents = [d.replace(".", "").split() for d in synthetic.documents("a1", "train", 100_000, 0)]
    first = [set(document[: len(document) // 2]) for document in documents]
    second = [document[len(document) // 2 :] for document in documents]

    def repeated(halves):
        return np.mean([word in half for half, words in zip(halves, second, strict=True) for word in words])

    assert repeated(first) > repeated([*first[1:], first[0]]) + 0.05


def test_texts_of_relatives_help_to_predict_a_language():
    target = text("a1", 20_000).encode()

    def cost(language):
        source = text(language, 200_000).encode()
        return len(lzma.compress(source + target)) - len(lzma.compress(source))

    sister, cousin, stranger, foreign = map(cost, ("a2", "a3", "d1", "b1"))
    assert sister < 0.9 * cousin < 0.9 * min(stranger, foreign)
