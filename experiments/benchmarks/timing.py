"""Times of compiled programs: compiled apart, warmed up, then run in turns so that a busy machine hits all alike."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from tqdm import tqdm

_ROUNDS = 5
_SECONDS_PER_PROGRAM = 20.0
_KIB = 1024


@dataclass(frozen=True)
class Program:
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
    measured = [_compile(program) for program in tqdm(programs, desc="compile", leave=False)]
    runnable = [(execute, row) for execute, row in measured if execute is not None]
    for execute, _ in runnable:
        execute()
    for _ in tqdm(range(_ROUNDS), desc="run", leave=False):
        for execute, row in runnable:
            if sum(row["seconds"]) < _SECONDS_PER_PROGRAM:
                _run(execute, row)
    return [_summary(row) for _, row in measured]


def _compile(program: Program) -> tuple[Callable[[], None] | None, dict[str, Any]]:
    start = time.perf_counter()
    compiled = jax.jit(program.function).lower(*program.arguments).compile()
    memory = compiled.memory_analysis()
    row = program.labels | {
        "seconds": [],
        "cpu_seconds": [],
        "compile_seconds": time.perf_counter() - start,
        "temp_bytes": memory.temp_size_in_bytes,
        "note": "",
    }
    needed = memory.temp_size_in_bytes + memory.output_size_in_bytes
    if needed > _free_bytes():
        return None, row | {"note": f"not run: needs {needed / _KIB**3:.1f} GiB"}
    return lambda: jax.block_until_ready(compiled(*program.arguments)), row


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


def seconds(function: Callable[[], Any]) -> tuple[float, float]:
    """CPU time of a call, with the processes that it started and saw end, and its wall time."""
    cpu, wall = _cpu_seconds(), time.perf_counter()
    function()
    return _cpu_seconds() - cpu, time.perf_counter() - wall


def _cpu_seconds() -> float:
    children = os.times()
    return time.process_time() + children.children_user + children.children_system


def _run(execute: Callable[[], None], row: dict[str, Any]) -> None:
    cpu, wall = seconds(execute)
    row["seconds"].append(wall)
    row["cpu_seconds"].append(cpu)


def _summary(row: dict[str, Any]) -> dict[str, Any]:
    times = {name: statistics.median(row[name]) if row[name] else None for name in ("seconds", "cpu_seconds")}
    return row | times | {"runs": len(row["seconds"])}
