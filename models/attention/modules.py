"""The attention block of the decoder: projections, gates and indexer around the functions of `reference`."""

from __future__ import annotations

import copy
import functools
import logging

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention import blocks, cache, reference, streamed
from models.attention.quality import selection_quality
from models.config import ModelConfig
from models.layers import Rotation, constant, linear, norm_scale, residual_gain, rotate, scaled_norm, weight

Metrics = dict[str, jax.Array]

_SINK = 0.3  # arXiv 2410.10781's threshold
_MEASURED_CHUNK = 128  # queries at a time when selections are measured

_log = logging.getLogger(__name__)


class RunningVariance(nnx.Variable):
    """Mean variance of the index scores over earlier training steps: a float32 scalar, 0 before the first."""


class Gate(nnx.Module):
    """sigmoid(x W + b), multiplied onto heads: [B, T, heads, width]; width 1 gates a head as a whole."""

    def __init__(self, config: ModelConfig, heads: int, width: int, axis: str, *, rngs: nnx.Rngs):
        M = config.d_model
        self.weight = weight(rngs, (M, heads, width), ("embed", axis, "head"), fan_in=M)
        self.bias = constant((heads, width), (axis, "head"), config.gate_bias)

    def __call__(self, x_BTM: jax.Array) -> jax.Array:
        logits_BTHE = linear(x_BTM, self.weight) + self.bias[...].astype(x_BTM.dtype)
        return jax.nn.sigmoid(logits_BTHE)


