import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from models.decoding.draft_length import LENGTHS, DraftLength, acceptance, best_draft_length, expected_tokens


@settings(deadline=None)
@given(
    st.floats(0, 1),
    st.floats(0.01, 1),
    st.lists(st.floats(1, 3), min_size=4, max_size=4),
    st.permutations([0, 1, 4, 8]),
)
def test_best_draft_length_commits_the_most_tokens_a_second(acceptance, draft_cost, verify_costs, lengths):
    best = best_draft_length(acceptance, draft_cost, verify_costs, lengths)
    seconds = {n: n * draft_cost + cost for n, cost in zip(lengths, verify_costs, strict=True)}
    assert best in lengths
    for n in lengths:
        assert expected_tokens(acceptance, best) / seconds[best] >= expected_tokens(acceptance, n) / seconds[n]


def test_useless_drafts_are_not_made():
    assert best_draft_length(0.0, 0.1, [1.0, 1.0, 1.0], [0, 2, 4]) == 0
    assert best_draft_length(0.9, 0.01, [1.0, 1.1, 1.2], [0, 2, 4]) == 4


@settings(deadline=None)
@given(st.floats(0, 1), st.integers(1, 8))
def test_acceptance_is_found_from_the_tokens_a_call(rate, n_draft):
    np.testing.assert_allclose(
        expected_tokens(acceptance(expected_tokens(rate, n_draft), n_draft), n_draft),
        expected_tokens(rate, n_draft),
        rtol=1e-4,
    )


def test_the_length_follows_what_is_accepted_and_a_fixed_one_does_not():
    adaptive, fixed = (DraftLength(n, draft_cost=0.1, verify_costs=(1.0, 1.1, 1.4)) for n in (None, 2))
    begin = adaptive.current
    for length in (adaptive, fixed):
        length.update(tokens=4, calls=4)
    assert adaptive.current == begin  # too few calls to know
    adaptive.update(tokens=5 * 8, calls=8)
    assert adaptive.current == max(LENGTHS)
    for _ in range(8):
        adaptive.update(tokens=8, calls=8)
        fixed.update(tokens=8, calls=8)
    assert adaptive.current == 0 and fixed.current == 2
