"""Padding to a few lengths, so that tables of similar size share one compiled fit."""

import numpy as np


def bucket(size: int, least: int = 256) -> int:
    """The next power of two, at least `least`; above 4·least the next of eight steps between powers.

    Compiling costs far more than padding a small table, and padding far more than compiling where a table is large.

    >>> [bucket(n) for n in (1, 256, 300, 1025, 3100)]
    [256, 256, 512, 1152, 3328]
    """
    power = 1 << (int(size) - 1).bit_length()
    step = power // 16 if size > 4 * least else max(power, least)
    return -(-int(size) // step) * step


def padded(values: np.ndarray, size: int, fill: float) -> np.ndarray:
    """`values` [n, …] followed by rows of `fill` up to [size, …]."""
    return np.concatenate([values, np.full((size - len(values), *values.shape[1:]), fill, values.dtype)])
