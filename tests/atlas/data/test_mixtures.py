import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas.data import mixtures
from checked import UserError

SIZES = {"en": 400, "fr": 200, "de": 40, "sw": 4}


def parse(spec, budget_tokens=1000):
    return mixtures.parse(spec, SIZES, SIZES, budget_tokens)


def test_unimax_is_of_tokens_and_temperature_of_bytes():
    sizes = {"en": 30, "fr": 10}, {"en": 1, "fr": 3}
    assert mixtures.parse("temperature(*;temperature=1)", *sizes, 9) == {"en": 0.25, "fr": 0.75}
    assert mixtures.parse("unimax(*;epochs=1)", *sizes, 40) == {"en": 0.75, "fr": 0.25}


def test_parses_every_kind():
    assert parse("en") == {"en": 1.0}
    assert parse("en:0.7, fr:0.3") == pytest.approx({"en": 0.7, "fr": 0.3})
    assert parse("uniform(en,fr,de)") == pytest.approx({"en": 1 / 3, "fr": 1 / 3, "de": 1 / 3})
    assert list(parse("uniform(*)")) == ["en", "fr", "de", "sw"]
    # The caps of 2 epochs bind for sw and de alone.
    assert parse("unimax(*;epochs=2)", 488) == pytest.approx(
        {"en": 200 / 488, "fr": 200 / 488, "de": 80 / 488, "sw": 8 / 488}
    )
    assert parse("temperature(en,fr;temperature=1)") == pytest.approx({"en": 2 / 3, "fr": 1 / 3})
    assert parse("temperature(en,fr;temperature=1e9)") == pytest.approx({"en": 0.5, "fr": 0.5})


def test_weight_zero_leaves_a_language_out():
    assert parse("en:1,fr:0") == {"en": 1.0}


def test_unimax_matches_the_papers_algorithm_on_the_toy_case():
    assert mixtures.unimax({"c": 100, "a": 1, "b": 10}, 60, 4) == {"c": 28, "a": 4, "b": 28}


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=8), st.floats(1, 1e7), st.floats(0.5, 50))
def test_unimax_spends_the_budget_within_the_caps_as_evenly_as_possible(counts, budget, epochs):
    counts = dict(enumerate(counts))
    amounts = mixtures.unimax(counts, budget, epochs)
    assert sum(amounts.values()) == pytest.approx(min(budget, epochs * sum(counts.values())))
    uncapped = [amounts[k] for k in counts if amounts[k] < counts[k] * epochs * (1 - 1e-9)]
    assert all(amounts[k] <= counts[k] * epochs * (1 + 1e-9) for k in counts)
    # Whoever is below its cap gets the same, and no one gets more.
    assert not uncapped or max(amounts.values()) == pytest.approx(min(uncapped))


@given(st.integers(1, 50), st.integers(0, 1000))
def test_dirichlet_specs_always_parse(languages, seed):
    sizes = {f"l{i}": 5 for i in range(languages)}
    spec = mixtures.dirichlet(tuple(sizes), seed)
    assert spec == mixtures.dirichlet(tuple(sizes), seed)
    assert sum(mixtures.parse(spec, sizes, sizes, 100).values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", ["empty"]),
        ("uniform()", ["empty", "uniform()"]),
        ("enn", ["'enn'", "did you mean 'en'"]),
        ("en:0.5,frr:0.5", ["'frr'", "did you mean 'fr'"]),
        ("en:0.5,fr:0.4", ["sum to 0.9"]),
        ("en:1.5,fr:-0.5", ["1.5"]),
        ("en:1.0,fr:-0.0001", ["fr", "-0.0001"]),
        ("en:0.5,en:0.5", ["en", "more than once"]),
        ("uniform(en,en)", ["more than once"]),
        ("en:half,fr:0.5", ["half"]),
        ("en:nan,fr:0.5", ["nan"]),
        ("en,fr", ["needs a number"]),
        ("unimux(en,fr)", ["unimux", "did you mean 'unimax'"]),
        ("unimax(en,fr;epoch=4)", ["epoch", "epochs"]),
        ("unimax(en,fr;epochs=0)", ["epochs", "positive"]),
        ("uniform(en;epochs=2)", ["epochs", "none"]),
    ],
)
def test_mistakes_are_named_in_one_line(spec, words):
    with pytest.raises(UserError) as error:
        parse(spec)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_sums_within_the_tolerance_are_accepted():
    assert sum(parse("en:0.3333333,fr:0.3333333,de:0.3333333").values()) == pytest.approx(1, abs=1e-12)
