"""Trains a population: one trunk at constant learning rate and a cooldown branch to every number of tokens.

Every process runs this; process 0 writes the logs. Killed at any moment, the same call continues: batches are
functions of (seed, step), states come back from the newest sound checkpoint, and log lines after it are dropped
before they are written again.
"""

import contextlib
import dataclasses
import json
import logging
import pathlib
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from atlas.data import Corpus, Sampler, mixtures
from atlas.training import metrics
from atlas.training.config import FLOPS_PER_PARAMETER_TOKEN, RunConfig, population_name, run_id
from atlas.training.evaluation import EvaluationSet, evaluation_set
from atlas.training.finished import CONFIG, DONE, EVALUATIONS, METRICS, MODEL, is_done, load_model, mark
from atlas.training.mesh import make_mesh
from atlas.training.meter import Meter, in_words
from atlas.training.program import Program, make_program
from atlas.training.step import NO_COOLDOWN, Arrays, Cooldown, TrainState
from checked import UserError
from checked.files import locked, write_atomically
from models import become, checkpoint, count_params

TRUNK, COOLDOWN = "trunk", "cooldown"
Progress = Callable[[int, str], None]

_LOG = logging.getLogger(__name__)
_SKIPPED_FIRST = 5  # steps that any run may skip: of the first few, these are a large share
_PROMPT = 32  # tokens of validation text that samples continue
_GROUP = 100  # log lines of a run that are written at once: opening a file costs more than a small step


@dataclasses.dataclass(frozen=True)
class Segment:
    """Steps start … stop of one phase: the trunk (learning rate constant) or a cooldown branch."""

    phase: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The directory of its checkpoints."""
        return TRUNK if self.phase == TRUNK else f"{COOLDOWN}-{self.stop}"

    @property
    def cooldown(self) -> Cooldown | tuple[int, int]:
        """The schedule's bounds."""
        return NO_COOLDOWN if self.phase == TRUNK else (self.start, self.stop)


def train(
    configs: Sequence[RunConfig],
    corpus: Corpus,
    workdir: pathlib.Path,
    progress: Progress = lambda tokens, words: None,
    profile: tuple[int, int] | None = None,
    stop: Callable[[int], bool] | None = None,
) -> None:
    """Trains runs of one shape together and leaves `workdir/runs/<run id>/` for each.

    configs: R runs that differ in seed and mixture only. workdir: holds `runs` and `checkpoints`. progress(tokens,
    words) is called after every step with the tokens of all runs, and with what to say of it; also where there is only
    something to say. profile: the first and the last step of the trunk that a trace for xprof in `workdir/profile`
    covers. stop(step): whether to end behind this step, the state saved; without it SIGINT and SIGTERM say so.

    Raises UserError for a mixture, batch or mesh that does not fit, and KeyboardInterrupt once the state is saved.
    """
    stop_requests = contextlib.nullcontext(stop) if stop else _stop_requests()
    Population(configs, corpus, workdir, progress, profile).train(stop_requests)


