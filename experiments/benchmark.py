"""Speed and memory of the parts, each against a peer measured in the same run, and how far fits can be trusted.

    python -m experiments.benchmark --suite=attention [--lengths=2048,4096] [--json=FILE]
    python -m experiments.benchmark --suite=decode [--sizes=1M,5M] [--workdir=DIR] [--json=FILE]
    python -m experiments.benchmark --suite=memory [--json=FILE]
    python -m experiments.benchmark --suite=fit [--table=FILE.csv] [--json=FILE]
    python -m experiments.benchmark --suite=recovery [--studies=20] [--workdir=DIR] [--json=FILE]
    python -m experiments.benchmark --suite=coverage [--studies=500] [--workdir=DIR] [--json=FILE]
    python -m experiments.benchmark --suite=prior [--table=FILE.csv] [--json=FILE]

Prints a table; --json=FILE writes the same for programs, with hardware, versions and the command. The times are
medians; runs of the programs compared are interleaved. Expect minutes, most of them spent in the peer.

Suites recovery and coverage fit simulated studies, whose law is known: whether parameters are found as well as the
data allow, and whether 90 % intervals hold the truth nine times in ten. With --workdir they keep every study's
outcome, and the same command continues after an interruption. Suite prior tells what the joint fit owes to the numbers
of its prior.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import pandas as pd
from absl import flags

from atlas.errors import UserError, unknown
from atlas.files import write_atomically
from experiments import _app
from experiments.benchmarks import attention, coverage, decode, fit, memory, pair, prior, recovery

Result = tuple[list[dict[str, Any]], dict[str, Any]]

_SUITES: dict[str, Callable[[], Result]] = {
    "attention": lambda: attention.run(_lengths()),
    "coverage": lambda: coverage.run(_STUDIES.value, _WORKDIR.value),
    "decode": lambda: decode.run(_SIZES.value, _WORKDIR.value),
    "fit": lambda: fit.run(_TABLE.value),
    "memory": lambda: memory.run(_lengths()),
    "prior": lambda: prior.run(_TABLE.value),
    "recovery": lambda: recovery.run(_STUDIES.value, _WORKDIR.value),
}
_UNITS = (
    ("seconds", "ms", 1e3),
    ("cpu_seconds", "cpu_ms", 1e3),
    ("first_seconds", "first_ms", 1e3),
    ("temp_bytes", "temp_MiB", 2**-20),
)
_PACKAGES = ("jax", "jaxlib", "flax", "numpy")

_SUITE = flags.DEFINE_string("suite", "", f"what to measure: {', '.join(_SUITES)}")
_LENGTHS = flags.DEFINE_list("lengths", [], "attention, memory: sequence lengths in tokens; default: by the device")
_SIZES = flags.DEFINE_list("sizes", ["1M", "5M", "30M"], f"decode: of the target; {', '.join(pair.SHAPES)}")
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "decode: keeps the trained pair for the next time; recovery, coverage: every study's outcome"
)
_STUDIES = flags.DEFINE_integer(
    "studies", None, f"recovery, coverage: of each kind; default: {recovery.STUDIES}, {coverage.STUDIES}", lower_bound=1
)
_TABLE = flags.DEFINE_string("table", "", "fit, prior: runs table; default: a simulated one")
_JSON = flags.DEFINE_string("json", "", "file for the result as JSON")


def main(argv: Sequence[str]) -> None:
    """Runs the suite that --suite names."""
    _app.require(suite=_SUITE.value)
    if _SUITE.value not in _SUITES:
        raise unknown("suite", _SUITE.value, _SUITES)
    rows, facts = _SUITES[_SUITE.value]()
    facts = _environment() | facts
    for name, value in facts.items():
        print(f"{name}: {value}")
    print(_table(rows))
    if _JSON.value:
        document = {"suite": _SUITE.value, "command": ["experiments.benchmark", *sys.argv[1:]], **facts, "rows": rows}
        write_atomically(pathlib.Path(_JSON.value), json.dumps(document, indent=1))


def _lengths() -> list[int]:
    try:
        return [int(text) for text in _LENGTHS.value]
    except ValueError:
        raise UserError(f"--lengths={','.join(_LENGTHS.value)} is no list of integers; for example 2048,4096") from None


def _environment() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": f"{device.platform}: {device.device_kind}",
        "machine": f"{platform.machine()}, {_cores()} cores",
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _table(rows: list[dict[str, Any]]) -> str:
    """The rows in milliseconds and MiB; what was not measured is left blank."""
    table = pd.DataFrame(rows)
    for column, unit, scale in _UNITS:
        if column in table:
            table[column] = table[column].astype(float) * scale
            table = table.rename(columns={column: unit})
    return table.to_string(index=False, na_rep="", float_format=lambda x: f"{x:.4g}")


if __name__ == "__main__":
    _app.run(main)
