"""The decoder: embeddings around a stack of blocks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from models import sharding
from models.attention import Attention, RunningVariance
from models.attention.cache import Cache, LayerCache
from models.attention.module import Metrics
from models.config import ModelConfig
from models.layers import FeedForward, Rotation, View, make_rotation, norm_scale, rms_norm, scaled_norm, weight
from models.sharding import whole

_LayerState = nnx.State
_LayerInputs = tuple[_LayerState, _LayerState, jax.Array]
_LayerStep = Callable[[jax.Array, _LayerInputs], tuple[jax.Array, tuple[Metrics, jax.Array | None]]]

# What leads from a part of a matrix to the matrix in a product. No residuals: every layer's would be the whole model.
_OF_WEIGHTS = ("all_gather", "reshape", "transpose", "convert_element_type", "squeeze")

_NO_WINDOW = jnp.iinfo(jnp.int32).max


class Block(nnx.Module):
    """Attention and feed-forward on one residual stream; the kinds differ in where norms stand and what they feed."""

    attention: Attention
    _attention_input: Callable[[jax.Array], jax.Array]
    _add: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

    def __call__(
        self, x_BTM: jax.Array, segments_BT: jax.Array, view: View, *, train: bool = False, measure: bool = False
    ) -> tuple[jax.Array, Metrics]:
        n_BTM = self._attention_input(x_BTM)
        y_BTM, metrics = self.attention(n_BTM, segments_BT, *view, train=train, measure=measure)
        x_BTM = self._add(x_BTM, n_BTM, y_BTM)
        return x_BTM, metrics | _largest(x_BTM, sharding.own(segments_BT))

    def extend(
        self, x_BCM: jax.Array, layer: LayerCache, position_BC: jax.Array, view: View
    ) -> tuple[jax.Array, LayerCache]:
        """The block's output for C more tokens of every row, and its cache with them written."""
        n_BCM = self._attention_input(x_BCM)
        y_BCM, layer = self.attention.extend(n_BCM, layer, position_BC, *view)
        return self._add(x_BCM, n_BCM, y_BCM), layer


class ParallelBlock(Block):
    """x + attention(n) + feed_forward(n), where n = scale · RMSNorm(x).

    Attention and feed-forward read the same normalised input, because the parameter totals of ATLAS have
    exactly one norm vector a layer (see `count_params`); two blocks in sequence would need two.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.architecture = config.architecture
        self.norm = norm_scale(config.d_model, "embed", config.architecture)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)

    def _attention_input(self, x_BTM: jax.Array) -> jax.Array:
        return scaled_norm(x_BTM, self.norm, self.architecture)

    def _add(self, x_BTM: jax.Array, n_BTM: jax.Array, y_BTM: jax.Array) -> jax.Array:
        return x_BTM + y_BTM + self.feed_forward(n_BTM)


class SequentialBlock(Block):
    """y = x + r·p(attention(n(x))), then y + r·p(feed_forward(n(y))): n and p are the norms that the family has, r is
    `residual_scale`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        architecture = self.architecture = config.architecture
        norm = lambda wanted: norm_scale(config.d_model, "embed", architecture) if wanted else None  # noqa: E731
        fixed = architecture.fixed
        self.attention_norm = norm(fixed.norm_inputs)
        self.attention = Attention(config, rngs=rngs)
        self.attention_output_norm = norm(fixed.norm_outputs)
        self.feed_forward_norm = norm(fixed.norm_inputs)
        self.feed_forward = FeedForward(config, rngs=rngs)
        self.feed_forward_output_norm = norm(fixed.norm_outputs)

    def _attention_input(self, x_BTM: jax.Array) -> jax.Array:
        return self._norm(x_BTM, self.attention_norm)

    def _add(self, x_BTM: jax.Array, _: jax.Array, y_BTM: jax.Array) -> jax.Array:
        scale = self.architecture.residual_scale
        x_BTM = x_BTM + scale * self._norm(y_BTM, self.attention_output_norm)
        y_BTM = self.feed_forward(self._norm(x_BTM, self.feed_forward_norm))
        return x_BTM + scale * self._norm(y_BTM, self.feed_forward_output_norm)

    def _norm(self, x_BTM: jax.Array, scale: nnx.Param | None) -> jax.Array:
        return x_BTM if scale is None else scaled_norm(x_BTM, scale, self.architecture)


