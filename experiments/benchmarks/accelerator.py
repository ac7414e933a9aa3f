"""What an accelerator makes of this code, in one go of at most twelve minutes. **It has never been run on one.**

In this order: the step of a dense and of a gated sparse model of 0.3B parameters, with its MFU; populations of
`configs/atlas_mini.py`; suite `attention`, row by row longer, against cuDNN on GPUs and splash attention on TPUs; and
that study, for as long as is left. What has been measured of a part is in DIR/PART.json at once. What fails says so in
its row and stops no other, and so does what there is no time for.
"""

import _thread
import functools
import json
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from atlas.data import DataConfig
from atlas.training import RunConfig, TrainConfig, estimate, run_sweep, status
from atlas.training.config import FLOPS_PER_PARAMETER_TOKEN
from atlas.training.meter import Meter
from checked import UserError
from checked.files import write_atomically
from configs import atlas_mini
from experiments.benchmarks import attention
from models import ModelConfig, count_params, shape

Rows = list[dict[str, Any]]

_MINUTES = 11.0  # after which nothing begins
_STUDY_MINUTES = 3.0  # of them that the study has to itself
_LONGER = 3.0  # how much longer the next figure of a part may take than the last
_POPULATIONS = (16, 64, 256)
_LENGTHS = tuple(2**i for i in range(12, 18))
_KINDS: dict[str, dict[str, Any]] = {  # with blocks that the kernels for TPUs take
    "dense": {},
    "gated_sparse": {"selection": "block", "block": 128, "k_base": 256, "k_min": 128, "k_max": 512},
}


def run(workdir: str) -> tuple[Rows, dict[str, Any]]:
    """Rows by part, with what it says of each figure, or with a note. Raises UserError without a workdir."""
    if not workdir:
        raise UserError("--workdir is missing; suite accelerator leaves there what it has measured")
    directory, end = pathlib.Path(workdir), time.monotonic() + 60 * _MINUTES
    found: dict[str, Rows] = {}
    lasted: dict[str, float] = {}
    for part, labels, measure in _figures(directory / "study", end):
        begin = time.monotonic()
        kept = 0.0 if part == "study" else 60 * _STUDY_MINUTES
        if begin + _LONGER * lasted.get(part, 0.0) > end - kept:
            rows = [{"note": "not measured: no time was left"}]
        else:
            rows = _tried(measure)
        lasted[part] = time.monotonic() - begin
        found.setdefault(part, []).extend({"part": part} | labels | row for row in rows)
        document = {"device": jax.devices()[0].device_kind, "devices": jax.device_count(), "rows": found[part]}
        write_atomically(directory / f"{part}.json", json.dumps(document, indent=1))
    return [row for rows in found.values() for row in rows], {"devices": jax.device_count()}


def _figures(study: pathlib.Path, end: float) -> Iterator[tuple[str, dict[str, Any], Callable[[], Rows]]]:
    """Part, labels, and what measures its rows."""
    for kind in _KINDS:
        yield "model", {"attention": kind}, functools.partial(_step, _model(kind), 1)
    for runs in _POPULATIONS:
        yield "population", {"runs": runs}, functools.partial(_step, atlas_mini.get_config(), runs)
    for T in _LENGTHS:
        yield "attention", {"length": T}, functools.partial(_attention, T)
    yield "study", {}, functools.partial(_study, study, end)


def _tried(measure: Callable[[], Rows]) -> Rows:
    try:
        return measure()
    except Exception as error:  # whatever a chip that nobody has tried may say, the other figures are wanted
        return [{"note": f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"}]


def _model(kind: str) -> RunConfig:
    """289M parameters, 320M with gates and an indexer, on 16 windows of 2,048 tokens."""
    model = ModelConfig(**shape(14), **_KINDS[kind], attention=kind, dtype="bfloat16", remat="full", loss_chunk=4096)
    data = DataConfig(source="synthetic", languages=("a1",), tokenizer="bpe", window=2048)
    return RunConfig(name=f"benchmark-{kind}", data=data, model=model, train=TrainConfig(batch_size=16))


def _step(config: RunConfig, population: int) -> Rows:
    """Times, memory, tokens a second and MFU, of 6·N·D without what remat computes twice."""
    measured = estimate.measure(config, population)
    tokens = population * config.train.batch_size * config.data.window
    useful = FLOPS_PER_PARAMETER_TOKEN * count_params(config.model)["non_embedding"] * tokens
    return [measured._asdict() | Meter(tokens, useful).speed(measured.step_seconds)]


def _attention(T: int) -> Rows:
    return attention.run([T])[0]


def _study(workdir: pathlib.Path, end: float) -> Rows:
    """How far it comes; the same workdir continues it."""
    study = atlas_mini.get_sweep(atlas_mini.get_config())
    begin = time.monotonic()
    timer = threading.Timer(end - begin, _thread.interrupt_main)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore interrupts
    try:
        timer.start()
        run_sweep(study.plan, workdir, study.population)
    except KeyboardInterrupt:
        pass  # the time is up, and the step is saved
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)
    table, seconds = status(study.plan, workdir), time.monotonic() - begin
    done, steps, planned = int((table.state == "done").sum()), int(table.steps.sum()), int(table.planned_steps.sum())
    return [{"runs": len(table), "done": done, "steps": steps, "planned_steps": planned, "seconds": seconds}]
