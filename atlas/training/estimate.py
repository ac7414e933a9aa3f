"""What a sweep will take before it runs: runs, N, D, FLOPs, and time and memory from a measured second of training."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from tqdm import tqdm

from atlas.data import DataConfig, languages_of, tokenizers
from atlas.data.config import TRAINED_TOKENIZERS
from atlas.training.config import FLOPS_PER_PARAMETER_TOKEN, RunConfig, shape_of
from atlas.training.mesh import make_mesh
from atlas.training.program import program_of
from atlas.training.step import NO_COOLDOWN
from atlas.training.sweep import populations
from models import count_params

_SECONDS = 1.0  # of training that are measured, after a first step


def sizes(runs: Sequence[RunConfig]) -> pd.DataFrame:
    """N, D and training FLOPs 6·N·D of every run's longest branch: a row a run."""
    rows = []
    for run in runs:
        n = count_params(run.model)["non_embedding"]
        rows.append((n, run.tokens, FLOPS_PER_PARAMETER_TOKEN * n * run.tokens))
    return pd.DataFrame(rows, columns=["N", "D", "flops"])


def estimate(runs: Sequence[RunConfig], population: int) -> pd.DataFrame:
    """A row for every shape of a sweep: runs, N, D (of one run), flops, seconds and gib (of memory on one device).

    Every shape is compiled and trains random tokens for a second, and evaluates a batch; no corpus is needed. `seconds`
    are of all its runs, trunk, branches, evaluations and compilation. The vocabulary of a tokenizer that is still to be
    trained is taken to be as large as was asked for.

    Raises:
      UserError: a batch or a population that does not divide over the devices, text that cannot be reached.
    """
    units: dict[RunConfig, list[list[RunConfig]]] = {}
    for unit in populations(runs, population):
        # Of the text the window alone shapes a program.
        shape = dataclasses.replace(shape_of(unit[0]), data=DataConfig(window=unit[0].data.window))
        units.setdefault(shape, []).append(unit)
    rows = []
    for parts in tqdm(list(units.values()), desc="measure", unit="shape"):
        first, count = parts[0][0], sum(map(len, parts))
        measured, size = measure(first, len(parts[0])), sizes([first]).iloc[0]
        seconds = measured.compile_seconds + count / len(parts[0]) * _seconds(first, measured)
        rows.append((count, int(size.N), int(size.D), count * size.flops, seconds, measured.gib))
    return pd.DataFrame(rows, columns=["runs", "N", "D", "flops", "seconds", "gib"])


def in_words(table: pd.DataFrame) -> str:
    """An estimate as a table and a sentence."""
    shown = table.assign(seconds=table.seconds.map("{:.0f}".format), gib=table.gib.map("{:.2f}".format))
    hours = table.seconds.sum() / 3600
    total = f"{table.runs.sum()} runs, {table.flops.sum():.3g} FLOPs, about {hours:.2g} hours of one process here"
    return f"{shown.to_string(index=False, float_format='{:.3g}'.format)}\n{total}, without preparing the text"


class Measured(NamedTuple):
    """Of a population: seconds to compile its programs, of a step, and of the evaluation of a chunk; GiB of a device
    that a step takes."""

    compile_seconds: float
    step_seconds: float
    evaluation_seconds: float
    gib: float


def measure(run: RunConfig, population: int) -> Measured:
    """A population of runs like this one, which trains random tokens for a second on the devices that are here."""
    vocabulary = run.data.vocab_size
    if run.data.tokenizer not in TRAINED_TOKENIZERS:
        vocabulary = tokenizers.named(run.data.tokenizer).vocab_size
    languages, ids = len(languages_of(run.data)), (vocabulary - 2, vocabulary - 1, vocabulary)
    program = program_of(shape_of(run), ids, languages, population, make_mesh(run.mesh))
    shape = (population, run.train.batch_size, run.data.window + 1)
    tokens = jax.device_put(np.random.default_rng(0).integers(0, 256, shape, np.int32), program.batch_sharding)
    of = jax.device_put(np.zeros(shape[:2], np.int32), program.batch_sharding)
    start = time.perf_counter()
    state = program.init(jnp.arange(population, dtype=jnp.int32))
    step = program.step.lower(state, tokens, of, NO_COOLDOWN).compile()
    memory = step.memory_analysis()
    chunk = jax.device_put(tokens[:1], program.evaluation_sharding)
    evaluate = _timed(lambda: program.evaluate(state.params, state.buffers, chunk, chunk[..., 1:] >= 0))
    compiling = time.perf_counter() - start
    state, _ = step(state, tokens, of, NO_COOLDOWN)
    steps, begin = 0, time.perf_counter()
    while (spent := time.perf_counter() - begin) < _SECONDS:
        state, _ = jax.block_until_ready(step(state, tokens, of, NO_COOLDOWN))
        steps += 1
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return Measured(compiling, spent / steps, evaluate, held / 2**30)


def _seconds(run: RunConfig, measured: Measured) -> float:
    """Of a population's trunk, branches and evaluations."""
    train, trunk = run.train, run.train.branch_step(run.train.steps[-1])
    chunks = -(-train.evaluation_windows // train.batch_size) * len(languages_of(run.data))
    evaluations = len(train.steps) + (trunk // train.evaluate_every if train.evaluate_every else 0)
    return train.planned_steps * measured.step_seconds + evaluations * chunks * measured.evaluation_seconds


def _timed(call: Callable[[], object]) -> float:
    """Seconds of a call, after a first one that compiles it."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start
