"""Executes a list of runs: grouped into populations, parted into shards, never repeating what is done."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import pandas as pd
from tqdm import tqdm

from atlas.data import Corpus, prepare
from atlas.errors import UserError
from atlas.files import write_atomically
from atlas.training.config import RunConfig, digest_of, run_id, shape_key
from atlas.training.loop import DONE, EVALUATIONS, METRICS, train
from atlas.training.mesh import first_process_first
from atlas.training.metrics import JsonLines

PLAN = "sweep.json"


def populations(configs: Sequence[RunConfig], size: int) -> list[list[RunConfig]]:
    """Parts a sweep into populations: up to `size` runs of one shape each, in the order of the sweep.

    A run that continues from another never shares a population with runs that do not, and comes after them.
    """
    by_shape: dict[tuple[bool, str], list[RunConfig]] = {}
    for config in sorted(configs, key=lambda config: bool(config.initialize)):
        by_shape.setdefault((bool(config.initialize), shape_key(config)), []).append(config)
    return [runs[i : i + size] for runs in by_shape.values() for i in range(0, len(runs), size)]


def shard_of(units: Sequence[list[RunConfig]], shard: str) -> list[list[RunConfig]]:
    """The units of shard "i/n" (0 ≤ i < n); "" asks the scheduler's environment, and is everything where there is none.

    >>> shard_of([["a"], ["b"], ["c"]], "1/2")
    [['b']]
    """
    shard = shard or _shard_of_environment()
    try:
        index, count = (int(part) for part in shard.split("/"))
    except ValueError as error:
        raise UserError(f"--shard={shard}: give i/n with whole numbers, such as 0/4") from error
    if not 0 <= index < count:
        raise UserError(f"--shard={shard}: i must lie in 0 … n−1")
    return list(units[index::count])


def run_sweep(configs: Sequence[RunConfig], workdir: pathlib.Path, population: int = 1, shard: str = "") -> None:
    """Prepares the corpora and trains every run of the shard that is not done; killed at any moment, it continues.

    population: runs of one shape trained as one vmapped step. Raises UserError for what a user can mend.
    """
    check_ids(configs)
    first_process_first(lambda: claim(workdir, configs))
    units = shard_of(populations(configs, population), shard)
    todo = [unit for unit in units if not all(is_done(workdir, config) for config in unit)]
    corpora = {_corpus_key(unit[0]): prepare_corpus(unit[0], workdir) for unit in todo}
    total = sum(c.train.planned_steps * c.train.batch_size * c.data.window for unit in todo for c in unit)
    count, finished = sum(map(len, units)), sum(map(len, units)) - sum(map(len, todo))
    quiet = not todo or jax.process_index() != 0
    with tqdm(total=total, unit="tok", unit_scale=True, smoothing=0.05, disable=quiet, mininterval=0.5) as bar:

        def progress(tokens: int, loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.3f} nats", refresh=False)
            bar.update(tokens)

        for unit in todo:
            bar.set_description(f"runs {finished + 1}–{finished + len(unit)} of {count}")
            train(unit, corpora[_corpus_key(unit[0])], workdir, progress=progress)
            finished += len(unit)


def prepare_corpus(config: RunConfig, workdir: pathlib.Path) -> Corpus:
    """The corpus of a run, built by the first process if it is not there yet."""
    return first_process_first(lambda: prepare(config.data, workdir / "corpora" / _corpus_key(config)))


def _corpus_key(config: RunConfig) -> str:
    return digest_of(dataclasses.asdict(config.data))


def check_ids(configs: Sequence[RunConfig]) -> None:
    """Raises UserError for a run that is listed twice, or that is not valid."""
    seen: set[str] = set()
    for config in configs:
        config.validate()
        if run_id(config) in seen:
            raise UserError(f"the sweep lists run {run_id(config)} twice; give the copies different seeds")
        seen.add(run_id(config))


def claim(workdir: pathlib.Path, configs: Sequence[RunConfig]) -> None:
    """Ties a workdir to a sweep; raises UserError if it belongs to another one."""
    plan = sorted(run_id(config) for config in configs)
    path = workdir / PLAN
    if path.exists():
        if json.loads(path.read_text()) != plan:
            raise UserError(
                f"{workdir} holds the runs of another config; give a fresh --workdir or the config it began with"
            )
    else:
        write_atomically(path, json.dumps(plan, indent=1))


def is_done(workdir: pathlib.Path, config: RunConfig) -> bool:
    """Whether a run is complete."""
    return (workdir / "runs" / run_id(config) / DONE).exists()


def status(configs: Iterable[RunConfig], workdir: pathlib.Path) -> pd.DataFrame:
    """One row a run: run, group, state ("done", "started" or "waiting"), steps logged of steps planned."""
    rows = []
    for config in configs:
        directory = workdir / "runs" / run_id(config)
        logged = len(JsonLines(directory / METRICS).read())
        state = "done" if is_done(workdir, config) else "started" if logged else "waiting"
        rows.append((run_id(config), config.group, state, logged, config.train.planned_steps))
    return pd.DataFrame(rows, columns=["run", "group", "state", "steps", "planned_steps"])


def runs_table(configs: Iterable[RunConfig], workdir: pathlib.Path) -> pd.DataFrame:
    """The runs table: one row an evaluation of a checkpoint on a language, of all runs that have any."""
    return pd.DataFrame(row for config in configs for row in _rows(config, workdir / "runs" / run_id(config)))


def _rows(config: RunConfig, directory: pathlib.Path) -> Iterator[dict]:
    records = JsonLines(directory / EVALUATIONS).read()
    if not records:
        return
    description = json.loads((directory / "config.json").read_text())
    shared = {
        "run": run_id(config),
        "model": config.model.attention,
        "mixture": config.mixture,
        "seed": config.seed,
        "num_params": description["num_params"],
        "num_params_total": description["num_params_total"],
        "loss_unit": "bits_per_byte",
    }
    if config.initialize:
        shared["initialize"] = config.initialize
    unique = {f"unique_tokens.{name}": count for name, count in description["unique_tokens"].items()}
    for record in sorted(records, key=lambda r: (r["step"], r["phase"])):
        tokens = {f"tokens.{name}": count for name, count in record["tokens"].items()}
        for language, loss in record["bits_per_byte"].items():
            nats = record["nats_per_token"][language]
            at = {
                "skipped_steps": record["skipped"],
                "phase": record["phase"],
                "step": record["step"],
                "language": language,
                "loss": loss,
                "nats_per_token": nats,
            }
            yield shared | at | tokens | unique


def _shard_of_environment() -> str:
    environment = os.environ
    if "SLURM_ARRAY_TASK_ID" in environment:
        first = int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
        return f"{int(environment['SLURM_ARRAY_TASK_ID']) - first}/{environment['SLURM_ARRAY_TASK_COUNT']}"
    if "JOB_COMPLETION_INDEX" in environment and "JOB_COMPLETIONS" in environment:
        return f"{environment['JOB_COMPLETION_INDEX']}/{environment['JOB_COMPLETIONS']}"
    return "0/1"


@dataclasses.dataclass
class SweepConfig(RunConfig):
    """A run and how a sweep over it is executed; the config file's get_sweep(config) lists the runs."""

    population: int = 1  # runs of one shape trained as one vmapped step
