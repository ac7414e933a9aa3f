"""The decoder: tied embeddings around a stack of parallel blocks."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import Attention, RunningVariance
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
        return x_BTM + y_BTM + self.feed_forward(n_BTM), metrics


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
        self.dtype = jnp.dtype(config.dtype)
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
        rotation = make_rotation(positions_BT, self.head_width, self.rope_base)
        x_BTM = self.embedding[...].astype(self.dtype)[tokens_BT]
        x_BTM, metrics = self._apply_layers(x_BTM, segments_BT, rotation, train)
        return rms_norm(x_BTM), metrics

    def logits(self, x_BTM: jax.Array) -> jax.Array:
        """Float32 logits [B, T, V] of hidden states [B, T, M]."""
        B, T, M = x_BTM.shape
        embedding_MV = self.embedding[...].astype(x_BTM.dtype).T
        logits_NV = jnp.matmul(x_BTM.reshape(B * T, M), embedding_MV, preferred_element_type=jnp.float32)
        return logits_NV.reshape(B, T, -1)

    def _apply_layers(
        self, x_BTM: jax.Array, segments_BT: jax.Array, rotation: Rotation, train: bool
    ) -> tuple[jax.Array, Metrics]:
        graphdef, params, state = nnx.split(self.layers, nnx.Param, ...)

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


def _with_remat(step: _LayerStep, remat: str, scanned: bool) -> _LayerStep:
    if remat == "none":
        return step
    policies = jax.checkpoint_policies
    policy = policies.dots_with_no_batch_dims_saveable if remat == "dots" else policies.nothing_saveable
    # A scan's body is compiled apart from its surroundings, so nothing there could undo the recomputation.
    return jax.checkpoint(step, policy=policy, prevent_cse=not scanned)
