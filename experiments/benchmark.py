"""Speed and memory of the parts, each against a peer measured in the same run, and how far fits can be trusted.

    python -m experiments.benchmark --suite=attention [--lengths=2048 --lengths=4096] [--json=FILE]
    python -m experiments.benchmark --suite=accelerator --workdir=DIR [--json=FILE]
    python -m experiments.benchmark --suite=chips [--lengths=4096] [--json=FILE]
    python -m experiments.benchmark --suite=decode [--workdir=DIR] [--json=FILE]
    python -m experiments.benchmark --suite=memory|fit|serve|train [--json=FILE]
    python -m experiments.benchmark --suite=prior [--table=FILE.csv] [--json=FILE]
    python -m experiments.benchmark --suite=regmix --table=DIR [--workdir=DIR] [--json=FILE]
    python -m experiments.benchmark --suite=scalebench --table=DIR [--json=FILE]
    python -m experiments.benchmark --suite=recovery|coverage [--workdir=DIR] [--json=FILE]

Prints a table; --json=FILE writes the same for programs, with hardware, versions and the command. The times are
medians; runs of the programs compared are interleaved. Expect minutes, most of them spent in the peer.

Suite accelerator measures training, populations, attention and a study on a TPU or GPU within twelve minutes; nobody
has run it on one yet. Suite chips compiles attention for TPUs that are not attached, with the extra `compile`, and
tells what bounds it.

Suites recovery and coverage fit simulated studies, whose law is known: whether parameters are found as well as the
data allow, and whether 90 % intervals hold the truth nine times in ten. With --workdir they keep every study's
outcome, and the same command continues after an interruption. Suite prior tells what the joint fit owes to the numbers
of its prior. Suites scalebench and regmix fit public tables, which are not in this repository, and predict their test
splits and unseen mixtures.
"""

import importlib.metadata
import json
import pathlib
import platform
import time
from typing import Any

import jax
import pandas as pd
from absl import flags

from checked.files import write_atomically
from checked.processes import compile_lean
from experiments import _app
from experiments.benchmarks import (
    accelerator,
    attention,
    chips,
    coverage,
    decode,
    fit,
    prior,
    recovery,
    regmix,
    scalebench,
    serve,
    train,
)
from experiments.benchmarks.timing import cores

_SUITES = {
    "accelerator": lambda: accelerator.run(_WORKDIR.value),
    "attention": lambda: attention.run(_LENGTHS.value),
    "chips": lambda: chips.run(_LENGTHS.value),
    "coverage": lambda: coverage.run(_WORKDIR.value),
    "decode": lambda: decode.run(_WORKDIR.value),
    "fit": fit.run,
    "memory": lambda: attention.memory(_LENGTHS.value),
    "prior": lambda: prior.run(_TABLE.value),
    "regmix": lambda: regmix.run(_TABLE.value, _WORKDIR.value),
    "scalebench": lambda: scalebench.run(_TABLE.value, _WORKDIR.value),
    "recovery": lambda: recovery.run(_WORKDIR.value),
    "serve": serve.run,
    "train": train.run,
}
_PACKAGES = ("jax", "jaxlib", "flax", "numpy")

_OF_FITS = ("coverage", "fit", "prior", "recovery", "regmix", "scalebench")
_SUITE = flags.DEFINE_enum("suite", None, list(_SUITES), "what to measure")
_LENGTHS = flags.DEFINE_multi_integer(
    "lengths",
    [],
    "attention, chips, memory: a sequence length in tokens; default: several, by the device",
    lower_bound=128,
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    "",
    "accelerator: figures and the study; decode: keeps the trained pair for the next time; recovery, coverage: every "
    "study's outcome; scalebench, regmix: figures",
)
_TABLE = flags.DEFINE_string(
    "table", "", "prior: runs table, default a simulated one; scalebench, regmix: folder of their tables"
)
_JSON = flags.DEFINE_string("json", "", "file for the result as JSON")


def main(_) -> None:
    """Runs the suite that --suite names."""
    _app.require(suite=_SUITE.value)
    if _SUITE.value in _OF_FITS:
        compile_lean()  # as experiments.fit does
    _app.check_outputs(_WORKDIR.value, _JSON.value)
    rows, facts = _SUITES[_SUITE.value]()
    facts = _environment() | facts
    for name, value in facts.items():
        print(f"{name}: {value}")
    print(pd.DataFrame(rows).to_string(index=False, na_rep="", float_format=lambda x: f"{x:.4g}"))
    if _JSON.value:
        document = {"suite": _SUITE.value, "command": _app.command(), **facts, "rows": rows}
        write_atomically(pathlib.Path(_JSON.value), json.dumps(document, indent=1))


def _environment() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "device": f"{device.platform}: {device.device_kind}",
        "machine": f"{platform.machine()}, {cores()} cores",
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


if __name__ == "__main__":
    _app.run(main)
