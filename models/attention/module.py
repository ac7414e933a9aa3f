"""The attention block of the decoder: projections and gates around what the package's functions attend to."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from checked import UserError
from models import sharding
from models.attention import cache, fused, kinds, oracle, streamed
from models.attention import measure as measuring
from models.attention.indexer import Indexer
from models.attention.keys import Attended, Reads, Selection, document_start, in_documents, in_window
from models.attention.measure import Measured
from models.attention.selection import list_length
from models.config import ModelConfig
from models.layers import Rotation, constant, linear, norm_scale, residual_gain, rotate, scaled_norm, weight

Metrics = dict[str, jax.Array]

_SINK = 0.3  # arXiv 2410.10781's threshold


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


class Attention(nnx.Module):
    """Causal self-attention within documents, of any kind that `config.attention` names.

    Called with the normalised block input [B, T, M], segments int32 [B, T] (see `keys`), rotary tables and,
    in a layer with a window, its length in keys, it returns the output [B, T, M] and metrics: float32 scalars,
    each a mean over queries that are not padding.
      indexer_loss            KL of the indexer in nats (0 without an indexer)
      mean_k                  selected keys (sparse kinds)
      output_gate, value_gate mean of the gates (gated kinds, where configured)
    and, with measure=True, what needs probabilities, so that no training step computes it (see `measure`):
      first_token_attention   probability given to the document's first token, mean over heads; without the
                              queries at that token
      sink_rate               share of the heads that give the first token more than 0.3 on average
      first_token_selected    share of queries whose set holds the document's first token (sparse kinds)
      selection_recall        share of dense attention that falls on the selected keys (sparse kinds)
      selection_overlap       share of the selected keys that dense attention would choose (sparse kinds)

    With train=True an adaptive k rule also moves its running variance, which the next step will use.

    Under jit every path gives on many devices what it gives on one. Batches are split over any axis, heads and
    key/value heads by the sharding of their projections. Where devices share windows (see `sharding`), the input is
    this one's part of them, and the segments are whole; keys, values and index keys are gathered, G·(2·E) + I numbers a
    token.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        M, H, G, E = config.d_model, config.heads, config.kv_heads, config.head_width
        self.query = weight(rngs, (M, H, E), ("embed", "heads", "head"), fan_in=M)
        self.key = weight(rngs, (M, G, E), ("embed", "kv_heads", "head"), fan_in=M)
        self.value = weight(rngs, (M, G, E), ("embed", "kv_heads", "head"), fan_in=M)
        self.out = weight(rngs, (H, E, M), ("heads", "head", "embed"), H * E, residual_gain(config))
        self.architecture = config.architecture
        fixed = config.architecture.fixed
        all_bias = config.architecture.attention_bias
        has_bias = fixed.qkv_bias or all_bias
        bias = lambda heads, axis: constant((heads, E), (axis, "head"), 0.0) if has_bias else None  # noqa: E731
        self.query_bias, self.key_bias, self.value_bias = bias(H, "heads"), bias(G, "kv_heads"), bias(G, "kv_heads")
        self.out_bias = constant((M,), ("embed",), 0.0) if all_bias else None
        whole = fixed.qk_norm == "whole"  # or else of every head
        query_norm, key_norm = ((H * E, "heads"), (G * E, "kv_heads")) if whole else ((E, "head"), (E, "head"))
        self.query_norm = norm_scale(*query_norm, config.architecture) if fixed.qk_norm else None
        self.key_norm = norm_scale(*key_norm, config.architecture) if fixed.qk_norm else None
        gate = functools.partial(Gate, config, rngs=rngs)
        width = E if config.output_gate == "elementwise" else 1
        self.value_gate = gate(G, E, "kv_heads") if config.is_gated and config.value_gate != "none" else None
        self.output_gate = gate(H, width, "heads") if config.is_gated and config.output_gate != "none" else None
        self.indexer = Indexer(config, rngs=rngs) if config.is_sparse else None
        adaptive = config.is_sparse and config.k_rule != "fixed"
        self.running_variance = RunningVariance(jnp.zeros((), jnp.float32)) if adaptive else None
        self.variance_decay = config.variance_decay
        self.selection = _selection(config) if config.is_sparse else None
        self.chunk = config.query_chunk
        self.kind = config.attention

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
        q_BTHE, k_BSGE, v_BSGE, gate_BTGE = self._project(x_BTM, rotation)
        valid_BT, document = sharding.own(segments_BT >= 0), jax.tree.map(sharding.own, in_documents(segments_BT))
        reads = self._reads(x_BTM, in_window(document, window), rotation)
        if reads.index is not None:
            reads = reads._replace(index=reads.index._replace(key=sharding.across(reads.index.key)))
        k_BSGE, v_BSGE = sharding.across(k_BSGE), sharding.across(v_BSGE)
        attended = self._attend(q_BTHE, k_BSGE, v_BSGE, reads, window)
        metrics = {"indexer_loss": jnp.zeros((), jnp.float32)}
        if self.selection is not None:
            of_selection = {"indexer_loss": attended.indexer_loss, "mean_k": attended.selected}
            metrics = {name: _mean(value_BT, valid_BT) for name, value_BT in of_selection.items()}
        if train and self.running_variance is not None:
            self.running_variance[...] = self._next_variance(attended.variance, segments_BT)
        if measure and kinds.added(self.kind) is None:
            softcap = self.architecture.attention_softcap
            measured = measuring.measure(q_BTHE, k_BSGE, reads, document.first, self.selection, softcap)
            metrics |= _measured_metrics(measured, valid_BT, valid_BT & (document.position > document.first))
        if gate_BTGE is not None:
            metrics["value_gate"] = _gate_mean(gate_BTGE, valid_BT)
        o_BTHE = attended.output
        if self.output_gate is not None:
            gate_BTHE = self.output_gate(x_BTM)
            o_BTHE *= gate_BTHE
            metrics["output_gate"] = _gate_mean(gate_BTHE, valid_BT)
        return self._output(o_BTHE), metrics

    def init_cache(self, batch: int, capacity: int, dtype: jnp.dtype) -> cache.LayerCache:
        """Empty slots for `batch` rows of at most `capacity` tokens."""
        G, E = self.key.shape[-2:]
        slots = (batch, capacity, G, E)
        layer = cache.LayerCache(jnp.zeros(slots, dtype), jnp.zeros(slots, dtype))
        if self.indexer is None:
            return layer
        index_slots = (batch, capacity, self.indexer.key.shape[-1])
        layer = layer._replace(index_key=jnp.zeros(index_slots, jnp.promote_types(dtype, jnp.float32)))
        if not self.selection.block:
            return layer
        if capacity % self.selection.block:
            raise ValueError(f"block={self.selection.block} must divide the cache's capacity of {capacity}")
        lists = (batch, capacity // self.selection.block, list_length(self.selection, capacity))
        return layer._replace(lists=jnp.full(lists, -1, jnp.int32))

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
        stands still. Raises UserError for a kind that was added, of which no cache knows.
        """
        if kinds.added(self.kind):
            raise UserError(f"models of attention={self.kind!r} are not decoded")
        q_BCHE, k_BCGE, v_BCGE, _ = self._project(x_BCM, rotation)
        write = functools.partial(cache.write, start_B=position_BC[:, 0])
        layer = layer._replace(key=write(layer.key, k_BCGE), value=write(layer.value, v_BCGE))
        reads = self._reads(x_BCM, in_window(Reads(position_BC, jnp.zeros_like(position_BC)), window), rotation)
        if reads.index is not None:
            layer = layer._replace(index_key=write(layer.index_key, reads.index.key))
            reads = reads._replace(index=reads.index._replace(key=layer.index_key))
        o_BCHE, layer = cache.attend(q_BCHE, layer, reads, self.selection, self.architecture.attention_softcap)
        if self.output_gate is not None:
            o_BCHE *= self.output_gate(x_BCM)
        return self._output(o_BCHE), layer

    def _project(
        self, x_BTM: jax.Array, rotation: Rotation
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
        """Rotated queries and keys, gated values, and the gate."""
        q_BTHE = rotate(self._heads(x_BTM, self.query, self.query_bias, self.query_norm), rotation)
        k_BTGE = rotate(self._heads(x_BTM, self.key, self.key_bias, self.key_norm), rotation)
        v_BTGE = self._heads(x_BTM, self.value, self.value_bias, None)
        if self.architecture.query_width:
            # Attention divides by sqrt(E).
            q_BTHE *= (q_BTHE.shape[-1] / self.architecture.query_width) ** 0.5
        if self.value_gate is None:
            return q_BTHE, k_BTGE, v_BTGE, None
        gate_BTGE = self.value_gate(x_BTM)
        return q_BTHE, k_BTGE, v_BTGE * gate_BTGE, gate_BTGE

    def _heads(self, x_BTM: jax.Array, w: nnx.Param, bias: nnx.Param | None, norm: nnx.Param | None) -> jax.Array:
        y_BTHE = linear(x_BTM, w)
        if bias is not None:
            y_BTHE += bias[...].astype(y_BTHE.dtype)
        if norm is None:
            return y_BTHE
        whole = self.architecture.fixed.qk_norm == "whole"
        y_BTx = y_BTHE.reshape(*y_BTHE.shape[:2], -1) if whole else y_BTHE
        return scaled_norm(y_BTx, norm, self.architecture).reshape(y_BTHE.shape)

    def _output(self, o_BTHE: jax.Array) -> jax.Array:
        y_BTM = linear(o_BTHE, self.out, inputs=2)
        return y_BTM if self.out_bias is None else y_BTM + self.out_bias[...].astype(y_BTM.dtype)

    def _reads(self, x_BTM: jax.Array, reads: Reads, rotation: Rotation) -> Reads:
        """With what the indexer says of the input, if there is one."""
        if self.indexer is None:
            return reads
        running = jnp.zeros(()) if self.running_variance is None else self.running_variance[...]
        return reads._replace(index=self.indexer(x_BTM, rotation), running_variance=running)

    def _attend(
        self, q_BTHE: jax.Array, k_BSGE: jax.Array, v_BSGE: jax.Array, reads: Reads, window: jax.Array | None
    ) -> Attended:
        if own := kinds.added(self.kind):
            return own(q_BTHE, k_BSGE, v_BSGE, reads)
        # Layers of one scanned body differ in a window, which the kernels want to know beforehand.
        attend = fused.kernel(q_BTHE, self.selection, self.architecture.attention_softcap) if window is None else None
        if attend is not None:
            return attend(q_BTHE, k_BSGE, v_BSGE, reads)
        if self.chunk or (self.selection is not None and self.selection.block):
            return streamed.attend(q_BTHE, k_BSGE, v_BSGE, reads, self.selection, chunk=self.chunk)
        return oracle.attend(q_BTHE, k_BSGE, v_BSGE, reads, self.selection, self.architecture.attention_softcap)

    def variance(self) -> jax.Array | None:
        """The running variance, if this attention keeps one."""
        return None if self.running_variance is None else self.running_variance[...]

    def _next_variance(self, variance_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
        counted_BT = self._counted(segments_BT)
        running = self.running_variance[...]
        now = jax.lax.stop_gradient(_mean(variance_BT, counted_BT))
        moved = running + (1 - self.variance_decay) * (now - running)
        return jnp.where(self.variance_weight(segments_BT) > 0, jnp.where(running > 0, moved, now), running)

    def _counted(self, segments_BT: jax.Array) -> jax.Array:
        # The first token of a document sees one score, whose variance says nothing.
        counted_BT = (segments_BT >= 0) & ~document_start(segments_BT)
        if self.selection is not None and self.selection.block:
            # The list of a tile rests on its first query.
            counted_BT &= jnp.arange(segments_BT.shape[1]) % self.selection.block == 0
        return sharding.own(counted_BT)

    def variance_weight(self, segments_BT: jax.Array) -> jax.Array:
        """Of how many queries a running variance takes the mean, over the devices that share the batch."""
        return sharding.total(jnp.sum(self._counted(segments_BT)))


def _selection(config: ModelConfig) -> Selection:
    scale = config.indexer_scale or config.indexer_width**-0.5
    block = config.block if config.selection == "block" else 0
    same = {name: getattr(config, name) for name in ("k_rule", "k_base", "k_min", "k_max", "keep_first")}
    local = int(config.local_share * config.k_base)
    return Selection(scale, config.indexer_temperature, keep_local=local, block=block, **same)


def _mean(value_BT: jax.Array, counted_BT: jax.Array) -> jax.Array:
    # Flags and whole numbers too: only float64 stays what it is.
    dtype = value_BT.dtype if value_BT.dtype == jnp.float64 else jnp.float32
    sum_ = sharding.total(jnp.sum(jnp.where(counted_BT, value_BT, 0).astype(dtype)))
    return sum_ / jnp.maximum(sharding.total(jnp.sum(counted_BT)), 1)


def _gate_mean(gate_BTHE: jax.Array, valid_BT: jax.Array) -> jax.Array:
    gate_BTHE = jax.lax.stop_gradient(gate_BTHE)
    return _mean(jnp.mean(gate_BTHE, axis=(2, 3), dtype=jnp.float32), valid_BT)


def _measured_metrics(measured: Measured, valid_BT: jax.Array, later_BT: jax.Array) -> Metrics:
    """The first token's as in arXiv 2505.06708 (Table 4), per document; not selected, it has probability 0."""
    per_head_H = jax.vmap(_mean, in_axes=(2, None))(measured.first_token, later_BT)
    metrics = {
        "first_token_attention": jnp.mean(per_head_H),
        "sink_rate": jnp.mean(per_head_H > _SINK, dtype=jnp.float32),
    }
    if measured.recall is None:
        return metrics
    return metrics | {
        "first_token_selected": _mean(measured.first_token_selected, later_BT),
        "selection_recall": _mean(measured.recall, valid_BT),
        "selection_overlap": _mean(measured.overlap, valid_BT),
    }
