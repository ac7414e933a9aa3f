"""The decoder: tied embeddings around a stack of parallel blocks."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import Attention, RunningVariance
from models.attention.cache import Cache, LayerCache
from models.attention.modules import Metrics
from models.config import ModelConfig
from models.layers import FeedForward, Rotation, constant, make_rotation, rms_norm, weight

_LayerState = nnx.State
_LayerStep = Callable[[tuple[_LayerState, _LayerState], jax.Array], tuple[jax.Array, tuple[Metrics, _LayerState]]]


class Block(nnx.Module):
    """x + attention(n) + feed_forward(n), where n = scale · RMSNorm(x).

    Attention and feed-forward read the same normalised input, because the parameter totals of ATLAS have
    exactly one norm vector a layer (see `models.config.count_params`); two blocks in sequence would need two.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.norm = constant((config.d_model,), ("embed",), 1.0)
        self.attention = Attention(config, rngs=rngs)
        self.feed_forward = FeedForward(config, rngs=rngs)

    def __call__(
        self, x_BTM: jax.Array, segments_BT: jax.Array, rotation: Rotation, *, train: bool = False
    ) -> tuple[jax.Array, Metrics]:
        n_BTM = rms_norm(x_BTM) * self.norm[...].astype(x_BTM.dtype)
        y_BTM, metrics = self.attention(n_BTM, segments_BT, rotation, train=train)
        x_BTM = x_BTM + y_BTM + self.feed_forward(n_BTM)
        largest = jnp.max(jnp.abs(jax.lax.stop_gradient(x_BTM)), initial=0, where=(segments_BT >= 0)[..., None])
        return x_BTM, metrics | {"largest_activation": largest.astype(jnp.float32)}

    def extend(
        self, x_BCM: jax.Array, layer: LayerCache, position_BC: jax.Array, rotation: Rotation
    ) -> tuple[jax.Array, LayerCache]:
        """The block's output for C more tokens of every row, and its cache with them written."""
        n_BCM = rms_norm(x_BCM) * self.norm[...].astype(x_BCM.dtype)
        y_BCM, layer = self.attention.extend(n_BCM, layer, position_BC, rotation)
        return x_BCM + y_BCM + self.feed_forward(n_BCM), layer


