import importlib.util

import pytest

from atlas.training import chips
from checked import UserError
from tests.compilers import needs


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5p", "is not chip:count; give v5p:4x4x4"),
        ("v5q:2x2x1", "unknown chip 'v5q'; did you mean 'v5"),
        ("0x:4", "unknown chip"),
    ],
)
def test_topologies_that_mean_nothing(name, message):
    with pytest.raises(UserError, match=message):
        chips.topology(name)


@needs("libtpu")
def test_a_single_chip():
    chip, devices = chips.topology("v5e:1x1")
    assert len(devices) == 1 and chips.chip_of(devices[0].device_kind) is chip


@needs("libtpu")
def test_a_shape_that_no_slice_has_is_one_line():
    with pytest.raises(UserError, match=r"^topology 'v5p:3x5x7': [^\n]+$"):
        chips.topology("v5p:3x5x7")


@pytest.mark.parametrize("name", ["v5p:2x2x1", "h100:8"])
def test_missing_extra_is_named(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"needs the extra compile: pip install"):
        chips.topology.__wrapped__(name)


def test_names_that_jax_gives():
    kinds = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v5p": "v5p", "NVIDIA H100 80GB HBM3": "h100"}
    assert {kind: chips.chip_of(kind) for kind in kinds} == {kind: chips.CHIPS[name] for kind, name in kinds.items()}
