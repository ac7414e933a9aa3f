"""Populations that train side by side: worker processes, each with its share of a CPU's cores.

The step of a small model cannot use a second core: at a width of 32, 1,024 tokens take 12.5 ms on one
and about 12 on two, of which it then keeps both busy.
"""

import contextlib
import dataclasses
import functools
import io
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import jax
from tqdm import tqdm

from atlas.data import Corpus, DataConfig
from atlas.training.config import RunConfig, run_id, shape_of
from atlas.training.loop import Progress, train
from checked import UserError
from checked.processes import compile_fully, follow_parent, only_cpus
from models import count_params
from models.attention.kinds import added

Unit = list[RunConfig]
Corpora = Callable[[DataConfig], Corpus]

_REPAYS = 4  # populations: a process takes as long to start as some of them to train
_PROCESS = 1 << 30  # bytes of a process without a model
_PARAMETER = 64  # bytes a parameter: itself, gradient, moments and copies take 24 or more, the rest is for activations
_INHERITED = (  # settings of JAX that a process takes over
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_numpy_rank_promotion",
)


def usual(units: Sequence[Unit]) -> int:
    """Worker processes for so many populations: one a core where there are CPUs alone, if that repays their start and
    memory holds them.

    1 where several hosts train together, or a kind of attention is known to this process alone.
    """
    alone = only_cpus() and hasattr(os, "sched_setaffinity") and not jax.distributed.is_initialized()
    if not alone or any(added(unit[0].model.attention) for unit in units):
        return 1
    largest = max(len(unit) * count_params(unit[0].model)["total"] for unit in units)
    holds = _available() // (_PROCESS + _PARAMETER * largest)
    return max(1, min(len(os.sched_getaffinity(0)), len(units) // _REPAYS, holds))


def _available() -> int:
    """Bytes of memory that Linux can give."""
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 0


def train_side_by_side(
    todo: Iterable[Unit], corpora: Corpora, workdir: pathlib.Path, processes: int,
    progress: Progress, finished: Callable[[Unit], None],
) -> None:  # fmt: skip
    """Trains populations in worker processes; a run that continues another waits for it.

    corpora(config): the corpus of runs, called in a worker. progress: as of `train`. finished(population): called after
    each.

    Raises what a worker raises, and KeyboardInterrupt, once the others have saved their states; UserError where one
    dies.
    """
    if not only_cpus():
        raise UserError(f"--processes={processes}: they share a CPU's cores; set JAX_PLATFORMS=cpu, or leave it out")
    crew = _Crew(corpora, workdir, processes)
    waiting, done = list(todo), []
    try:
        while waiting or crew.busy:
            crew.hand_out(waiting)
            for worker in crew.heard():
                kind, *said = worker.receive()
                if kind == "tokens":
                    progress(*said)
                elif kind == "line":
                    tqdm.write(said[0], file=sys.stderr)
                elif kind == "failed":
                    raise said[0]
                else:
                    done.append(worker.unit)
                    finished(worker.end())
    finally:
        crew.dismiss()


@dataclasses.dataclass
class _Worker:
    """A process, what it trains, and the shape that it has compiled last."""

    process: Any
    connection: Connection
    unit: Unit | None = None
    shape: Any = None

    def begin(self, unit: Unit) -> None:
        """Hands over a population."""
        self.unit, self.shape = unit, _shape(unit)
        self.connection.send(unit)

    def end(self) -> Unit:
        """What it has trained."""
        assert self.unit is not None
        unit, self.unit = self.unit, None
        return unit

    def receive(self) -> tuple:
        """What it says; UserError where it is gone."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            names = ", ".join(run.name for run in self.unit or ())
            raise UserError(
                f"the process that trained {names} died, perhaps for memory; the same command with fewer --processes "
                "goes on"
            ) from None


class _Crew:
    """The workers."""

    def __init__(self, corpora: Corpora, workdir: pathlib.Path, count: int):
        # Not by fork: a process that has started JAX must not be copied.
        spawn = multiprocessing.get_context("spawn")
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        settings = {name: getattr(jax.config, name) for name in _INHERITED}
        self._workers = []
        for number in range(count):
            ours, theirs = spawn.Pipe()
            arguments = theirs, corpora, workdir, settings, cores[number % max(len(cores), 1) :: count]
            process = spawn.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that the end of the process is the end of the pipe
            self._workers.append(_Worker(process, ours))

    @property
    def busy(self) -> list[_Worker]:
        """Who trains."""
        return [worker for worker in self._workers if worker.unit]

    def heard(self) -> list[_Worker]:
        """Who has something to say, waiting for the first."""
        by_connection = {worker.connection: worker for worker in self.busy}
        return [by_connection[ready] for ready in wait(list(by_connection))]  # type: ignore[index]

    def hand_out(self, waiting: list[Unit]) -> None:
        """Gives every idle worker a population that it can train, of the shape it has compiled or of one that nobody
        trains."""
        for worker in self._workers:
            open_runs = {run_id(run) for unit in [*waiting, *(w.unit for w in self.busy)] for run in unit}
            ready = [unit for unit in waiting if open_runs.isdisjoint(run.initialize for run in unit)]
            if worker.unit or not ready:
                continue
            others = [w.shape for w in self.busy]
            unit = min(ready, key=lambda unit: (_shape(unit) != worker.shape, _shape(unit) in others))
            waiting.remove(unit)
            worker.begin(unit)

    def dismiss(self) -> None:
        """Lets those that train save their states, and ends all."""
        try:
            for worker in self._workers:
                with contextlib.suppress(OSError):
                    worker.connection.send(None)
            for worker in self._workers:
                with contextlib.suppress(EOFError, OSError):
                    while True:
                        worker.connection.recv()
        finally:
            for worker in self._workers:
                worker.process.kill()


def _shape(unit: Unit) -> tuple:
    """What decides a population's programs."""
    return shape_of(unit[0]), len(unit)


def _work(connection: Connection, corpora: Corpora, workdir: pathlib.Path, settings: dict, cores: list[int]) -> None:
    """A worker process: trains what it is given until there is no more."""
    follow_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers send it to all processes; the parent asks to stop
    compile_fully()
    if cores:
        os.sched_setaffinity(0, cores)  # before JAX starts its threads, which are as many
    for name, value in settings.items():
        jax.config.update(name, value)
    sending, corpora = threading.Lock(), functools.cache(corpora)

    def send(*message: object) -> None:
        with sending:
            connection.send(message)

    with contextlib.redirect_stderr(_Lines(send)):
        while unit := connection.recv():
            try:
                train(
                    unit, corpora(unit[0].data), workdir, lambda *said: send("tokens", *said),
                    stop=lambda step: connection.poll(),
                )  # fmt: skip
                send("done")
            except KeyboardInterrupt:
                return
            except Exception as error:
                if not isinstance(error, UserError):
                    error.add_note(traceback.format_exc())
                send("failed", error)
                return


class _Lines(io.TextIOBase):
    """Sends what is written, line by line."""

    def __init__(self, send: Callable[..., None]):
        self._send, self._rest = send, ""

    def write(self, text: str) -> int:
        """Keeps what is no whole line yet."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._send("line", line)
        return len(text)