def _largest(x_BTM: jax.Array, segments_BT: jax.Array) -> Metrics:
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(x_BTM)), initial=0, where=(segments_BT >= 0)[..., None])
    return {"largest_activation": sharding.largest(largest.astype(jnp.float32))}


class Decoder(nnx.Module):
    """A causal language model: token ids [B, T] to float32 logits [B, T, V].

    Parameters are initialised as float32; `config.dtype` is that of activations. Every parameter names its
    dimensions in its metadata `axes`. Parameters of the L layers are stacked along a first dimension that
    `axes` does not name. Initial values are truncated normal with deviation 1/sqrt(fan in); the projections that
    write to the residual stream have 1/sqrt(2·L) of that; embeddings have 1/sqrt(M), so that initial logits have
    a variance of about 1.

    >>> model = Decoder(ModelConfig(layers=1), rngs=nnx.Rngs(0))
    >>> logits, metrics = model(jnp.zeros((2, 8), jnp.int32))
    >>> logits.shape
    (2, 8, 288)
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        V, M, L = config.vocab_size, config.d_model, config.layers
        self.embedding = weight(rngs, (V, M), ("vocab", "embed"), fan_in=M)
        architecture = self.architecture = config.architecture
        block = ParallelBlock if architecture.fixed.parallel else SequentialBlock
        make_layers = nnx.vmap(lambda layer_rngs: block(config, rngs=layer_rngs))
        self.layers = make_layers(rngs.split(L))
        self.final_norm = None if architecture.fixed.parallel else norm_scale(M, "embed", architecture)
        self.head = None if architecture.tied_head else weight(rngs, (V, M), ("vocab", "embed"), fan_in=M)
        self.dtype = jnp.dtype(config.dtype)
        self.depth = L
        self.head_width, self.rope_base = config.head_width, config.rope_base
        self.remat, self.scan_layers, self.loss_chunk = config.remat, config.scan_layers, config.loss_chunk

    def __call__(
        self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None, *, train: bool = False, measure: bool = False
    ) -> tuple[jax.Array, Metrics]:
        """Logits of the next token and metrics; the arguments are those of `hidden`."""
        x_BTM, metrics = self.hidden(tokens_BT, segments_BT, train=train, measure=measure)
        return self.logits(x_BTM), metrics

    def hidden(
        self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None, *, train: bool = False, measure: bool = False
    ) -> tuple[jax.Array, Metrics]:
        """The normalised last hidden state [B, T, M] and the attention metrics; where devices share windows, the state
        of this one's part of them.

        Args:
          tokens_BT: int32 ids.
          segments_BT: int32 document of every token, default one document a row; negative marks padding.
            Attention stays within a document.
          train: moves the running variance of an adaptive k rule, in this module's own state.
          measure: adds the metrics that need attention probabilities, which costs about as much as dense attention.

        Returns:
          The state in `config.dtype`, and the metrics of `Attention` as float32 scalars, each a mean over
          layers.
        """
        if segments_BT is None:
            segments_BT = jnp.zeros(tokens_BT.shape, jnp.int32)
        if segments_BT.shape != tokens_BT.shape:
            raise ValueError(f"segments of shape {segments_BT.shape} must be {tokens_BT.shape} like tokens")
        # Of rotary positions only differences within a document matter.
        views = self._views(sharding.own(jnp.arange(tokens_BT.shape[1])[None]))
        x_BTM, metrics = self._apply_layers(self._embed(sharding.own(tokens_BT)), segments_BT, views, train, measure)
        return self._normalise(x_BTM), metrics

    def init_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` rows of at most `capacity` tokens, in `config.dtype`."""
        layers = tuple(block.attention.init_cache(batch, capacity, self.dtype) for block in self._blocks())
        return Cache(layers, jnp.zeros((batch,), jnp.int32))

    def extend(self, tokens_BC: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Reads C more tokens of every row: prefill, one token, or a block to verify.

        Every row is one document, and its new tokens follow its `cache.length` committed ones. They are
        written to the cache, but not committed: `cache.advance` does that, for as many of them as the caller
        keeps. Rows of ragged prompts are padded at the right and advanced by their own lengths. Together with
        the committed tokens of any row they must fit the capacity.

        Returns:
          Float32 logits [B, C, V], those that `__call__` gives at the same places, and the cache.

        Raises:
          ValueError: C exceeds the capacity.
        """
        C = tokens_BC.shape[1]
        if cache.capacity < C:
            raise ValueError(f"cache capacity={cache.capacity} must be at least the {C} tokens of an extension")
        position_BC = cache.positions(C)
        x_BCM, views, layers = self._embed(tokens_BC), self._views(position_BC), []
        for i, (block, layer) in enumerate(zip(self._blocks(), cache.layers, strict=True)):
            x_BCM, layer = block.extend(x_BCM, layer, position_BC, views[self.architecture.sight(i)])
            layers.append(layer)
        return self.logits(self._normalise(x_BCM)), cache._replace(layers=tuple(layers))

    def unstack(self) -> Decoder:
        """The same decoder with every layer's parameters in arrays of their own; it only extends.

        Decoding reads all parameters for every token: slices of stacked ones would first be copied.
        """
        decoder = nnx.clone(self)
        decoder.layers = nnx.List(self._blocks())
        decoder.scan_layers = False
        return decoder

    def logits(self, x_BTM: jax.Array, head_VM: jax.Array | None = None) -> jax.Array:
        """Float32 logits [B, T, V] of hidden states [B, T, M]; head: `whole_head()`, for who calls this in a loop."""
        B, T, M = x_BTM.shape
        head_MV = (self.whole_head() if head_VM is None else head_VM).astype(x_BTM.dtype).T
        logits_NV = jnp.matmul(x_BTM.reshape(B * T, M), head_MV, preferred_element_type=_at_least_float32(self.dtype))
        logits_NV = logits_NV / self.architecture.logit_scale
        if cap := self.architecture.logit_softcap:
            logits_NV = cap * jnp.tanh(logits_NV / cap)
        return logits_NV.reshape(B, T, -1)

    def whole_head(self) -> jax.Array:
        """The matrix [V, M] that gives the logits, gathered if it is split."""
        return self._table(self.embedding if self.head is None else self.head)

    def _table(self, parameter: nnx.Param) -> jax.Array:
        # In the parameter's own type, so that the gradients of a token's many places are added up in float32.
        return whole(parameter, self.dtype).astype(parameter[...].dtype)

    def _embed(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTM = self._table(self.embedding)[tokens_BT].astype(self.dtype)
        # The factor is rounded to the dtype first, as in the models that were trained so.
        a = self.architecture
        scale = x_BTM.shape[-1] ** 0.5 if a.fixed.gemma else a.embedding_scale
        return x_BTM * jnp.array(scale, self.dtype)

    def _normalise(self, x_BTM: jax.Array) -> jax.Array:
        if self.final_norm is None:
            return rms_norm(x_BTM, self.architecture.norm_epsilon)
        return scaled_norm(x_BTM, self.final_norm, self.architecture)

    def _views(self, positions_BT: jax.Array) -> dict[tuple[bool, bool], View]:
        """What layers see, by their `Architecture.sight`."""
        a, dtype = self.architecture, _at_least_float32(self.dtype)
        width = a.rotary_width or self.head_width
        far = make_rotation(positions_BT, width, self.rope_base, dtype, a.rope_scaling)
        near = make_rotation(positions_BT, width, a.window_rope_base, dtype) if a.window_rope_base else far
        none = Rotation(jnp.ones_like(far.cos), jnp.zeros_like(far.sin))
        sights = {a.sight(i) for i in range(self.depth)}
        # One body for all layers needs one kind of view; a window that is always the same is as quick as none.
        open_window = None if len(sights) == 1 else jnp.array(_NO_WINDOW, jnp.int32)
        return {
            (windowed, rotated): View(
                (near if windowed else far) if rotated else none,
                jnp.array(a.window, jnp.int32) if windowed else open_window,
            )
            for windowed, rotated in sights
        }

    def _apply_layers(
        self, x_BTM: jax.Array, segments_BT: jax.Array, views: dict[tuple[bool, bool], View], train: bool, measure: bool
    ) -> tuple[jax.Array, Metrics]:
        graphdef, params, state = nnx.split(self.layers, nnx.Param, ...)
        order = sorted(views)
        number_L = jnp.array([order.index(self.architecture.sight(i)) for i in range(self.depth)], jnp.int32)
        choose = _chooser([views[sight] for sight in order])

        def apply(x: jax.Array, layer: _LayerInputs):
            *variables, number = layer
            block = nnx.merge(graphdef, *variables)
            x, metrics = block(x, segments_BT, choose(number), train=train, measure=measure)
            return x, (metrics, block.attention.variance())

        step = _with_remat(apply, self.remat, self.scan_layers)
        run = jax.lax.scan if self.scan_layers else self._unroll
        x_BTM, (metrics_L, variance_L) = run(step, x_BTM, (params, state, number_L))
        if train and variance_L is not None:
            # A new variable, since the old one may belong to the caller's state, outside this trace.
            self.layers.attention.running_variance = RunningVariance(variance_L)
        return x_BTM, jax.tree.map(jnp.mean, metrics_L)

    def _unroll(self, step: _LayerStep, x: jax.Array, stacked: _LayerInputs):
        outputs = []
        for i in range(self.depth):
            x, output = step(x, jax.tree.map(lambda a, i=i: a[i], stacked))
            outputs.append(output)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    def _blocks(self) -> list[Block]:
        if isinstance(self.layers, nnx.List):
            return list(self.layers)
        graphdef, stacked = nnx.split(self.layers)
        return [nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], stacked)) for i in range(self.depth)]


def build(
    config: ModelConfig, read: Callable[[str, int | None, tuple[int, ...]], jax.Array], *, stacked: bool = True
) -> Decoder:
    """`Decoder(config)` with arrays from elsewhere.

    Args:
      read: (dotted name as in `array_shapes`, layer, shape) -> array; the layer is None where all are in one array.
      stacked: False gives what `unstack` does, without stacking first what would then be copied.
    """
    whole = lambda: Decoder(config, rngs=nnx.Rngs(0))  # noqa: E731
    graphdef, state = nnx.split(nnx.eval_shape(whole if stacked else lambda: whole().unstack()))
    filled = []
    for path, variable in nnx.to_flat_state(state):
        layer = next((part for part in path if isinstance(part, int)), None)
        name = ".".join(str(part) for part in path if part is not layer)
        filled.append((path, variable.replace(read(name, layer, variable.shape))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


@functools.cache
def array_shapes(config: ModelConfig, kind: type[nnx.Variable] = nnx.Variable) -> dict[str, tuple[int, ...]]:
    """The shapes of all variables of a kind in `Decoder(config)`, by dotted name, without building it."""
    state = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), kind)
    return {name: variable.shape for name, variable in named_variables(state).items()}


def named_variables(state: nnx.State) -> dict[str, nnx.Variable]:
    """The variables of a state by dotted name."""
    return {".".join(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}


def count_params(config: ModelConfig) -> dict[str, int]:
    """Parameters of `Decoder(config)`, without building it: {"total", "non_embedding"}.

    A dense model with as many key/value heads as heads has V·M + L·(4·M·H·E + 3·M·F + M), the formula behind
    the totals of ATLAS (arXiv 2510.22037, Table B.3): tied embeddings, gated feed-forward, one norm a layer,
    and no parameters in the final norm. It gives the table's totals exactly for scales 0 to 51; the table's
    own row 52 is off. `non_embedding` is the N of scaling laws; a head that is not tied is no part of it either.

    >>> count_params(ModelConfig(layers=1))
    {'total': 79936, 'non_embedding': 61504}
    """
    sizes = {name: math.prod(shape) for name, shape in array_shapes(config, nnx.Param).items()}
    total, embeddings = sum(sizes.values()), sizes["embedding"] + sizes.get("head", 0)
    return {"total": total, "non_embedding": total - embeddings}


def _chooser(views: list[View]) -> Callable[[jax.Array], View]:
    """The view of a layer by its number among those that differ between layers of one scanned body."""
    if len(views) == 1:
        return lambda _: views[0]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *views)
    return lambda number: jax.tree.map(lambda a: a[number], stacked)


def _at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _with_remat(step: _LayerStep, remat: str, scanned: bool) -> _LayerStep:
    policies = jax.checkpoint_policies
    if remat == "none" and not sharding.gathers():
        return step
    policy = {
        "none": lambda operation, *_, **__: operation.name not in _OF_WEIGHTS,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "full": policies.nothing_saveable,
    }[remat]
    # A scan's body is compiled apart from its surroundings, so nothing there could undo the recomputation.
    return jax.checkpoint(step, policy=policy, prevent_cse=not scanned)
