"""The train step: one pure function (state, batch) → (state, metrics) for a single run, over plain dicts of arrays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from atlas.training.config import TrainConfig
from models import Decoder, ModelConfig, document_segments, sharding, token_losses
from models.attention.cache import Cache
from models.decoder import named_variables

Arrays = dict[str, jax.Array]
Cooldown = tuple[jax.Array, jax.Array]
Gradients = tuple[Arrays, Arrays, Arrays]  # by parameter; the buffers after the step; metrics

NO_COOLDOWN = (2**31 - 2, 2**31 - 1)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "buffers", "optimizer", "step", "windows", "skipped"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a run is at one step.

    params: float32 arrays by dotted name. buffers: the model's other variables (running statistics). optimizer: the
    state of `make_optimizer`'s. step: int32. windows: int32 [K], training windows learnt from, by language
    of the corpus. skipped: int32, steps left without an update because the loss or a gradient was not finite.
    """

    params: Arrays
    buffers: Arrays
    optimizer: optax.OptState
    step: jax.Array
    windows: jax.Array
    skipped: jax.Array


class Skeleton:
    """A decoder without its arrays: splits it into named arrays and builds it back inside a pure function.

    axes: the logical axis names of every parameter, without the axis of scanned layers.
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        abstract = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
        self._graph, *self._states = nnx.split(abstract, nnx.Param, ...)
        self.axes = {name: variable.get_metadata("axes") for name, variable in named_variables(self._states[0]).items()}

    def init(self, key: jax.Array) -> tuple[Arrays, Arrays]:
        """Fresh parameters and buffers."""
        return self.split(Decoder(self.config, rngs=nnx.Rngs(key)))

    def split(self, model: Decoder) -> tuple[Arrays, Arrays]:
        """The arrays of a decoder."""
        _, *states = nnx.split(model, nnx.Param, ...)
        params, buffers = ({n: v[...] for n, v in named_variables(state).items()} for state in states)
        return params, buffers

    def merge(self, params: Arrays, buffers: Arrays) -> Decoder:
        """The decoder that holds these arrays."""
        arrays = params | buffers
        filled = (nnx.map_state(lambda path, v: v.replace(arrays[".".join(map(str, path))]), s) for s in self._states)
        return nnx.merge(self._graph, *filled)


def learning_rate(config: TrainConfig, step: jax.Array, cooldown: Cooldown) -> jax.Array:
    """Warmup–stable–decay: linear to the peak, constant, then linear to 0 between the two steps of `cooldown`.

    >>> config = TrainConfig(learning_rate=1.0, warmup_steps=2)
    >>> [float(learning_rate(config, step, (4, 8))) for step in (0, 1, 3, 4, 6, 8)]
    [0.5, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    warmup = jnp.minimum((step + 1) / max(config.warmup_steps, 1), 1.0)
    start, stop = cooldown
    decay = jnp.clip((stop - step) / jnp.maximum(stop - start, 1), 0.0, 1.0)
    return config.learning_rate * warmup * decay


def make_optimizer(config: TrainConfig, skeleton: Skeleton) -> optax.GradientTransformation:
    """AdamW of the model and of the indexer, without the learning rate, which the step applies.

    Two, because a clip over both norms would let the indexer's own loss move the model.
    """
    matrices = {name: len(axes) > 1 for name, axes in skeleton.axes.items()}
    adamw = optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2),
        optax.add_decayed_weights(config.weight_decay, mask=matrices),
        optax.scale(-1.0),
    )
    parts = {name: "indexer" if ".indexer." in name else "model" for name in skeleton.axes}
    indexer = optax.chain(adamw, optax.scale(config.indexer_rate))
    return optax.partition({"model": adamw, "indexer": indexer}, parts)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStep:
    """The pure functions of one run: `init`, `__call__` (the step) and `evaluate`.

    separator, padding: the tokenizer's ids. languages: K, how many the corpus has.
    """

    skeleton: Skeleton
    config: TrainConfig
    separator: int
    padding: int
    languages: int

    def init(self, seed: jax.Array) -> TrainState:
        """The state before the first step; seed: int32."""
        return self.start(*self.skeleton.init(jax.random.key(seed)))

    def start(self, params: Arrays, buffers: Arrays) -> TrainState:
        """The state before the first step from given parameters."""
        zero = jnp.zeros((), jnp.int32)
        optimizer = self._optimizer.init(params)
        return TrainState(params, buffers, optimizer, zero, jnp.zeros(self.languages, jnp.int32), zero)

    def __call__(
        self, state: TrainState, tokens_BS: jax.Array, language_B: jax.Array, cooldown: Cooldown
    ) -> tuple[TrainState, Arrays]:
        """One step on tokens int32 [B, T+1] of languages int32 [B]; an update that is not finite is skipped and
        counted."""
        return self.update(state, self.gradients(state.params, state.buffers, tokens_BS), language_B, cooldown)

    def update(
        self, state: TrainState, learnt: Gradients, language_B: jax.Array, cooldown: Cooldown
    ) -> tuple[TrainState, Arrays]:
        """The second half of a step: the state after what `gradients` found, and all metrics."""
        gradients, buffers, metrics = learnt
        rate, norm = learning_rate(self.config, state.step, cooldown), optax.tree.norm(gradients)
        updates, optimizer = self._optimizer.update(gradients, state.optimizer, state.params)
        params = jax.tree.map(lambda value, update: value + rate * update, state.params, updates)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        windows = state.windows + jnp.sum(language_B[:, None] == jnp.arange(self.languages), axis=0, dtype=jnp.int32)
        learnt = TrainState(params, buffers, optimizer, state.step, windows, state.skipped)
        kept = jax.tree.map(functools.partial(jnp.where, finite), learnt, state)
        skipped = state.skipped + ~finite
        metrics |= {"gradient_norm": norm, "learning_rate": rate, "skipped": skipped}
        return dataclasses.replace(kept, step=state.step + 1, skipped=skipped), metrics

    def evaluate(
        self, params: Arrays, buffers: Arrays, tokens_CBS: jax.Array, scored_CBT: jax.Array
    ) -> tuple[jax.Array, Arrays]:
        """Of C chunks of windows int32 [C, B, T+1]: nats summed over the targets of each that are scored (bool
        [C, B, T]), float32 [C], and the model's metrics.

        Metrics are means over chunks, as by `evaluation.read`; those that need attention probabilities are measured
        here and in no training step.
        """

        def chunk(windows: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Arrays]:
            tokens_BS, scored_BT = windows
            model = self.skeleton.merge(params, buffers)
            nats_BT, _, metrics = token_losses(model, tokens_BS, self.separator, self.padding, measure=True)
            return sharding.total(jnp.sum(nats_BT, where=sharding.own(scored_BT))), metrics

        nats_C, metrics_C = jax.lax.map(chunk, (tokens_CBS, scored_CBT))
        return nats_C, jax.tree.map(jnp.mean, metrics_C)

    def sample(self, params: Arrays, buffers: Arrays, prompt_P: jax.Array, key: jax.Array) -> jax.Array:
        """The int32 tokens that the model draws behind a prompt int32 [P], as many as `sample_tokens`."""
        decoder, P, count = self.skeleton.merge(params, buffers), len(prompt_P), self.config.sample_tokens
        block = self.skeleton.config.block  # which must divide the slots where blocks are selected
        cache = decoder.init_cache(1, -(-(P + count) // block) * block)
        logits_1PV, cache = decoder.extend(prompt_P[None], cache)

        def write(state: tuple[jax.Array, Cache], key: jax.Array) -> tuple[tuple[jax.Array, Cache], jax.Array]:
            token_1 = jax.random.categorical(key, state[0]).astype(jnp.int32)
            logits_11V, cache = decoder.extend(token_1[:, None], state[1])
            return (logits_11V[:, 0], cache.advance(jnp.ones((1,), jnp.int32))), token_1[0]

        state = logits_1PV[:, -1], cache.advance(jnp.full((1,), P, jnp.int32))
        return jax.lax.scan(write, state, jax.random.split(key, count))[1]

    @functools.cached_property
    def _optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.config, self.skeleton)

    def gradients(self, params: Arrays, buffers: Arrays, tokens_BS: jax.Array) -> Gradients:
        """The first half of a step: gradients, the buffers after it, and the model's metrics.

        Under `jax.shard_map` a device has its own rows and its parts of the matrices; metrics are those of all rows.
        With `microbatches` the rows come in so many parts, whose gradients are added up: activations of one part exist
        at a time, and the result is that of one batch.
        """
        # Traced once, though its shapes are asked for first.
        differentiate = jax.jit(jax.value_and_grad(self._loss, has_aux=True), inline=True)
        counts = self._counts(self.skeleton.merge(params, buffers), tokens_BS)

        def part(tokens_bS: jax.Array) -> Gradients:
            (_, (moves, metrics)), gradients = differentiate(params, buffers, tokens_bS, counts)
            return gradients, moves, metrics

        def add(sums: Gradients, tokens_bS: jax.Array) -> tuple[Gradients, None]:
            new = part(tokens_bS)
            largest = jnp.maximum(sums[2]["largest_activation"], new[2]["largest_activation"])
            gradients, moves, metrics = jax.tree.map(jnp.add, sums, new)
            return (gradients, moves, metrics | {"largest_activation": largest}), None

        if (parts := self.config.microbatches) <= 1:
            gradients, moves, metrics = part(tokens_BS)
        else:
            tokens_PbS = tokens_BS.reshape(parts, -1, tokens_BS.shape[1])
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(part, tokens_PbS[0]))
            (gradients, moves, metrics), _ = jax.lax.scan(add, zeros, tokens_PbS)
        gradients = {name: sharding.total_gradient(g, self.skeleton.axes[name]) for name, g in gradients.items()}
        return gradients, jax.tree.map(jnp.add, buffers, moves), metrics

    def _counts(self, model: Decoder, tokens_BS: jax.Array) -> tuple[jax.Array, ...]:
        """What means are taken over: targets, tokens read, and queries that a running variance rests on."""
        segments_BT = document_segments(tokens_BS[:, :-1], self.separator, self.padding)
        own = map(sharding.own, (tokens_BS[:, 1:], tokens_BS[:, :-1]))
        targets, tokens = (jnp.sum(tokens_BT != self.padding) for tokens_BT in own)
        return sharding.total(targets), sharding.total(tokens), model.layers.attention.variance_weight(segments_BT)

    def _loss(
        self, params: Arrays, buffers: Arrays, tokens_BS: jax.Array, counts: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, tuple[Arrays, Arrays]]:
        """What rows add to the loss of a batch with these counts; also to how its buffers move, and to its metrics."""
        model = self.skeleton.merge(params, buffers)
        own = self._counts(model, tokens_BS)
        targets, of_tokens, of_variance = (a / jnp.maximum(b, 1) for a, b in zip((1, *own[1:]), counts, strict=True))
        nats_BT, weights_BT, aux = token_losses(model, tokens_BS, self.separator, self.padding, train=True)
        nats = sharding.total(jnp.sum(nats_BT * weights_BT)) * targets
        metrics = {name: value if name == "largest_activation" else of_tokens * value for name, value in aux.items()}
        after = self.skeleton.split(model)[1]
        moves = jax.tree.map(lambda after, before: of_variance * (after - before), after, buffers)
        return nats + metrics["indexer_loss"], (moves, {"loss": nats} | metrics)