class Population:
    """R runs of one shape in training; see `train`."""

    def __init__(
        self, configs: Sequence[RunConfig], corpus: Corpus, workdir: pathlib.Path, progress: Progress,
        profile: tuple[int, int] | None = None,
    ):  # fmt: skip
        self._config, self._corpus, self._progress = configs[0], corpus, progress
        # A trunk that ends earlier ends the trace, and none is asked for by steps that never come.
        trunk = self._config.train.branch_step(self._config.train.steps[-1])
        self._profile = (profile[0], min(profile[1], trunk - 1)) if profile else (-1, -1)
        self._configs, self._mesh = configs, make_mesh(configs[0].mesh)
        self._ids = [run_id(config) for config in configs]
        settings = self._config.train
        self._shape = (len(configs), settings.batch_size, corpus.window + 1)
        sizes = corpus.unique_tokens, corpus.num_bytes
        self._weights = [mixtures.parse(config.mixture, *sizes, config.tokens) for config in configs]
        self._samplers = [
            Sampler(corpus, weights, settings.batch_size, config.seed)
            for config, weights in zip(configs, self._weights, strict=True)
        ]
        self._program: Program = make_program(self._config, corpus, len(configs), self._mesh)
        extent = settings.evaluation_windows, settings.batch_size
        self._evaluation: EvaluationSet = evaluation_set(corpus, *extent, self._config.data.tasks)
        self._directories = [workdir / "runs" / name for name in self._ids]
        self._checkpoints = workdir / "checkpoints" / population_name(self._ids)
        self._workdir, self._lines = workdir, [[] for _ in configs]
        self._boards = metrics.Boards() if settings.tensorboard else None
        model = dataclasses.replace(self._config.model, vocab_size=corpus.tokenizer.vocab_size)
        self._counts, self._tokens = count_params(model), len(configs) * settings.batch_size * corpus.window
        self._meter = Meter(self._tokens, FLOPS_PER_PARAMETER_TOKEN * self._counts["non_embedding"] * self._tokens)

    def train(self, stop_requests: contextlib.AbstractContextManager[Callable[[int], bool]]) -> None:
        """Runs every segment that is not done yet."""
        with jax.set_mesh(self._mesh), stop_requests as self._stop_requested, self._held():
            if all(map(is_done, self._directories)):
                return
            self._begin()
            position, state = self._restore(Segment(TRUNK, 0, self._config.train.steps[-1]))
            self._resume(TRUNK, 0, position)
            *earlier, last = self._config.train.steps
            for end in (*earlier, last):
                branch = Segment(COOLDOWN, self._config.train.branch_step(end), end)
                if end != last and position >= branch.start and self._logged(branch, end, [end]):
                    self._progress(self._tokens * (branch.stop - branch.start), "")
                    continue
                if position > branch.start:
                    _LOG.warning("logs of %s lack its branch to step %d: it begins anew", self._ids[0], end)
                    position, state = 0, None
                state = self._initial() if state is None else state
                state = self._advance(state, Segment(TRUNK, 0, branch.start), position)
                position = branch.start
                final = self._branch(state, branch)
            self._finish(final)

    def _resume(self, phase: str, start: int, step: int) -> None:
        """Says where a segment continues, if it does, and what its first step waits for."""
        if step > start and _writes():
            others = f" and {len(self._ids) - 1} others" if len(self._ids) > 1 else ""
            tqdm.write(f"{self._ids[0]}{others}: continues from step {step} of its {phase}", file=sys.stderr)
        self._progress(self._tokens * (step - start), "compiling" if self._meter.is_new else "")

    def _initial(self) -> TrainState:
        if not self._config.initialize:
            return self._fresh()
        like = {"params": self._program.like.params, "buffers": self._program.like.buffers}
        loaded = [load_model(self._workdir, config.initialize) for config in self._configs]
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *loaded)
        if any(stacked[part].keys() != like[part].keys() for part in like):
            fresh = self._fresh()
            stacked = {part: become(stacked[part], getattr(fresh, part)) for part in like}
        arrays = jax.tree.map(lambda leaf, shape: jax.device_put(leaf, shape.sharding), stacked, like)
        return self._program.start(arrays["params"], arrays["buffers"])

    def _fresh(self) -> TrainState:
        return self._program.init(np.array([config.seed for config in self._configs], np.int32))

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Holds all runs for this process, or for the processes that it leads."""
        with contextlib.ExitStack() as held:
            for name, directory in zip(self._ids, self._directories if _writes() else (), strict=False):
                held.enter_context(locked(directory / ".lock", f"run {name}"))
            yield

    def _restore(self, segment: Segment) -> tuple[int, TrainState | None]:
        """The newest sound state of a segment with its step; its start and None where there is none, or where the logs
        lack what led to it."""
        found = checkpoint.restore(self._checkpoints / segment.name, self._program.like)
        every = self._config.train.evaluate_every if segment.phase == TRUNK else 0
        if found and self._logged(segment, found[0], range(every, found[0] + 1, every) if every else ()):
            return found
        if found:
            _LOG.warning("logs of %s lack steps before %d: its %s begins anew", self._ids[0], found[0], segment.name)
        return segment.start, None

    def _logged(self, segment: Segment, step: int, evaluated: Iterable[int]) -> bool:
        """Whether the logs of all runs hold every step of a segment up to one, and these evaluations."""
        wanted = {METRICS: (segment.name, range(segment.start + 1, step + 1)), EVALUATIONS: (segment.phase, evaluated)}
        return all(
            {r["step"] for r in metrics.read(directory / file) if r["phase"] == phase}.issuperset(steps)
            for directory in self._directories
            for file, (phase, steps) in wanted.items()
        )

    def _branch(self, trunk: TrainState, segment: Segment) -> TrainState:
        directory = self._checkpoints / segment.name
        step, state = self._restore(segment)
        self._resume(segment.name, segment.start, step)
        # The step donates its state, and the trunk's is needed again.
        state = jax.tree.map(lambda leaf: leaf.copy(), trunk) if state is None else state
        state = self._advance(state, segment, step)
        self._save(directory, segment.stop, state)
        self._evaluate(state, segment.phase)
        if segment.stop != self._config.train.steps[-1]:
            checkpoint.prune(directory, keep=())
        return state

    def _advance(self, state: TrainState, segment: Segment, start: int) -> TrainState:
        """Steps from `start` through a segment, logging, evaluating and checkpointing; metrics are fetched one step
        behind."""
        settings = self._config.train
        cooldown = tuple(np.int32(bound) for bound in segment.cooldown)
        directory = self._checkpoints / segment.name
        self._forget(segment, start)
        if start == 0 and segment.phase == TRUNK and self._config.initialize and settings.evaluate_every:
            self._evaluate(state, TRUNK)  # what it was given, before it changes
        self._meter.begin()
        pending: Arrays | None = None
        steps = range(start, segment.stop)
        for step, batch in zip(steps, self._program.batches(self._shape, self._samplers, steps), strict=True):
            if segment.phase == TRUNK and step == self._profile[0]:
                jax.profiler.start_trace(str(self._workdir / "profile"))
            state, now = self._program.step(state, *batch, cooldown)
            if segment.phase == TRUNK and step == self._profile[1] >= self._profile[0]:
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            self._log(segment, step - 1, pending)
            pending, done = now, step + 1
            if settings.evaluate_every and segment.phase == TRUNK and done % settings.evaluate_every == 0:
                self._evaluate(state, TRUNK)
            stop = self._stop_requested(done)
            if stop or (settings.checkpoint_every and done % settings.checkpoint_every == 0):
                self._log(segment, step, pending)
                pending = None
                self._flush()
                self._save(directory, done, state)
            if stop:
                raise KeyboardInterrupt
        self._log(segment, segment.stop - 1, pending)
        self._flush()
        if segment.phase == TRUNK and segment.stop > start:
            self._save(directory, segment.stop, state)
        return state

    def _save(self, directory: pathlib.Path, step: int, state: TrainState) -> None:
        checkpoint.save(directory, step, state)
        checkpoint.prune(directory, keep=checkpoint.steps(directory)[-2:])
        if self._boards:
            self._boards.close()

    def _log(self, segment: Segment, step: int, values: Arrays | None) -> None:
        if values is None:
            return
        values = jax.device_get(values)
        speed = self._meter.tick()
        self._progress(self._tokens, in_words(float(np.mean(values["loss"])), speed))
        fixed = {"phase": segment.name, "step": step + 1, "time": round(time.time(), 3), "speed": speed}
        for run, lines in enumerate(self._lines):
            lines.append(fixed | {key: float(value[run]) for key, value in values.items()})
        for name, config, skipped in zip(self._ids, self._configs, values["skipped"], strict=True):
            if skipped > max(_SKIPPED_FIRST, config.train.most_skipped * (step + 1)):
                self._flush()
                raise UserError(
                    f"run {name} skipped {int(skipped)} of its first {step + 1} steps, whose loss or gradient was not "
                    "finite; lower train.learning_rate, or allow it by train.most_skipped"
                )
        if len(self._lines[0]) >= _GROUP:
            self._flush()

    def _flush(self) -> None:
        for directory, lines in zip(self._directories, self._lines, strict=True):
            if _writes() and lines:
                metrics.append(directory / METRICS, *lines)
                if self._boards:
                    self._boards.add(directory, *lines)
            lines.clear()

    def _forget(self, segment: Segment, start: int) -> None:
        """Drops what the coming steps will write again."""
        files = (METRICS, EVALUATIONS) if segment.phase == TRUNK else (METRICS,)
        for path in (directory / file for directory in self._directories for file in files if _writes()):
            metrics.keep(path, lambda r: r["phase"] != segment.name or r["step"] <= start)

    def _evaluate(self, state: TrainState, phase: str) -> None:
        windows = self._evaluation.tokens, self._evaluation.scored
        windows = jax.device_put(windows, self._program.evaluation_sharding)
        nats_RC, measured = jax.device_get(self._program.evaluate(state.params, state.buffers, *windows))
        steps, learnt_RK, skipped = jax.device_get((state.step, state.windows, state.skipped))
        samples = self._samples(state) if self._config.train.sample_tokens else []
        for run, directory in enumerate(self._directories if _writes() else ()):
            bits_K, nats_K = self._evaluation.losses(nats_RC[run])
            tokens_K = learnt_RK[run].astype(np.int64) * self._corpus.window
            at = {"phase": phase, "step": int(steps[run])}
            by_language = {"tokens": tokens_K, "bits_per_byte": bits_K, "nats_per_token": nats_K}
            record = at | {"skipped": int(skipped[run])}
            for name, values_K in by_language.items():
                record[name] = dict(zip(self._corpus.languages, values_K.tolist(), strict=True))
            metrics.keep(directory / EVALUATIONS, lambda r: not at.items() <= r.items())  # noqa: B023  called at once
            record |= {name: float(value[run]) for name, value in measured.items()}
            record |= {"sample": samples[run]} if samples else {}
            metrics.append(directory / EVALUATIONS, record)
            if self._boards:
                self._boards.add(directory, record)
                self._boards.close()

    def _samples(self, state: TrainState) -> list[str]:
        """What each run writes behind the beginning of a validation window of its main language; the first is shown."""
        mains = [max(weights, key=weights.__getitem__) for weights in self._weights]
        windows = [self._corpus.windows(name, "validation")[np.arange(1)][0] for name in mains]
        prompts_RP, step = np.stack(windows)[:, :_PROMPT], int(jax.device_get(state.step)[0])
        key = jax.random.fold_in(jax.random.key(self._config.seed), step)
        drawn = jax.device_get(self._program.sample(state.params, state.buffers, prompts_RP, key))
        texts = ["|".join(map(self._corpus.tokenizer.decode, pair)) for pair in zip(prompts_RP, drawn, strict=True)]
        if _writes():
            tqdm.write(f"{self._ids[0]}, step {step}: {texts[0]!r}", file=sys.stderr)
        return texts

    def _begin(self) -> None:
        """Writes what the runs are; from now on none of them is done."""
        if not _writes():
            return
        for config, weights, directory in zip(self._configs, self._weights, self._directories, strict=True):
            description = {
                "config": dataclasses.asdict(config),
                "weights": weights,
                "num_params": self._counts["non_embedding"],
                "num_params_total": self._counts["total"],
                "unique_tokens": self._corpus.unique_tokens,
                "corpus": self._corpus.fingerprint,
            }
            (directory / DONE).unlink(missing_ok=True)
            write_atomically(directory / CONFIG, json.dumps(description, indent=1))

    def _finish(self, final: TrainState) -> None:
        """Leaves every run's model, and marks it done."""
        manifest = checkpoint.manifest_of(final.params)
        for run, directory in enumerate(self._directories):
            model = {"params": final.params, "buffers": final.buffers}
            checkpoint.save(directory / MODEL, 0, jax.tree.map(lambda leaf: leaf[run : run + 1], model))  # noqa: B023
            if _writes():
                self._corpus.tokenizer.save(directory / MODEL)
                facts = {
                    "params_sha256": checkpoint.digest(manifest, run),
                    "skipped_steps": int(jax.device_get(final.skipped)[run]),
                    "step": int(jax.device_get(final.step)[run]),
                }
                mark(directory, facts)
        if _writes():
            shutil.rmtree(self._checkpoints, ignore_errors=True)


def _writes() -> bool:
    return jax.process_index() == 0


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[int], bool]]:
    """Turns the first SIGINT or SIGTERM into a question that the loop asks after each step, so that no step is cut in
    half; a second one stops at once.

    With several processes jax's preemption service lets all of them stop after the same step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    requested = threading.Event()

    def stop(*_: object) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda step: requested.is_set()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
