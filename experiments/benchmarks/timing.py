"""Times of compiled programs: compiled apart, warmed up, then run in turns so that a busy machine hits all alike."""

import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

_ROUNDS = 5
_SECONDS_PER_PROGRAM = 20.0
_KIB = 1024


class Program(NamedTuple):
    """A function to measure, on these arguments; `labels` are the columns that tell it from the others."""

    labels: dict[str, Any]
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def measure(programs: list[Program]) -> list[dict[str, Any]]:
    """One row a program: its labels and

      seconds, cpu_seconds   wall time and the process's CPU time of a run, median of `runs`
      compile_seconds        of tracing and compiling
      temp_bytes             temporary memory, as the compiler plans it
      note                   why a program was not run: it needs more memory than there is; its times are None

    A run ends when its results are ready. A program that has used up its time sits out the remaining rounds.
    """
    compiled = [(*compile_program(program), []) for program in tqdm(programs, desc="compile", leave=False)]
    runnable = [(execute, times) for execute, row, times in compiled if not row["note"]]
    for execute, _ in runnable:
        execute()
    for _ in tqdm(range(_ROUNDS), desc="run", leave=False):
        for execute, times in runnable:
            if sum(wall for _, wall in times) < _SECONDS_PER_PROGRAM:
                times.append(seconds(execute))
    rows = []
    for _, row, times in compiled:
        cpu, wall = np.median(times, 0).tolist() if times else (None, None)
        rows.append(row | {"seconds": wall, "cpu_seconds": cpu, "runs": len(times)})
    return rows


def compile_program(program: Program) -> tuple[Callable[[], Any], dict[str, Any]]:
    """What runs a program and waits for its results, and its labels, compile_seconds, temp_bytes and note."""
    start = time.perf_counter()
    compiled = jax.jit(program.function).lower(*program.arguments).compile()
    compile_seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
    needed = memory.temp_size_in_bytes + memory.output_size_in_bytes
    note = f"not run: needs {needed / _KIB**3:.1f} GiB" if needed > _free_bytes() else ""
    row = {"compile_seconds": compile_seconds, "temp_bytes": memory.temp_size_in_bytes, "note": note}
    return lambda: jax.block_until_ready(compiled(*program.arguments)), program.labels | row


def _free_bytes() -> float:
    """Memory that a program may take, on the device that runs it."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        memory = device.memory_stats() or {}
        return memory.get("bytes_limit", float("inf")) - memory.get("bytes_in_use", 0)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":") for line in file)
    except OSError:
        return float("inf")
    return int(fields["MemAvailable"].split()[0]) * _KIB


def seconds(function: Callable[[], Any], rounds: int = 1) -> tuple[float, float]:
    """CPU time of a call, with the processes that it started and saw end, and wall time; medians over the rounds."""
    times = []
    for _ in range(rounds):
        cpu, wall = _cpu_seconds(), time.perf_counter()
        function()
        times.append((_cpu_seconds() - cpu, time.perf_counter() - wall))
    return tuple(np.median(times, 0).tolist())


def _cpu_seconds() -> float:
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