class Decoder(nnx.Module):
    """A causal language model: token ids [B, T] to float32 logits [B, T, V].

    Parameters are float32; `config.dtype` is that of activations. Every parameter names its dimensions in its
    metadata `axes`. Parameters of the L layers are stacked along a first dimension that `axes` does not name.
    Initial values are truncated normal with deviation 1/sqrt(fan in); the projections that write to the
    residual stream have 1/sqrt(2·L) of that; embeddings have 1/sqrt(M), so that initial logits have a
    variance of about 1.

    Raises:
      ValueError: the config is not valid (see `ModelConfig.validate`).

    >>> model = Decoder(ModelConfig(layers=1), rngs=nnx.Rngs(0))
    >>> logits, metrics = model(jnp.zeros((2, 8), jnp.int32))
    >>> logits.shape
    (2, 8, 288)
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        config.validate()
        V, M, L = config.vocab_size, config.d_model, config.layers
        self.embedding = weight(rngs, (V, M), ("vocab", "embed"), fan_in=M)
        make_layers = nnx.vmap(lambda layer_rngs: Block(config, rngs=layer_rngs))
        self.layers = make_layers(rngs.split(L))
        self.dtype = _supported(config.dtype)
        self.depth = L
        self.head_width, self.rope_base = config.head_width, config.rope_base
        self.remat, self.scan_layers, self.loss_chunk = config.remat, config.scan_layers, config.loss_chunk

    def __call__(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> tuple[jax.Array, Metrics]:
        """Logits of the next token and metrics; the arguments are those of `hidden`."""
        x_BTM, metrics = self.hidden(tokens_BT, segments_BT, positions_BT, train=train)
        return self.logits(x_BTM), metrics

    def hidden(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> tuple[jax.Array, Metrics]:
        """The normalised last hidden state [B, T, M] and the attention metrics.

        Args:
          tokens_BT: int32 ids.
          segments_BT: int32 document of every token, default one document a row; negative marks padding.
            Attention stays within a document.
          positions_BT: int32 rotary positions [B or 1, T], default 0 to T-1. Only differences within a
            document matter.
          train: moves the running variance of an adaptive k rule, in this module's own state.

        Returns:
          The state in `config.dtype`, and the metrics of `Attention` as float32 scalars, each a mean over
          layers.
        """
        if segments_BT is None:
            segments_BT = jnp.zeros(tokens_BT.shape, jnp.int32)
        if segments_BT.shape != tokens_BT.shape:
            raise ValueError(f"segments of shape {segments_BT.shape} must be {tokens_BT.shape} like tokens")
        if positions_BT is None:
            positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        rotation = make_rotation(positions_BT, self.head_width, self.rope_base, _at_least_float32(self.dtype))
        x_BTM = self.embedding[...].astype(self.dtype)[tokens_BT]
        x_BTM, metrics = self._apply_layers(x_BTM, segments_BT, rotation, train)
        return rms_norm(x_BTM), metrics

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
        rotation = make_rotation(position_BC, self.head_width, self.rope_base, _at_least_float32(self.dtype))
        x_BCM = self.embedding[...].astype(self.dtype)[tokens_BC]
        layers = []
        for block, layer in zip(self._blocks(), cache.layers, strict=True):
            x_BCM, layer = block.extend(x_BCM, layer, position_BC, rotation)
            layers.append(layer)
        return self.logits(rms_norm(x_BCM)), cache._replace(layers=tuple(layers))

    def unstack(self) -> Decoder:
        """The same decoder with every layer's parameters in arrays of their own.

        Decoding reads all parameters for every token: slices of stacked ones would first be copied.
        """
        decoder = nnx.clone(self)
        decoder.layers = nnx.List(self._blocks())
        decoder.scan_layers = False
        return decoder

    def logits(self, x_BTM: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V] of hidden states [B, T, M]."""
        B, T, M = x_BTM.shape
        embedding_MV = self.embedding[...].astype(x_BTM.dtype).T
        logits_NV = jnp.matmul(
            x_BTM.reshape(B * T, M), embedding_MV, preferred_element_type=_at_least_float32(self.dtype)
        )
        return logits_NV.reshape(B, T, -1)

    def _apply_layers(
        self, x_BTM: jax.Array, segments_BT: jax.Array, rotation: Rotation, train: bool
    ) -> tuple[jax.Array, Metrics]:
        graphdef, params, state = nnx.split(self._stacked(), nnx.Param, ...)

        def apply(x: jax.Array, layer: tuple[_LayerState, _LayerState]):
            block = nnx.merge(graphdef, *layer)
            x, metrics = block(x, segments_BT, rotation, train=train)
            return x, (metrics, block.attention.variance())

        step = _with_remat(apply, self.remat, self.scan_layers)
        run = jax.lax.scan if self.scan_layers else self._unroll
        x_BTM, (metrics_L, variance_L) = run(step, x_BTM, (params, state))
        if train and variance_L is not None:
            # A new variable, since the old one may belong to the caller's state, outside this trace.
            self.layers.attention.running_variance = RunningVariance(variance_L)
        return x_BTM, jax.tree.map(jnp.mean, metrics_L)

    def _unroll(self, step: _LayerStep, x: jax.Array, stacked: tuple[_LayerState, _LayerState]):
        outputs = []
        for i in range(self.depth):
            x, output = step(x, jax.tree.map(lambda a, i=i: a[i], stacked))
            outputs.append(output)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

    def _stacked(self) -> Block:
        if isinstance(self.layers, nnx.List):
            raise ValueError("an unstacked decoder only extends; call the decoder that it was made of")
        return self.layers

    def _blocks(self) -> list[Block]:
        if isinstance(self.layers, nnx.List):
            return list(self.layers)
        graphdef, stacked = nnx.split(self.layers)
        return [nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], stacked)) for i in range(self.depth)]


def _supported(dtype: str) -> jnp.dtype:
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"model.dtype={dtype!r} needs the flag jax_enable_x64")
    return jnp.dtype(dtype)


def _at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _with_remat(step: _LayerStep, remat: str, scanned: bool) -> _LayerStep:
    if remat == "none":
        return step
    policies = jax.checkpoint_policies
    policy = policies.dots_with_no_batch_dims_saveable if remat == "dots" else policies.nothing_saveable
    # A scan's body is compiled apart from its surroundings, so nothing there could undo the recomputation.
    return jax.checkpoint(step, policy=policy, prevent_cse=not scanned)
