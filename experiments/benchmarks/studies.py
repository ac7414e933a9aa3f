"""Simulated studies measured one after another and kept as they come, and whether they reach their bars."""

import hashlib
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

import atlas.scaling
from checked.files import write_atomically

Outcome = dict[str, Any]


def outcomes(name: str, measure: Callable[[int], Outcome], count: int, workdir: str) -> list[Outcome]:
    """`measure(seed)`, which are plain values, for the seeds below `count`.

    `workdir` keeps what is measured, so that the same call continues after an interruption; anything measured with
    other sources than today's is measured again. "" keeps nothing.
    """
    path = pathlib.Path(workdir) / _digest() / f"{re.sub('[^A-Za-z0-9.]+', '-', name)}.json"
    found = json.loads(path.read_text())[:count] if workdir and path.exists() else []
    for seed in tqdm(range(len(found), count), desc=name, initial=len(found), total=count, leave=False):
        found.append(measure(seed))
        if workdir:
            write_atomically(path, json.dumps(found))
    return found


def judged(
    line: str, study: str, statistic: str, measured: float, studies: int, low: float = -np.inf, high: float = np.inf
) -> dict[str, Any]:
    """The row of a statistic, over so many studies, that is to lie from `low` to `high`, bounds included.

    >>> judged("tau", "S80", "median", 0.03, 20, high=0.02)["reached"]
    'no'
    """
    sides = [f"{sign} {bound:g}" for sign, bound in ((">=", low), ("<=", high)) if np.isfinite(bound)]
    return {
        "line": line,
        "study": study,
        "statistic": statistic,
        "bar": ", ".join(sides),
        "measured": measured,
        "studies": studies,
        "reached": "yes" if low <= measured <= high else "no",
    }


def _digest() -> str:
    """Of the sources that decide a measurement."""
    files = [*pathlib.Path(atlas.scaling.__file__).parent.rglob("*.py"), *pathlib.Path(__file__).parent.glob("*.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:12]
