"""The gated lightning indexer of Gated Sparse Attention (arXiv 2601.15305, section 3.3): scores, and what trains them.

Scores and statistics are float32 (float64 if the inputs are), whatever the dtype of queries, keys and values.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention.keys import IndexInputs
from models.config import ModelConfig
from models.layers import Rotation, constant, linears, rotate, weight


class Indexer(nnx.Module):
    """Projections of the block's input [B, T, M] to `IndexInputs`.

    The first `indexer_rotary_width` entries of queries and keys are rotated like the heads, by every so many of their
    angles, as in DeepSeek-V3.2; the paper rotates none. The input is detached: training the indexer does not change
    what it reads.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        M, J, I = config.d_model, config.indexer_heads, config.indexer_width
        self.query = weight(rngs, (M, J, I), ("embed", "indexer", "head"), fan_in=M)
        self.key = weight(rngs, (M, I), ("embed", "head"), fan_in=M)
        self.gate = weight(rngs, (M, J), ("embed", "indexer"), fan_in=M)
        self.bias = constant((J,), ("indexer",), 0.0)
        self.rotary_width = config.indexer_rotary_width

    def __call__(self, x_BTM: jax.Array, rotation: Rotation) -> IndexInputs:
        x_BTM = jax.lax.stop_gradient(x_BTM)
        # Float32 from here on: rounded scores tie, and ties decide the selection.
        wide = jnp.promote_types(x_BTM.dtype, jnp.float32)
        query_BTJI, key_BSI, gate_BTJ = linears(x_BTM, self.query, self.key, self.gate, preferred_element_type=wide)
        if R := self.rotary_width:
            of_width = Rotation(*(a[..., :: 2 * a.shape[-1] // R] for a in rotation))
            query_BTJI, key_BSI = rotate(query_BTJI, of_width), rotate(key_BSI[:, :, None], of_width)[:, :, 0]
        return IndexInputs(query_BTJI, key_BSI, jax.nn.sigmoid(gate_BTJ), self.bias[...])


def index_scores(index: IndexInputs, scale: float) -> jax.Array:
    """The indexer's scores [B, T, S], each in (0, J).

    I[t, s] = Σ_j gate[t, j] · sigmoid(scale · query[t, j]·key[s] + bias[j]). The paper has no scale.
    """
    accumulate = jnp.promote_types(index.query.dtype, jnp.float32)
    B, T, J, I = index.query.shape
    # One product of matrices a row, which XLA's backward on CPUs does in half the time of the equivalent einsum.
    query_BNI = (index.query * scale).reshape(B, T * J, I)
    dots_BNS = jnp.matmul(query_BNI, index.key.swapaxes(1, 2), preferred_element_type=accumulate)
    open_BTJS = jax.nn.sigmoid(dots_BNS.reshape(B, T, J, -1) + index.bias[:, None])
    # Selection compares a score with a threshold that it set itself, so both must be the same bits. With an elementwise
    # last operation they were seen to differ where XLA compiles without optimisations; with this product never.
    return jnp.einsum("btj,btjs->bts", index.gate.astype(accumulate), open_BTJS)


def score_variance(scores_BTS: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """Population variance of every query's scores over the positions it sees; [B, T]."""
    n_BT = jnp.maximum(jnp.sum(visible_BTS, axis=-1), 1)
    mean_BT = jnp.sum(jnp.where(visible_BTS, scores_BTS, 0), axis=-1) / n_BT
    deviation_BTS = jnp.where(visible_BTS, scores_BTS - mean_BT[..., None], 0)
    return jnp.sum(jnp.square(deviation_BTS), axis=-1) / n_BT


def head_mean(p_BHTS: jax.Array) -> jax.Array:
    """Attention averaged over heads, [B, T, S]: what the indexer learns. Plane by plane is quicker on CPUs."""
    return functools.reduce(jnp.add, [p_BHTS[:, h] for h in range(p_BHTS.shape[1])]) / p_BHTS.shape[1]


def divergence(target_BTS: jax.Array, logits_BTS: jax.Array, normaliser_BT: jax.Array) -> jax.Array:
    """KL(target ‖ softmax of the logits over the selected set) of every query, or a part of its sum; nats [B, T].

    The recipe is that of DeepSeek-V3.2 (sparse stage), since GSA does not say how its indexer is trained. The logits
    are scores / temperature, an addition, because scores are bounded.

    Args:
      target_BTS: attention probabilities, zero outside the selected set.
      normaliser_BT: logarithm of the softmax's denominator.
    """
    # Target and prediction are close, so each term is small; their two sums apart would be large.
    log_ratio_BTS = jnp.log(jnp.where(target_BTS > 0, target_BTS, 1)) - (logits_BTS - normaliser_BT[..., None])
    return jnp.sum(target_BTS * log_ratio_BTS, axis=-1)
