"""Executes a list of runs: grouped into populations, parted into shards, never repeating what is done."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import jax
import pandas as pd
from tqdm import tqdm

from atlas.data import Corpus, DataConfig, languages_of, mixtures, prepare
from atlas.training import metrics
from atlas.training.config import MeshConfig, RunConfig, corpus_key, naming, run_id, shape_of
from atlas.training.finished import EVALUATIONS, METRICS, describe, is_done, load_model_config
from atlas.training.loop import train
from atlas.training.mesh import check_divisible, first_process_first, make_mesh
from atlas.training.workers import Unit, train_side_by_side
from checked import UserError
from checked.environment import parse_shard
from checked.files import read_sealed, write_sealed
from models import can_become

PLAN = "sweep.json"


def populations(configs: Sequence[RunConfig], size: int) -> list[Unit]:
    """Parts a sweep into populations: up to `size` runs of one shape each, in the order of the sweep.

    A run that continues from another never shares a population with runs that do not, and comes after them.
    """
    by_shape: dict[tuple[bool, RunConfig], list[RunConfig]] = {}
    for config in sorted(configs, key=lambda config: bool(config.initialize)):
        by_shape.setdefault((bool(config.initialize), shape_of(config)), []).append(config)
    return [runs[i : i + size] for runs in by_shape.values() for i in range(0, len(runs), size)]


def shard_of(units: Sequence[list[RunConfig]], shard: str) -> list[Unit]:
    """The units of a shard, as `parse_shard` says.

    >>> shard_of([["a"], ["b"], ["c"]], "1/2")
    [['b']]
    """
    index, count = parse_shard(shard)
    return list(units[index::count])


def run_sweep(
    runs: Sequence[RunConfig], workdir: pathlib.Path, population: int = 1, shard: str = "",
    profile: tuple[int, int] | None = None, processes: int = 1,
) -> None:  # fmt: skip
    """Prepares the corpora and trains every run of the shard that is not done; killed at any moment, it continues.

    population: runs of one shape trained as one vmapped step. profile: see `loop.train`. processes: that share the
    cores of a CPU, see `workers.usual`; with 1 this process trains. Raises UserError for what a
    user can mend, before the first run trains.
    """
    check_runs(runs, population, workdir)
    first_process_first(lambda: claim(workdir, runs))
    units = shard_of(populations(runs, population), shard)
    todo = [unit for unit in units if not all(is_done(directory_of(workdir, config)) for config in unit)]
    corpora = {unit[0].data: prepare_corpus(unit[0].data, workdir) for unit in todo}
    total = sum(c.train.planned_steps * c.train.batch_size * c.data.window for unit in todo for c in unit)
    count, finished = sum(map(len, units)), sum(map(len, units)) - sum(map(len, todo))
    quiet = not todo or jax.process_index() != 0
    with tqdm(total=total, unit="tok", unit_scale=True, smoothing=0.05, disable=quiet, mininterval=0.5) as bar:

        def progress(tokens: int, words: str) -> None:
            bar.set_postfix_str(words, refresh=not tokens)
            bar.update(tokens)

        def count_up(unit: Unit) -> None:
            nonlocal finished
            finished += len(unit)
            bar.set_description(f"{finished} of {count} runs done")

        count_up([])
        if processes > 1 and todo:
            corpus_of = functools.partial(prepare_corpus, workdir=workdir)
            train_side_by_side(todo, corpus_of, workdir, min(processes, len(todo)), progress, count_up)
            return
        for unit in todo:
            train(unit, corpora[unit[0].data], workdir, progress, profile)
            count_up(unit)


def prepare_corpus(config: DataConfig, workdir: pathlib.Path) -> Corpus:
    """The corpus of some runs, built by the first process if it is not there yet."""
    return first_process_first(lambda: prepare(config, workdir / "corpora" / corpus_key(config)))


def check_runs(runs: Sequence[RunConfig], population: int = 1, workdir: pathlib.Path | None = None) -> None:
    """Raises UserError, naming the run, for whatever would stop one of them after others have trained.

    Checked are mixtures against the languages, batches and populations against the mesh and this machine's devices,
    runs to continue from against the others, or against `workdir`. Text is looked at only for names of languages.
    """
    names = functools.cache(languages_of)
    before: list[RunConfig] = []
    seen: set[RunConfig] = set()
    for unit in populations(runs, population):
        for run in unit:
            with naming(run.name):
                unlabelled = dataclasses.replace(run, group="", mesh=MeshConfig())
                if unlabelled in seen:
                    raise UserError("the sweep lists it twice; give the copies different seeds")
                seen.add(unlabelled)
                # Mixtures that name the languages are right whatever the sizes.
                sizes = dict.fromkeys(names(run.data), 1)
                mixtures.parse(run.mixture, sizes, sizes, run.tokens)
                if run.initialize:
                    _check_parent(run, before, workdir)
                before.append(run)
        with naming(unit[0].name):
            check_divisible(make_mesh(unit[0].mesh), unit[0], len(unit))
            if unit[0].train.tensorboard:
                metrics.Boards()


def _check_parent(run: RunConfig, before: Sequence[RunConfig], workdir: pathlib.Path | None) -> None:
    """`initialize` is the name or the id of a run in `before`, or the id of a trained run of the workdir."""
    models = [r.model for r in before if r.name == run.initialize]
    models += [r.model for r in before if not models and run_id(r) == run.initialize]
    if workdir and not models:
        models = [load_model_config(workdir, run.initialize)]
    if not all(can_become(model, run.model) for model in models[:1]):
        raise UserError(
            f"initialize={run.initialize!r} is a model of another shape, or has gates or an indexer that this one lacks"
        )


def claim(workdir: pathlib.Path, runs: Sequence[RunConfig]) -> None:
    """Ties a workdir to a sweep; raises UserError if it belongs to another one."""
    plan = sorted(map(run_id, runs))
    path = workdir / PLAN
    if not path.exists():
        write_sealed(path, {"runs": plan})
    elif read_sealed(path, "plan of a sweep", "delete it and run the same command again")["runs"] != plan:
        raise UserError(
            f"{workdir} holds the runs of another config or text; give a fresh --workdir or what it began with"
        )


def directory_of(workdir: pathlib.Path, config: RunConfig) -> pathlib.Path:
    """Where a run of a workdir leaves its files."""
    return workdir / "runs" / run_id(config)


def status(configs: Iterable[RunConfig], workdir: pathlib.Path) -> pd.DataFrame:
    """One row a run: run, group, state ("done", "started", "waiting", or "damaged"), steps logged of steps planned, and
    how many of them were skipped."""
    rows = []
    for config in configs:
        directory, records = directory_of(workdir, config), []
        try:
            records = metrics.read(directory / METRICS)
            state = "done" if is_done(directory) else "started" if records else "waiting"
        except UserError:
            state = "damaged"
        skipped = int(max((r["skipped"] for r in records), default=0))
        rows.append((run_id(config), config.group, state, len(records), config.train.planned_steps, skipped))
    return pd.DataFrame(rows, columns=["run", "group", "state", "steps", "planned_steps", "skipped_steps"])


def runs_table(configs: Iterable[RunConfig], workdir: pathlib.Path) -> pd.DataFrame:
    """The runs table: one row an evaluation of a checkpoint on a language, of all runs that have any."""
    return pd.DataFrame(row for config in configs for row in _rows(config, directory_of(workdir, config)))


def _rows(config: RunConfig, directory: pathlib.Path) -> Iterator[dict]:
    records = metrics.read(directory / EVALUATIONS)
    if not records:
        return
    description = describe(directory)
    shared = {"run": run_id(config), "model": config.model.attention, "mixture": config.mixture, "seed": config.seed}
    shared |= {name: description[name] for name in ("num_params", "num_params_total")}
    shared |= {"loss_unit": "bits_per_byte"} | ({"initialize": config.initialize} if config.initialize else {})
    unique = {f"unique_tokens.{name}": count for name, count in description["unique_tokens"].items()}
    for record in sorted(records, key=lambda r: (r["step"], r["phase"])):
        tokens = {f"tokens.{name}": count for name, count in record["tokens"].items()}
        at = {"skipped_steps": record["skipped"], "phase": record["phase"], "step": record["step"]}
        for language, loss in record["bits_per_byte"].items():
            losses = {"language": language, "loss": loss, "nats_per_token": record["nats_per_token"][language]}
            yield shared | at | losses | tokens | unique
