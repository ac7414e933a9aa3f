"""Simulated studies measured one after another, and kept as they come."""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

import atlas.scaling
from atlas.files import write_atomically

Outcome = dict[str, Any]


def outcomes(name: str, measure: Callable[[int], Outcome], count: int, workdir: str = "") -> list[Outcome]:
    """`measure(seed)` for the seeds below `count`, under a progress bar.

    Args:
      name: of the study.
      measure: seed -> plain values.
      count: number of seeds.
      workdir: keeps what is measured, so that the same call continues after an interruption; anything measured
        with other sources than today's is measured again. "" keeps nothing.
    """
    path = pathlib.Path(workdir) / _digest() / f"{re.sub('[^A-Za-z0-9.]+', '-', name)}.json"
    found = json.loads(path.read_text())[:count] if workdir and path.exists() else []
    for seed in tqdm(range(len(found), count), desc=name, initial=len(found), total=count, leave=False):
        found.append(measure(seed))
        if workdir:
            write_atomically(path, json.dumps(found))
    return found


def _digest() -> str:
    """Of the sources that decide a measurement."""
    files = [*pathlib.Path(atlas.scaling.__file__).parent.rglob("*.py"), *pathlib.Path(__file__).parent.glob("*.py")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:12]
