import itertools

import numpy as np
import pytest
from scipy import stats

from models.decoding.slrs import block_law
from tests.models.decoding import enumeration as enum

TARGET = enum.Vocabulary(["a", "b", "ab", "aab"])
CHARACTERS = enum.Vocabulary(["a", "b"])


def make_law(seed, drafter, length, stop_tokens=(), cost_limit=1000, zeros=0.25):
    q = enum.random_table(seed, len(drafter.pieces), zeros)
    calls = []

    def draft_law(prefixes):
        calls.append(prefixes)
        return np.array([q(tuple(prefix)) for prefix in prefixes.tolist()])

    law = block_law(draft_law, lambda drawn: TARGET.encode(drafter.decode(drawn)), length, stop_tokens, cost_limit)
    return law, q, calls


def brute_force(q, drafter, length):
    """Every sequence of so many tokens, one by one."""
    law = {}
    for drawn in itertools.product(range(len(drafter.pieces)), repeat=length):
        weight = np.prod([q(drawn[:i])[token] for i, token in enumerate(drawn)])
        tokens = TARGET.encode(drafter.decode(drawn))
        law[tokens] = law.get(tokens, 0) + weight
    return {tokens: weight for tokens, weight in law.items() if weight}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pieces", [["a", "b"], ["b", "ba", "aa"]], ids=len)
def test_law_of_the_block_is_that_of_all_sequences(seed, pieces):
    drafter = enum.Vocabulary(pieces)
    law, q, _ = make_law(seed, drafter, 4)
    expected = brute_force(q, drafter, 4)
    assert law.probability.keys() == expected.keys()
    for tokens, weight in expected.items():
        np.testing.assert_allclose(law.probability[tokens], weight, rtol=1e-12)


def test_prefixes_are_shared_and_each_length_is_one_call():
    _, _, calls = make_law(0, CHARACTERS, 4, zeros=0)
    assert [prefixes.shape for prefixes in calls] == [(1, 0), (2, 1), (4, 2), (8, 3)]


def test_stop_tokens_end_a_block_and_belong_to_it():
    """'b' ends a block: 'b', 'ab', 'aab' and 'aaa' are all there is."""
    law, q, _ = make_law(0, CHARACTERS, 3, stop_tokens={1}, zeros=0)
    assert set(law.probability) == {(1,), (2,), (3,), (0, 0, 0)}
    np.testing.assert_allclose(law.probability[2,], q(())[0] * q((0,))[1])


def test_what_cannot_be_drawn_is_not_followed():
    greedy = enum.Vocabulary(["a", "b", "c"])
    law = block_law(
        lambda prefixes: np.tile([0.0, 1.0, 0.0], (len(prefixes), 1)),
        lambda drawn: TARGET.encode(greedy.decode(drawn)),
        50,
        (),
        cost_limit=50,
    )
    assert law.probability == {(1,) * 50: 1.0}


def test_psi_is_the_law_of_the_first_token_and_the_string_is_not():
    """The trap: P(the drafter writes t) sums to more than 1 where tokens nest."""
    law, q, _ = make_law(1, CHARACTERS, 3, zeros=0)
    psi = law.proposal((0,), 4)[0]
    np.testing.assert_allclose(psi.sum(), 1, rtol=1e-12)
    first = [sum(weight for block, weight in law.probability.items() if block[0] == token) for token in range(4)]
    np.testing.assert_allclose(psi, first, rtol=1e-12)
    strings = [[0], [1], [0, 1], [0, 0, 1]]
    written = [np.prod([q(tuple(drawn[:i]))[token] for i, token in enumerate(drawn)]) for drawn in strings]
    assert sum(written) > 1.1 and np.max(np.abs(written - psi)) > 0.05


def test_proposal_multiplies_to_the_law_of_the_blocks():
    """The rows of a block, with the probability that it goes on after each token, give its probability."""
    law, _, _ = make_law(2, enum.Vocabulary(["b", "ba", "aa"]), 3)
    starts = {}
    for block, weight in law.probability.items():
        for i in range(len(block) + 1):
            starts[block[:i]] = starts.get(block[:i], 0) + weight
    for block, weight in law.probability.items():
        rows = law.proposal(block, 6)
        assert rows.shape == (len(block), 6)
        np.testing.assert_allclose(rows.sum(axis=1), 1, rtol=1e-12)
        goes_on = [1 - law.probability.get(block[:i], 0) / starts[block[:i]] for i in range(len(block))]
        ends = weight / starts[block]
        drawn = np.prod([rows[i, token] for i, token in enumerate(block)]) * np.prod(goes_on) * ends
        np.testing.assert_allclose(drawn, weight, rtol=1e-12)


def test_blocks_without_a_target_token():
    """A byte that begins a character may retokenise to nothing: no draft, and psi is of the blocks that have one."""
    law = block_law(
        lambda prefixes: np.tile([0.25, 0.75], (len(prefixes), 1)),
        lambda drawn: [token for token in drawn if token == 1],
        1,
        (),
        cost_limit=10,
    )
    assert law.probability == {(): 0.25, (1,): 0.75}
    np.testing.assert_array_equal(law.proposal((1,), 2), [[0, 1]])
    assert law.proposal((), 2).shape == (0, 2)


def test_draws_follow_the_law():
    law, _, _ = make_law(3, CHARACTERS, 3, zeros=0)
    rng = np.random.default_rng(0)
    drawn = [law.draw(rng) for _ in range(20_000)]
    blocks = list(law.probability)
    seen = [drawn.count(block) for block in blocks]
    expected = 20_000 * np.array([law.probability[block] for block in blocks])
    assert sum(seen) == 20_000
    assert stats.chisquare(seen, expected / expected.sum() * 20_000).pvalue > 0.01


def test_cost_is_limited_and_named():
    with pytest.raises(ValueError, match=r"psi needs 30 drafter sequences up to a length of 4, the limit is 29; look"):
        make_law(0, CHARACTERS, 4, cost_limit=29, zeros=0)
    assert make_law(0, CHARACTERS, 4, cost_limit=30, zeros=0)[0].probability
    with pytest.raises(ValueError, match="limit is 100"):
        make_law(0, CHARACTERS, 1_000, cost_limit=100)
