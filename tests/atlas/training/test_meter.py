import pytest

from atlas.training import meter
from atlas.training.chips import CHIPS


def test_speed_of_a_step_on_a_known_chip(monkeypatch):
    """Of 1,000 tokens and a tenth of what a chip could do in half a second, on one device; a first step has none."""
    monkeypatch.setattr(meter, "chip_of", lambda kind: CHIPS["v5e"])
    monkeypatch.setattr(meter.jax, "device_count", lambda: 1)
    times = iter((3.0, 3.5, 9.0, 9.5))
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(times))
    watched = meter.Meter(1000, 0.05 * CHIPS["v5e"].flops)
    assert watched.is_new and watched.tick() == {} and not watched.is_new
    speed = watched.tick()
    assert (speed["step_seconds"], speed["tokens_per_second_per_chip"]) == (0.5, 2000.0)
    assert speed["mfu"] == pytest.approx(0.1)
    watched.begin()
    assert watched.tick() == {} and watched.tick()["step_seconds"] == 0.5
