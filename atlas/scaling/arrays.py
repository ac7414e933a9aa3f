"""Padding to a few lengths, so that tables of similar size share one compiled fit."""

import numpy as np


def bucket(size: int) -> int:
    """The next length of the form 2^k or 3·2^k, at least 6.

    >>> [bucket(n) for n in (1, 7, 100, 240, 300)]
    [6, 8, 128, 256, 384]
    """
    power = 1 << max(int(size) - 1, 7).bit_length()
    return power * 3 // 4 if size <= power * 3 // 4 else power


def padded(values: np.ndarray, size: int, fill: float) -> np.ndarray:
    """`values` [n, …] followed by rows of `fill` up to [size, …]."""
    return np.concatenate([values, np.full((size - len(values), *values.shape[1:]), fill, values.dtype)])
