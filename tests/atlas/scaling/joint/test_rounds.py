"""Steps of rounds that creep are continued, and taken back where that leads astray."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from atlas.scaling.joint.arrow import Coordinates
from atlas.scaling.joint.rounds import Ahead

SD = 1e-6  # posterior standard deviation, far below a step


def creep(x, rate):
    """A round that goes a part of the way to 1, in two coordinates at two paces."""
    return Coordinates(x.own + rate * (1.0 - x.own), x.shared + rate[0, 0] * (1.0 - x.shared))


def rounds_until(ahead, rate, tolerance=1e-3):
    x, covariance = Coordinates(jnp.zeros((1, 2)), jnp.zeros(1)), SD**2 * jnp.eye(2)[None]
    for count in range(1, 1000):
        end = creep(x, rate)
        shift = float(jnp.max(jnp.abs(end.own - x.own))) / SD
        if float(jnp.max(jnp.abs(end.own - 1.0))) < tolerance:
            return count
        found = SimpleNamespace(
            report=SimpleNamespace(shift=shift), state=SimpleNamespace(x=end), covariance=covariance
        )
        further = ahead(x, found) if ahead else None
        x = end if further is None else further
    return count


@pytest.mark.parametrize("rate", [(0.05, 0.05), (0.05, 0.2)])
def test_creeping_steps_are_continued(rate):
    rate = np.array([rate])
    assert rounds_until(Ahead(), rate) < 0.5 * rounds_until(None, rate)


def test_short_steps_are_left_alone():
    ahead, x = Ahead(), Coordinates(jnp.zeros((1, 1)), jnp.zeros(1))
    found = SimpleNamespace(
        report=SimpleNamespace(shift=0.9), state=SimpleNamespace(x=x), covariance=jnp.ones((1, 1, 1))
    )
    assert [ahead(x, found) for _ in range(4)] == [None] * 4


def test_a_step_that_led_astray_is_taken_back():
    ahead, x = Ahead(), [Coordinates(jnp.full((1, 1), value), jnp.zeros(1)) for value in (0.0, 1.0, 1.9, 2.71)]
    given = [
        SimpleNamespace(report=SimpleNamespace(shift=s), state=SimpleNamespace(x=end), covariance=jnp.ones((1, 1, 1)))
        for s, end in zip((10.0, 9.0, 8.1), x[1:], strict=True)
    ]
    assert ahead(x[0], given[0]) is None and ahead(x[1], given[1]) is None
    further = ahead(x[2], given[2])
    assert float(further.own[0, 0]) == pytest.approx(10.0)  # where steps that shrink by a tenth lead
    worse = SimpleNamespace(report=SimpleNamespace(shift=20.0), state=SimpleNamespace(x=further), covariance=None)
    assert ahead(further, worse) is x[3]
