"""The compiled program of a population: R runs of one shape as one vmapped, sharded step."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from atlas.data import Corpus, Sampler
from atlas.training import cpu
from atlas.training.config import RunConfig, shape_of
from atlas.training.mesh import check_divisible, over_devices, parameter_sharding
from atlas.training.step import Arrays, Cooldown, Skeleton, TrainState, TrainStep
from models import ModelConfig
from models.sharding import BATCH_AXES

Shape = tuple[int, int, int]  # runs, rows, tokens of a row

# What runs once a run need not be tried hard: with all of LLVM's passes it compiles for 10 s, longer than a step, and
# with few for 2; the numbers are the same.
_BRIEFLY: Any = {"xla_backend_optimization_level": 1}
_CACHE_SIZE = 8  # programs kept compiled: a sweep walks its shapes one after another


@dataclasses.dataclass(frozen=True)
class Program:
    """Jitted functions over states, batches and parameters with a leading axis of R runs.

    init(seeds int32 [R]) → state; start(params, buffers) → state; step(state, tokens int32 [R, B, T+1], languages
    int32 [R, B], cooldown (start, stop)) → (state, metrics of [R]), donating state; evaluate(params, buffers, tokens
    int32 [C, B, T+1], scored bool [C, B, T]) → (nats float32 [R, C], metrics of [R]); sample(params, buffers, prompts
    int32 [R, P], key) → tokens int32 [R, n]. like: the state as shapes with shardings, to restore into.
    """

    init: jax.stages.Wrapped
    start: jax.stages.Wrapped
    step: jax.stages.Wrapped
    evaluate: jax.stages.Wrapped
    sample: jax.stages.Wrapped
    like: TrainState
    batch_sharding: NamedSharding
    evaluation_sharding: NamedSharding

    def batches(self, shape: Shape, samplers: Sequence[Sampler], steps: range) -> Iterator[tuple[jax.Array, jax.Array]]:
        """The batches of consecutive steps, made by Grain's threads while the devices compute."""
        source = grain.MapDataset.range(steps.start, steps.stop).map(
            lambda step: self.batch(shape, samplers, int(step))
        )
        yield from source.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))

    def batch(self, shape: Shape, samplers: Sequence[Sampler], step: int) -> tuple[jax.Array, jax.Array]:
        """Global tokens [R, B, T+1] and languages [R, B] of a step; a process samples only the rows its devices
        hold."""
        runs, rows, width = shape

        @functools.cache
        def part(first: int, last: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
            batches = [sampler.batch(step, slice(start, stop)) for sampler in samplers[first:last]]
            return np.stack([b.tokens for b in batches]), np.stack([b.language for b in batches])

        def bounds(index: tuple[slice, ...]) -> tuple[int, int, int, int]:
            return (*index[0].indices(runs)[:2], *index[1].indices(rows)[:2])

        make = jax.make_array_from_callback
        tokens = make((runs, rows, width), self.batch_sharding, lambda index: part(*bounds(index))[0])
        return tokens, make((runs, rows), self.batch_sharding, lambda index: part(*bounds(index))[1])


def make_program(config: RunConfig, corpus: Corpus, population: int, mesh: Mesh) -> Program:
    """The program of `population` runs shaped like `config`; equal shapes share one compilation."""
    tokenizer = corpus.tokenizer
    ids = (tokenizer.separator, tokenizer.padding, tokenizer.vocab_size)
    return program_of(shape_of(config), ids, len(corpus.languages), population, mesh)


@functools.lru_cache(maxsize=_CACHE_SIZE)
def program_of(shape: RunConfig, ids: tuple[int, int, int], languages: int, population: int, mesh: Mesh) -> Program:
    """The program of runs of a shape; ids: the tokenizer's separator, padding and number of tokens."""
    check_divisible(mesh, shape, population)
    separator, padding, vocab_size = ids
    model: ModelConfig = dataclasses.replace(shape.model, vocab_size=vocab_size)
    train, on_cpu = shape.train, mesh.devices.flat[0].platform == "cpu"
    if on_cpu and mesh.devices.size == 1:
        cpu.keep_memory()
        parts = train.microbatches or cpu.cached_parts(train.batch_size, shape.data.window)
        train = dataclasses.replace(train, microbatches=parts)
    one = TrainStep(Skeleton(model), train, separator, padding, languages)
    over_runs = functools.partial(jax.vmap, spmd_axis_name="run")
    abstract = jax.eval_shape(over_runs(one.init), jax.ShapeDtypeStruct((population,), jnp.int32))
    shardings = _state_shardings(abstract, one.skeleton, mesh)
    like = jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), abstract, shardings)
    by_run, by_row = P("run"), P("run", BATCH_AXES)
    specs = {name: leaf.sharding.spec for name, leaf in like.params.items()}
    own_rows = functools.partial(over_devices, mesh=mesh)
    own_runs = _one_by_one if on_cpu else jax.vmap
    gradients = own_rows(own_runs(one.gradients), in_specs=(specs, by_run, by_row), out_specs=(specs, by_run, by_run))

    def losses(
        params: Arrays, buffers: Arrays, tokens_CBS: jax.Array, scored_CBT: jax.Array
    ) -> tuple[jax.Array, Arrays]:
        return own_runs(lambda params, buffers: one.evaluate(params, buffers, tokens_CBS, scored_CBT))(params, buffers)

    chunks = P(None, BATCH_AXES)
    evaluate = own_rows(losses, in_specs=(specs, by_run, chunks, chunks), out_specs=by_run)
    update = over_runs(one.update, in_axes=(0, 0, 0, None))

    def step(
        state: TrainState, tokens_RBS: jax.Array, language_RB: jax.Array, cooldown: Cooldown
    ) -> tuple[TrainState, Arrays]:
        return update(state, gradients(state.params, state.buffers, tokens_RBS), language_RB, cooldown)

    return Program(
        init=jax.jit(over_runs(one.init), out_shardings=shardings, compiler_options=_BRIEFLY if on_cpu else None),
        start=jax.jit(over_runs(one.start), out_shardings=shardings),
        # Output shardings equal to the input's keep XLA from choosing others and compiling the second step anew.
        step=jax.jit(step, out_shardings=(shardings, NamedSharding(mesh, P())), donate_argnums=0),
        evaluate=jax.jit(evaluate, out_shardings=NamedSharding(mesh, P())),
        sample=jax.jit(over_runs(one.sample, in_axes=(0, 0, 0, None)), out_shardings=NamedSharding(mesh, P())),
        like=like,
        batch_sharding=NamedSharding(mesh, by_row),
        evaluation_sharding=NamedSharding(mesh, P(None, BATCH_AXES, None)),
    )


def _one_by_one(function: Callable) -> Callable:
    """`jax.vmap` that computes one run after another: a CPU's caches hold one, and eight go twice as fast so."""
    return lambda *arguments: jax.lax.map(lambda mapped: function(*mapped), arguments)


def _state_shardings(abstract: TrainState, skeleton: Skeleton, mesh: Mesh) -> TrainState:
    """Parameters by the rules table, optimizer moments like their parameters, all else by run."""

    def sharding(path: tuple, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = getattr(path[-1], "key", None)
        if name in skeleton.axes:
            return parameter_sharding(mesh, skeleton.axes[name], leaf.shape)
        return NamedSharding(mesh, P("run"))

    return jax.tree_util.tree_map_with_path(sharding, abstract)
