import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas.training import stability

CALM = [2.0, 2.2] * 300  # mean 2.1, deviation 0.1: a spike lies at 2.8 and above


@pytest.mark.parametrize(("loss", "spike"), [(2.8001, True), (2.7999, False), (1.0, False), (None, True)])
def test_spike_is_seven_deviations_above_the_mean(loss, spike):
    found = stability.spikes([*CALM, loss, *CALM[:5]])
    assert found[len(CALM)] == spike
    assert found.sum() == spike


def test_first_steps_are_no_spikes_unless_not_finite():
    early = [2.0] * 99 + [50.0]
    assert not stability.spikes(early).any()
    assert np.flatnonzero(stability.spikes([2.0, 2.2] * 50 + [50.0])).tolist() == [100]
    assert np.flatnonzero(stability.spikes([2.0, math.nan, 2.0, math.inf])).tolist() == [1, 3]


def test_only_the_last_thousand_steps_count():
    """One loss of 90 within them is enough to hide a spike."""
    for steps, hidden in ((999, True), (1000, False)):
        losses = [90.0, *([2.0, 2.2] * 500)[:steps], 2.9]
        assert stability.spikes(losses)[-1] != hidden


def test_missing_losses_enter_no_mean():
    found = stability.spikes([*CALM, *[None] * 100, 2.8001])
    assert found[-1]
    assert stability.spikes([*CALM, *[None] * 150]).mean() == 150 / 750


def test_spikes_within_a_hundred_steps_are_one_event():
    def losses(gap: int) -> list[float]:
        return [*CALM, 9.0, *(CALM * 2)[: gap - 1], 90.0, *CALM[:9]]

    assert stability.spikes(losses(100)).sum() == stability.spikes(losses(101)).sum() == 2
    for gap, events in ((100, 1), (101, 2)):
        assert stability.spike_events_per_100k(losses(gap)) == pytest.approx(1e5 * events / len(losses(gap)))
    assert stability.spike_events_per_100k(CALM) == 0
    assert stability.spike_events_per_100k([]) == 0


# Numbers of 8 bits: sums and means of them are exact, so that a comparison cannot hang on rounding.
exact = st.integers(0, 255).map(lambda n: n / 16)


@given(st.lists(exact, min_size=1, max_size=30), st.integers(-5, 5), st.sampled_from([0.25, 0.5, 2.0, 4.0]))
def test_spikes_do_not_depend_on_the_unit_of_the_loss(tail, shift, scale):
    losses = CALM[:120] + tail
    np.testing.assert_array_equal(stability.spikes(losses), stability.spikes([scale * loss for loss in losses]))
    shifted = [round(16 * loss) / 16 + shift for loss in losses]
    np.testing.assert_array_equal(stability.spikes(shifted), stability.spikes([loss - shift for loss in shifted]))


@pytest.mark.parametrize(
    ("losses", "diverges"),
    [
        (np.linspace(5, 2, 100), False),
        (np.full(100, 3.0), False),
        ([*np.linspace(5, 2, 90), *[2.19] * 10], False),
        ([*[3.0] * 50, *[2.0] * 10, *[3.0] * 30, *[2.21] * 10], True),
        ([*[3.0] * 50, *[2.0] * 10, *[3.0] * 30, *[2.19] * 10], False),
        ([2.0, 2.0, *[3.0] * 98], False),  # two low steps are noise
        ([*[3.0] * 99, None], True),
    ],
)
def test_divergence(losses, diverges):
    assert stability.diverged(losses) is diverges


def test_largest_stable_rate():
    assert stability.largest_stable_rate({0.1: False, 0.3: False}) == 0.3
    assert stability.largest_stable_rate({0.1: True, 0.3: False}) is None
    assert stability.largest_stable_rate({1.0: False, 0.1: False, 0.3: True}) == 0.1
    assert stability.largest_stable_rate({}) is None


def test_losses_are_those_of_the_longest_branch():
    trunk = [{"phase": "trunk", "step": step, "loss": float(step)} for step in range(1, 9)]
    branches = [{"phase": f"cooldown-{end}", "step": end, "loss": -float(end)} for end in (9, 10)]
    branches.insert(0, {"phase": "cooldown-10", "step": 9, "loss": -9.5})
    assert stability.losses_of([*branches, *trunk]) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, -9.5, -10.0]
    assert stability.losses_of(trunk) == [r["loss"] for r in trunk]
