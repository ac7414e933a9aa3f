"""What makes a training step quick on one CPU: parts of a batch that its caches hold, and memory that is kept."""

import ctypes
import sys

# Tokens of a part, for which activations of a layer stay in caches: measured at widths of 32 to 128; half as many are
# slower, since matrices are read for fewer rows.
_TOKENS = 512
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
_KEPT, _HEAP = 1 << 30, 1 << 26  # bytes: what may stay, and a whole heap of a thread's, which would else be given back


def cached_parts(rows: int, window: int) -> int:
    """The most equal parts of a batch that have 512 tokens or more each.

    >>> cached_parts(16, 128), cached_parts(16, 64), cached_parts(6, 512), cached_parts(3, 64)
    (4, 2, 6, 1)
    """
    return max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or rows // n * window >= _TOKENS))


def keep_memory() -> None:
    """Keeps up to 1 GiB of freed memory in the process, where the C library is glibc.

    A step's temporary memory is one block; glibc gives blocks of 32 MiB and more back to the system when they are
    freed, and every step then waits for its pages anew: a third of its time was seen to go there.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _KEPT)
        mallopt(_TOP_PAD, _HEAP)
