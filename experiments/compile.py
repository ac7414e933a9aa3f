"""Compiles a config for chips that are not here: memory, FLOPs, traffic, what bounds a step, and whether it fits.

    python -m experiments.compile --config=configs/atlas_paper.py --topology=v5p:4x4x4 --config.mesh.fsdp=64 \
        --config.mesh.data=1 --config.model.dtype=bfloat16 --config.model.remat=full --json=FILE
    python -m experiments.compile --config=configs/atlas_mini.py --topology=h100:8 --sweep

Needs the extra: pip install 'atlas-scaling[compile]'. Topologies are v5e, v5p and v6e with a shape, h100 and h200 with
a number, and 2*v5p:4x4x4 for two slices. Times are bounds by arithmetic, memory and links, never measured. Exit code 2
where the step does not fit. The paper's sizes: experiments/results/chips/.
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from atlas.training.ahead import PROGRAMS, SPARE, report, shapes
from atlas.training.chips import GIB
from checked.files import write_atomically
from experiments import _app

_SMALL = GIB // 10  # bytes below which a size is told in MiB

_CONFIG = _app.define_config()
_TOPOLOGY = flags.DEFINE_string("topology", "", "chips to compile for, as v5p:4x4x4, h100:8 or 2*v5p:4x4x4")
_PROGRAMS = flags.DEFINE_multi_enum("programs", list(PROGRAMS), PROGRAMS, "what to compile beside the step")
_POPULATION = flags.DEFINE_integer("population", 1, "runs of one shape that train as one step", lower_bound=1)
_SWEEP = flags.DEFINE_bool("sweep", False, "compile every distinct shape of the file's sweep")
_SUGGEST = flags.DEFINE_bool("suggest", True, "where a step does not fit, try what needs less memory")
_JSON = flags.DEFINE_string("json", "", "file for the result as JSON")


def main(_: Sequence[str]) -> None:
    """Compiles and prints."""
    _app.require(config=_CONFIG.base, topology=_TOPOLOGY.value)
    runs = shapes(_CONFIG.study().plan) if _SWEEP.value else [_CONFIG.base]
    programs = ("step", *_PROGRAMS.value)
    found = []
    for run in runs:
        found.append({"run": run.name} | report(run, _TOPOLOGY.value, _POPULATION.value, programs, _SUGGEST.value))
        print(text(found[-1]), flush=True)
        if _JSON.value:
            document = {"command": _app.command(), "jax": jax.__version__, "runs": found}
            write_atomically(pathlib.Path(_JSON.value), json.dumps(document, indent=1))
    if not all(one["fits"] for one in found):
        sys.exit(_app.EXIT_USER_ERROR)


def text(found: dict[str, Any]) -> str:
    """A report in words."""
    mesh = " × ".join(f"{axis}={size}" for axis, size in found["mesh"].items()) or "one device"
    lines = [
        f"{found['run']}: {_count(found['parameters']['total'])} parameters, {found['attention']} attention, "
        f"{found['tokens_per_step']:,} tokens a step on {found['topology']} ({mesh})",
        f"  a chip holds {_gib(found['held']['params'])} of parameters and {_gib(found['held']['optimizer'])} of "
        f"optimiser state; it has {_gib(found['memory'])}",
    ]
    for name, program in found["programs"].items():
        parts = ", ".join(f"{_gib(program[part])} {part}" for part in ("arguments", "temporaries") if part in program)
        lines.append(
            f"  {name}: {_gib(program['peak'])} at its peak ({parts or 'out of memory'}), "
            f"{program['flops']:.3g} FLOPs, compiled in {program['compile_seconds']:.0f} s"
        )
    step = found["programs"]["step"]
    lines += [f"    {_gib(row['bytes'])}  {row['shape']}  {row['code']}" for row in step.get("largest", ())]
    for kind, row in step.get("collectives", {}).items():
        lines.append(f"    {kind}: {row['count']:.0f} a step, {_gib(row['bytes'])} received")
    if roofline := found.get("roofline"):
        bounds = ", ".join(f"{name} {seconds * 1e3:.4g} ms" for name, seconds in roofline["seconds"].items())
        share = roofline["useful_flops"] / step["flops"]
        lines += [
            f"  at least: {bounds}; bound by {roofline['bound']}",
            f"  at most: {roofline['tokens_per_second']:,.0f} tokens/s, {roofline['mfu']:.1%} MFU",
            f"  6·N·D is {roofline['useful_flops']:.3g} FLOPs, {share:.0%} of the step's",
        ]
    return "\n".join([*lines, f"  {verdict(found)}"])


def verdict(found: dict[str, Any]) -> str:
    """Whether the step fits, and what would help if not."""
    peak, memory = found["programs"]["step"]["peak"], found["memory"]
    if found["fits"]:
        return f"fits, with {1 - peak / memory:.0%} to spare"
    why = f"does not fit: {_gib(peak)} of {_gib(memory)}, of which {SPARE:.0%} should be spare"
    change = dict(found.get("change") or {})
    if not change:
        return f"{why}; more chips, or a smaller batch"
    peak = change.pop("peak")
    return f"{why}; fits in {_gib(peak)} with " + " ".join(f"--config.{key}={value}" for key, value in change.items())


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= _SMALL else f"{size / 2**20:.3g} MiB"


def _count(parameters: int) -> str:
    """Such as 8.45B or 160M."""
    return f"{parameters / 1e9:.3g}B" if parameters >= 1e9 else f"{parameters / 1e6:.3g}M"


if __name__ == "__main__":
    _app.run(main)
