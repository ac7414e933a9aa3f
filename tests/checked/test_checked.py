import dataclasses
import math

import numpy as np
import pytest

from checked import Checked, UserError, describe, field, leaves, overlay, read


@dataclasses.dataclass(frozen=True)
class Inner(Checked, section="inner"):
    rate: float = field(0.5, "a rate", unit="1/s", above=0, most=1)
    kinds: tuple[str, ...] = field((), "names", choices=("a", "bb"))


@dataclasses.dataclass(frozen=True)
class Outer(Checked):
    count: int = field(1, "a count", least=1)
    whole: bool = field(True, "a switch")
    name: str = field("x", "a label", pattern=r"\w+")
    ends: tuple[int, ...] = field((1,), "ends", least=1)
    inner: Inner = Inner()

    def check(self) -> None:
        self.require(self.count < 9 or self.whole, "count", "is too large")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count=0 must be a whole number of at least 1"),
        ({"count": 2.0}, "count=2.0 must be a whole number"),
        ({"count": True}, "count=True must be a whole number"),
        ({"count": "2"}, "count='2' must be"),
        ({"count": 9, "whole": False}, "count=9 is too large"),
        ({"whole": 1}, "whole=1 must be True or False"),
        ({"name": "../x"}, "name='../x' must be text matching"),
        ({"ends": ("a",)}, r"ends=\('a',\) must be a tuple, each a whole number of at least 1"),
        ({"ends": 3}, "ends=3 must be a tuple"),
        ({"inner.rate": math.nan}, "inner.rate=nan must be a number above 0 and of at most 1"),
        ({"inner.rate": 0.0}, "inner.rate=0.0"),
        ({"inner.rate": 1.5}, "inner.rate=1.5"),
        ({"inner.kinds": ("b",)}, "must be a tuple, each one of a, bb; did you mean 'bb'"),
        ({"inner": 3}, "inner=3 is a section"),
        ({"inner.rat": 1.0}, "unknown setting 'inner.rat'; did you mean 'inner.rate'"),
        ({"count.x": 1}, "unknown setting 'count.x'"),
        ({"iner.rate": 1.0}, "did you mean 'inner.rate'"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(UserError, match=message) as error:
        overlay(Outer(), changes)
    assert "\n" not in str(error.value)


def test_objects_are_frozen_and_equal_by_value():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Outer().count = 2
    one = overlay(Outer(), {"inner.rate": 1, "ends": [1, 2], "count": np.int64(3)})
    assert (one.inner.rate, one.ends, one.count) == (1.0, (1, 2), 3)
    assert [type(v) for v in (one.inner.rate, one.count)] == [float, int]
    assert one == Outer(inner=Inner(rate=1.0), ends=(1, 2), count=3)
    assert hash(one) == hash(Outer(inner=Inner(rate=1.0), ends=(1, 2), count=3))


def test_json_round_trip():
    config = overlay(Outer(), {"count": 4, "inner.kinds": ("a",)})
    assert overlay(Outer(), dataclasses.asdict(config)) == config


def test_fields_that_depend_on_each_other_change_at_once():
    assert overlay(Outer(count=9), {"count": 2, "whole": False}).count == 2


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("count", "3", 3),
        ("count", "1.5", 1.5),
        ("count", "many", "many"),
        ("whole", "false", False),
        ("name", "(1,)", "(1,)"),
        ("ends", "(20,)", (20,)),
        ("ends", "20, 40", (20, 40)),
        ("ends", "20", (20,)),
        ("inner.kinds", "('a','bb')", ("a", "bb")),
        ("inner.kinds", "a,bb", ("a", "bb")),
        ("inner.kinds", "()", ()),
        ("inner.rate", "1e-1", 0.1),
        ("inner", "3", "3"),
        ("none.such", "3", "3"),
    ],
)
def test_values_of_the_command_line(key, text, value):
    assert read(Outer(), key, text) == value


def test_every_setting_is_described_and_listed():
    lines = list(describe(Outer()))
    assert "inner.rate=0.5 [1/s]: a rate; a number above 0 and of at most 1" in lines
    assert [line.partition("=")[0] for line in lines] == list(leaves(Outer()))
    assert leaves(Outer())["inner.rate"] == 0.5