class Indexer(nnx.Module):
    """The gated lightning indexer (arXiv 2601.15305, section 3.3), without rotary positions.

    Its input is detached: training the indexer does not change what it reads.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        M, J, I = config.d_model, config.indexer_heads, config.indexer_width
        self.query = weight(rngs, (M, J, I), ("embed", "indexer", "head"), fan_in=M)
        self.key = weight(rngs, (M, I), ("embed", "head"), fan_in=M)
        self.gate = weight(rngs, (M, J), ("embed", "indexer"), fan_in=M)
        self.gate_bias = constant((J,), ("indexer",), 0.0) if config.indexer_gate_bias else None
        self.bias = constant((J,), ("indexer",), 0.0)

    def __call__(self, x_BTM: jax.Array) -> reference.IndexInputs:
        x_BTM = jax.lax.stop_gradient(x_BTM)
        # Float32 from here on: rounded scores tie, and ties decide the selection.
        project = functools.partial(linear, x_BTM, preferred_element_type=jnp.promote_types(x_BTM.dtype, jnp.float32))
        gate_BTJ = project(self.gate)
        if self.gate_bias is not None:
            gate_BTJ += self.gate_bias[...]
        return reference.IndexInputs(project(self.query), project(self.key), jax.nn.sigmoid(gate_BTJ), self.bias[...])


class Attention(nnx.Module):
    """Causal self-attention within documents, of any kind that `config.attention` names.

    Called with the normalised block input [B, T, M], segments int32 [B, T] (see `reference`), rotary tables and,
    in a layer with a window, its length in keys, it returns the output [B, T, M] and metrics: float32 scalars,
    each a mean over queries that are not padding.
      indexer_loss            KL of the indexer in nats (0 without an indexer)
      mean_k                  selected keys (sparse kinds)
      output_gate, value_gate mean of the gates (gated kinds, where configured)
    and, with measure=True, what needs probabilities, so that no training step computes it:
      first_token_attention   probability given to the document's first token, mean over heads; without the
                              queries at that token
      sink_rate               share of the heads that give the first token more than 0.3 on average
      first_token_selected    share of queries whose set holds the document's first token (sparse kinds)
    and, where single tokens are selected (see `models.attention.quality`):
      selection_recall        share of dense attention that falls on the selected keys
      selection_overlap       share of the selected keys that dense attention would choose

    With train=True an adaptive k rule also moves its running variance, which the next step will use.

    Under jit every path gives on many devices what it gives on one. Batches are split over any axis, heads and
    key/value heads by the sharding of their projections. To split the sequence, shard T of the input: XLA gathers
    keys, values and index keys, G·(2·E) + I numbers a token, and each device works on its own queries. That pays
    where all scores are computed at once (query_chunk=0); tiles follow one another, and are better split by batch
    and heads.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        M, H, G, E = config.d_model, config.heads, config.kv_heads, config.head_width
        self.query = weight(rngs, (M, H, E), ("embed", "heads", "head"), fan_in=M)
        self.key = weight(rngs, (M, G, E), ("embed", "kv_heads", "head"), fan_in=M)
        self.value = weight(rngs, (M, G, E), ("embed", "kv_heads", "head"), fan_in=M)
        self.out = weight(rngs, (H, E, M), ("heads", "head", "embed"), H * E, residual_gain(config))
        self.architecture = copy.deepcopy(config.architecture)
        fixed = config.architecture.fixed
        self.query_bias = constant((H, E), ("heads", "head"), 0.0) if fixed.qkv_bias else None
        self.key_bias = constant((G, E), ("kv_heads", "head"), 0.0) if fixed.qkv_bias else None
        self.value_bias = constant((G, E), ("kv_heads", "head"), 0.0) if fixed.qkv_bias else None
        self.query_norm = norm_scale(E, "head", config.architecture) if fixed.qk_norm else None
        self.key_norm = norm_scale(E, "head", config.architecture) if fixed.qk_norm else None
        self.value_gate = _value_gate(config, rngs)
        self.output_gate = _output_gate(config, rngs)
        self.indexer = Indexer(config, rngs=rngs) if config.is_sparse else None
        adaptive = config.is_sparse and config.k_rule != "fixed"
        self.running_variance = RunningVariance(jnp.zeros((), jnp.float32)) if adaptive else None
        self.variance_decay = config.variance_decay
        self.selection = _selection(config)
        self.block = config.block if config.is_sparse and config.selection == "block" else None
        self.chunk = config.query_chunk

    def __call__(
        self,
        x_BTM: jax.Array,
        segments_BT: jax.Array,
        rotation: Rotation,
        window: jax.Array | None = None,
        *,
        train: bool = False,
        measure: bool = False,
    ) -> tuple[jax.Array, Metrics]:
        q_BTHE, k_BSGE, v_BSGE, gate_BSGE = self._project(x_BTM, rotation)
        if self.indexer is None:
            o_BTHE, metrics = self._attend(q_BTHE, k_BSGE, v_BSGE, segments_BT, window, measure)
        else:
            index = self.indexer(x_BTM)
            o_BTHE, metrics = self._attend_selected(q_BTHE, k_BSGE, v_BSGE, index, segments_BT, train, measure)
            if measure and self.block is None:
                metrics |= self._measure(q_BTHE, k_BSGE, index, segments_BT)
        if gate_BSGE is not None:
            metrics["value_gate"] = _gate_mean(gate_BSGE, segments_BT >= 0)
        if self.output_gate is not None:
            gate_BTHE = self.output_gate(x_BTM)
            o_BTHE *= gate_BTHE
            metrics["output_gate"] = _gate_mean(gate_BTHE, segments_BT >= 0)
        return linear(o_BTHE, self.out, inputs=2), metrics

    def init_cache(self, batch: int, capacity: int, dtype: jnp.dtype) -> cache.LayerCache:
        """Empty slots for `batch` rows of at most `capacity` tokens."""
        G, E = self.key.shape[-2:]
        slots = (batch, capacity, G, E)
        layer = cache.LayerCache(jnp.zeros(slots, dtype), jnp.zeros(slots, dtype))
        if self.indexer is None:
            return layer
        index_slots = (batch, capacity, self.indexer.key.shape[-1])
        layer = layer._replace(index_key=jnp.zeros(index_slots, jnp.promote_types(dtype, jnp.float32)))
        if self.block is None:
            return layer
        blocks.check_block(self.block, capacity)
        entries = blocks.list_length(self.selection, capacity, block=self.block)
        return layer._replace(lists=jnp.full((batch, capacity // self.block, entries), -1, jnp.int32))

    def extend(
        self,
        x_BCM: jax.Array,
        layer: cache.LayerCache,
        position_BC: jax.Array,
        rotation: Rotation,
        window: jax.Array | None = None,
    ) -> tuple[jax.Array, cache.LayerCache]:
        """The output [B, C, M] at C more tokens of every row, and the slots with them written.

        Equal to the same rows of `__call__` on the whole text as one document, with a running variance that
        stands still.
        """
        q_BCHE, k_BCGE, v_BCGE, _ = self._project(x_BCM, rotation)
        start_B = position_BC[:, 0]
        layer = layer._replace(
            key=cache.write(layer.key, k_BCGE, start_B), value=cache.write(layer.value, v_BCGE, start_B)
        )
        if self.indexer is None:
            o_BCHE = cache.attend(q_BCHE, layer, position_BC, window, self.architecture.attention_softcap)
        else:
            index = self.indexer(x_BCM)
            layer = layer._replace(index_key=cache.write(layer.index_key, index.key, start_B))
            index = index._replace(key=layer.index_key)
            chosen_by = (position_BC, self._running(), self.selection)
            if self.block is None:
                o_BCHE = cache.attend_selected(q_BCHE, layer, index, *chosen_by)
            else:
                lists_BPA = blocks.extend_lists(layer.lists, index, *chosen_by, block=self.block)
                layer = layer._replace(lists=lists_BPA)
                slots = (layer.key, layer.value, lists_BPA)
                o_BCHE = blocks.attend_cached(q_BCHE, *slots, position_BC, block=self.block)
        if self.output_gate is not None:
            o_BCHE *= self.output_gate(x_BCM)
        return linear(o_BCHE, self.out, inputs=2), layer

    def _project(
        self, x_BTM: jax.Array, rotation: Rotation
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Rotated queries and keys, gated values, and the gate."""
        q_BTHE = rotate(self._heads(x_BTM, self.query, self.query_bias, self.query_norm), rotation)
        k_BTGE = rotate(self._heads(x_BTM, self.key, self.key_bias, self.key_norm), rotation)
        v_BTGE = self._heads(x_BTM, self.value, self.value_bias, None)
        if self.architecture.query_width:
            # `reference` divides by sqrt(E).
            q_BTHE *= (q_BTHE.shape[-1] / self.architecture.query_width) ** 0.5
        if self.value_gate is None:
            return q_BTHE, k_BTGE, v_BTGE, None
        gate_BTGE = self.value_gate(x_BTM)
        return q_BTHE, k_BTGE, v_BTGE * gate_BTGE, gate_BTGE

    def _heads(self, x_BTM: jax.Array, w: nnx.Param, bias: nnx.Param | None, norm: nnx.Param | None) -> jax.Array:
        y_BTHE = linear(x_BTM, w)
        if bias is not None:
            y_BTHE += bias[...].astype(y_BTHE.dtype)
        return y_BTHE if norm is None else scaled_norm(y_BTHE, norm, self.architecture)

    def _attend(
        self,
        q_BTHE: jax.Array,
        k_BSGE: jax.Array,
        v_BSGE: jax.Array,
        segments_BT: jax.Array,
        window: jax.Array | None,
        measure: bool,
    ) -> tuple[jax.Array, Metrics]:
        if self.chunk:
            _log.info("dense attention in tiles of %d queries", self.chunk)
            o_BTHE, first_BTH = streamed.attend(q_BTHE, k_BSGE, v_BSGE, segments_BT, chunk=self.chunk)
        else:
            _log.info("dense attention at once")
            mask_BTS = reference.visible_mask(segments_BT, window)
            softcap = self.architecture.attention_softcap
            o_BTHE, p_BGRTS = reference.attend(q_BTHE, k_BSGE, v_BSGE, mask_BTS, softcap)
            first_BTH = reference.first_token_probability(p_BGRTS, segments_BT)
        metrics = {"indexer_loss": jnp.zeros((), jnp.float32)}
        return o_BTHE, metrics | (_first_token_metrics(first_BTH, segments_BT) if measure else {})

    def _attend_selected(
        self,
        q_BTHE: jax.Array,
        k_BSGE: jax.Array,
        v_BSGE: jax.Array,
        index: reference.IndexInputs,
        segments_BT: jax.Array,
        train: bool,
        measure: bool,
    ) -> tuple[jax.Array, Metrics]:
        running = self._running()
        arguments = (q_BTHE, k_BSGE, v_BSGE, index, segments_BT, running, self.selection)
        if self.block is not None:
            _log.info("attention to selected blocks of %d keys", self.block)
            o_BTHE, statistics = blocks.block_attention(*arguments, block=self.block)
        elif self.chunk:
            _log.info("attention to selected tokens in tiles of %d queries", self.chunk)
            o_BTHE, statistics = streamed.sparse_attention(*arguments, chunk=self.chunk)
        else:
            _log.info("attention to selected tokens at once")
            o_BTHE, statistics = reference.sparse_attention(*arguments)
        if train and self.running_variance is not None:
            self.running_variance[...] = self._next_variance(running, statistics.variance, segments_BT)
        valid_BT = segments_BT >= 0
        metrics = {
            "indexer_loss": _mean(statistics.indexer_loss, valid_BT),
            "mean_k": _mean(statistics.selected, valid_BT),
        }
        if measure:
            metrics |= _first_token_metrics(statistics.first_token, segments_BT, statistics.first_token_selected)
        return o_BTHE, metrics

    def _measure(
        self, q_BTHE: jax.Array, k_BSGE: jax.Array, index: reference.IndexInputs, segments_BT: jax.Array
    ) -> Metrics:
        chunk = self.chunk or _MEASURED_CHUNK
        quality = selection_quality(q_BTHE, k_BSGE, index, segments_BT, self._running(), self.selection, chunk=chunk)
        return {f"selection_{name}": _mean(value, segments_BT >= 0) for name, value in quality._asdict().items()}

    def variance(self) -> jax.Array | None:
        """The running variance, if this attention keeps one."""
        return None if self.running_variance is None else self.running_variance[...]

    def _running(self) -> jax.Array:
        return jnp.zeros(()) if self.running_variance is None else self.running_variance[...]

    def _next_variance(self, running: jax.Array, variance_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
        # The first token of a document sees one score, whose variance says nothing.
        counted_BT = (segments_BT >= 0) & ~reference.document_start(segments_BT)
        if self.block is not None:
            counted_BT = blocks.counts_variance(segments_BT, block=self.block)
        now = jax.lax.stop_gradient(_mean(variance_BT, counted_BT))
        moved = running + (1 - self.variance_decay) * (now - running)
        return jnp.where(jnp.any(counted_BT), jnp.where(running > 0, moved, now), running)


def _value_gate(config: ModelConfig, rngs: nnx.Rngs) -> Gate | None:
    if not config.is_gated or config.value_gate == "none":
        return None
    return Gate(config, config.kv_heads, config.head_width, "kv_heads", rngs=rngs)


def _output_gate(config: ModelConfig, rngs: nnx.Rngs) -> Gate | None:
    if not config.is_gated or config.output_gate == "none":
        return None
    width = config.head_width if config.output_gate == "elementwise" else 1
    return Gate(config, config.heads, width, "heads", rngs=rngs)


def _selection(config: ModelConfig) -> reference.Selection:
    return reference.Selection(
        scale=config.indexer_scale or config.indexer_width**-0.5,
        temperature=config.indexer_temperature,
        k_rule=config.k_rule,
        k_base=config.k_base,
        k_min=config.k_min,
        k_max=config.k_max,
        keep_first=config.keep_first,
        keep_local=config.keep_local,
    )


def _mean(value_BT: jax.Array, counted_BT: jax.Array) -> jax.Array:
    # Flags and whole numbers too: only float64 stays what it is.
    dtype = value_BT.dtype if value_BT.dtype == jnp.float64 else jnp.float32
    total = jnp.sum(jnp.where(counted_BT, value_BT, 0).astype(dtype))
    return total / jnp.maximum(jnp.sum(counted_BT), 1)


def _gate_mean(gate_BTHE: jax.Array, valid_BT: jax.Array) -> jax.Array:
    gate_BTHE = jax.lax.stop_gradient(gate_BTHE)
    return _mean(jnp.mean(gate_BTHE, axis=(2, 3), dtype=jnp.float32), valid_BT)


def _first_token_metrics(first_BTH: jax.Array, segments_BT: jax.Array, selected_BT: jax.Array | None = None) -> Metrics:
    """As in arXiv 2505.06708 (Table 4), per document; a token that is not selected has probability 0."""
    counted_BT = (segments_BT >= 0) & ~reference.document_start(segments_BT)
    per_head_H = jax.vmap(_mean, in_axes=(2, None))(first_BTH, counted_BT)
    metrics = {
        "first_token_attention": jnp.mean(per_head_H),
        "sink_rate": jnp.mean(per_head_H > _SINK, dtype=jnp.float32),
    }
    if selected_BT is not None:
        metrics["first_token_selected"] = _mean(selected_BT, counted_BT)
    return metrics
