import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from atlas.data import batches
from atlas.data.batches import LanguageOrder, Sampler, permute
from tests.atlas.data.corpora import FakeCorpus

CORPUS = FakeCorpus(en=37, fr=10, de=3)
WEIGHTS = {"en": 0.55, "fr": 0.25, "de": 0.2}
weights_strategy = st.lists(st.floats(1e-6, 1), min_size=1, max_size=40).map(lambda w: [x / sum(w) for x in w])


def sampler(batch_size=16, seed=0, weights=WEIGHTS):
    return Sampler(CORPUS, weights, batch_size, seed)


def counts_before(order, samples):
    """Samples of each language among the first ones, from the shares of the tree's nodes alone."""
    count = {len(order._share) - 1: samples}
    for node in reversed(range(order.num_languages, len(order._share))):
        left, right = order._child[node]
        count[left] = order._to_left(node, count[node])
        count[right] = count[node] - count[left]
    return np.array([count[language] for language in range(order.num_languages)])


@example([0.9] + [0.1 / 39] * 39, 0)  # errs by up to 20 where the heavy one lies deep in the tree
@given(weights_strategy, st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_proportions_hold_at_every_length(weights, start):
    order = LanguageOrder(weights)
    language, rank = order.at(np.arange(start, start + 500))
    counts = counts_before(order, start)
    for n, (this, preceding) in enumerate(zip(language, rank, strict=True), start=start):
        assert counts[this] == preceding
        counts[this] += 1
        assert counts.sum() == n + 1
        # The last term is the rounding of shares to 2^-31.
        assert np.all(np.abs(counts - (n + 1) * np.array(weights)) < 1.68 + n * 40 / 2**31)


def test_two_languages_never_err_by_more_than_half_a_window():
    order = LanguageOrder([0.3, 0.7])
    language, _ = order.at(np.arange(5000))
    counts = np.cumsum(language == 0)
    assert np.abs(counts - 0.3 * np.arange(1, 5001)).max() <= 0.5 + 1e-4


@given(st.integers(1, 3000), st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_permutations_visit_everything_once(size, key):
    positions = np.arange(size)
    permuted = permute(positions, np.full(size, size), np.full(size, key, np.uint64))
    assert np.array_equal(np.sort(permuted), positions)


def test_permutations_mix_and_differ_by_key():
    def order(key):
        return permute(np.arange(1000), np.full(1000, 1000), np.full(1000, key, np.uint64))

    assert abs(np.corrcoef(order(1), np.arange(1000))[0, 1]) < 0.1
    assert abs(np.corrcoef(order(1), order(2))[0, 1]) < 0.1
    # Neighbours do not stay neighbours.
    assert np.mean(np.abs(np.diff(order(3))) == 1) < 0.02


def test_permutations_are_uniform_over_small_orders():
    keys = np.repeat(np.arange(6000, dtype=np.uint64), 3)
    orders = permute(np.tile(np.arange(3), 6000), np.full(18000, 3), keys).reshape(-1, 3)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6
    assert np.sum((counts - 1000) ** 2 / 1000) < 25  # chi-square with 5 degrees of freedom, p ≈ 1e-4


def test_each_epoch_visits_each_window_once_in_a_new_order():
    one = sampler(batch_size=1, weights={"fr": 1.0})
    windows = np.array([one.batch(step).tokens[0, 0] for step in range(30)]).reshape(3, 10)
    assert np.array_equal(np.sort(windows, axis=1), np.tile(np.arange(10), (3, 1)))
    assert len({tuple(epoch) for epoch in windows}) == 3


def test_epochs_are_whole_within_a_mixture_too():
    mixed = [sampler().batch(step) for step in range(100)]
    tokens = np.concatenate([batch.tokens[:, 0] for batch in mixed])
    language = np.concatenate([batch.language for batch in mixed])
    for i, name in enumerate(CORPUS.languages):
        seen = tokens[language == i]
        n = len(CORPUS.windows(name, "train"))
        whole = seen[: len(seen) // n * n].reshape(-1, n)
        assert len(whole) > 1
        assert np.array_equal(np.sort(whole, axis=1), np.tile(np.arange(n), (len(whole), 1)))


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_see_together_the_batch_of_one(hosts):
    share = 16 // hosts
    for step in (0, 7, 1000):
        whole = sampler().batch(step)
        parts = [sampler().batch(step, slice(h * share, (h + 1) * share)) for h in range(hosts)]
        assert np.array_equal(np.concatenate([part.tokens for part in parts]), whole.tokens)
        assert np.array_equal(np.concatenate([part.language for part in parts]), whole.language)


def test_a_batch_depends_on_seed_and_step_alone():
    forward, backward = sampler(), sampler()
    steps = [0, 1, 255, 256, 257, 900, 5000]
    expected = {step: forward.batch(step).tokens for step in steps}
    for step in reversed(steps):
        assert np.array_equal(backward.batch(step).tokens, expected[step])
    assert not np.array_equal(sampler(seed=1).batch(0).tokens, expected[0])
    assert not np.array_equal(expected[0], expected[1])


def test_plans_of_any_size_give_the_same_batches(monkeypatch):
    expected = [sampler().batch(step).tokens for step in range(20)]
    monkeypatch.setattr(batches, "_PLAN_SAMPLES", 48)
    assert all(np.array_equal(sampler().batch(step).tokens, expected[step]) for step in range(20))


@given(weights_strategy)
@settings(max_examples=30, deadline=None)
def test_ranks_count_what_came_before(weights):
    language, rank = LanguageOrder(weights).at(np.arange(300))
    assert rank.tolist() == [int(np.sum(language[:n] == this)) for n, this in enumerate(language)]


def test_language_is_the_position_in_the_corpus():
    batch = sampler(weights={"de": 0.5, "fr": 0.5}).batch(0)
    assert set(batch.language) == {1, 2}
    assert batch.tokens.dtype == batch.language.dtype == np.int32
    assert batch.tokens.shape == (16, CORPUS.window + 1)


def test_a_languages_order_does_not_depend_on_the_others():
    alone, together = sampler(weights={"fr": 1.0}), sampler(weights={"fr": 0.5, "en": 0.5})
    order = [b.tokens[b.language == 1, 0] for b in (together.batch(0), together.batch(1))]
    assert np.array_equal(np.concatenate(order), alone.batch(0).tokens[:, 0])
