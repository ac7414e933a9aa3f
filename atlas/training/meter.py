"""What people watch while a run trains: its speed, and how much of the chips it uses."""

import time

import jax

from atlas.training.chips import GIB, chip_of


class Meter:
    """Speed of steps that all devices take together.

    tokens: of a step, over all runs and devices. flops: useful ones of a step, 6·N·D.
    """

    def __init__(self, tokens: int, flops: float):
        self._tokens, self._flops, self._last, self.is_new = tokens, flops, 0.0, True
        self._chip = chip_of(jax.devices()[0].device_kind)

    def begin(self) -> None:
        """Steps follow whose first one may compile: it is not timed."""
        self._last = 0.0

    def tick(self) -> dict[str, float]:
        """Of the step that has just ended: step_seconds, tokens_per_second, tokens_per_second_per_chip; mfu where the
        chip is known; memory_bytes, the most that a device has held so far, where devices tell. Nothing of a first."""
        last, self._last, self.is_new = self._last, time.perf_counter(), False
        if not last:
            return {}
        held = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
        return self.speed(self._last - last) | ({"memory_bytes": max(held)} if any(held) else {})

    def speed(self, seconds: float) -> dict[str, float]:
        """Of a step that takes so long."""
        chips = jax.device_count()
        speed = {"step_seconds": seconds, "tokens_per_second": self._tokens / seconds}
        speed["tokens_per_second_per_chip"] = speed["tokens_per_second"] / chips
        if self._chip:
            speed["mfu"] = self._flops / (seconds * chips * self._chip.flops)
        return speed


def in_words(loss: float, speed: dict[str, float]) -> str:
    """For a progress bar, which shows tokens a second itself.

    >>> in_words(2.5, {"step_seconds": 0.25, "mfu": 0.4, "memory_bytes": 2**30})
    'loss 2.500 nats, 250 ms a step, 40.0 % MFU, 1.0 GiB'
    """
    words = [f"loss {loss:.3f} nats"]
    if "step_seconds" in speed:
        words.append(f"{1e3 * speed['step_seconds']:.3g} ms a step")
    if "mfu" in speed:
        words.append(f"{1e2 * speed['mfu']:.1f} % MFU")
    if "memory_bytes" in speed:
        words.append(f"{speed['memory_bytes'] / GIB:.1f} GiB")
    return ", ".join(words)
