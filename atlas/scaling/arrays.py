"""Padding to a few lengths, so that tables of similar size share one compiled fit."""

import numpy as np


def bucket(size: int, least: int = 256) -> int:
    """The next power of two, at least `least`: compiling costs far more than padding a small table.

    >>> [bucket(n) for n in (1, 256, 300)]
    [256, 256, 512]
    """
    return max(1 << (int(size) - 1).bit_length(), least)


def padded(values: np.ndarray, size: int, fill: float) -> np.ndarray:
    """`values` [n, …] followed by rows of `fill` up to [size, …]."""
    return np.concatenate([values, np.full((size - len(values), *values.shape[1:]), fill, values.dtype)])
