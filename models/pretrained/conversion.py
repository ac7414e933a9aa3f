"""Gated sparse attention for a model that was trained with dense attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.attention.module import Attention, Gate
from models.config import ModelConfig
from models.decoder import Decoder


def to_gated_sparse(
    model: Decoder, config: ModelConfig, *, length: int, rngs: nnx.Rngs, **fields: Any
) -> tuple[Decoder, ModelConfig]:
    """The model with gates and an indexer (arXiv 2601.15305), ready for continued training.

    It computes what the dense model does, in windows of up to `length` tokens. Their every key is selected (k_rule
    "fixed" with k_base = length) until the returned config is given a smaller k. The gates do not depend on their
    input yet: their weights are 0 and they are sigmoid(gate_bias) everywhere, by which the projections that they
    multiply are divided. So they are open whatever the bias is, and need not be saturated, where they would not
    learn. Logits differ by rounding alone: tests hold them to 1e-5 of the largest logit in float32 and to 1e-6 in
    float64 (parameters are float32).

    Args:
      model: with dense attention, on all keys of a document.
      length: tokens of the windows to train on.
      rngs: initialises the indexer.
      fields: of the ModelConfig, for gates, indexer and selection. By default the indexer has a head for every
        four, at least two, of half their width, and `length` bounds k.

    Raises:
      ValueError: the attention is not dense, or has windows or a softcap.
    """
    if config.attention != "dense":
        raise ValueError(f"model.attention={config.attention!r} must be 'dense'")
    defaults = {
        "indexer_heads": max(2, config.heads // 4),
        "indexer_width": config.head_width // 2,
        "k_rule": "fixed",
        "k_base": length,
        "k_max": length,
    }
    converted_config = dataclasses.replace(config, attention="gated_sparse", **(defaults | fields))
    converted = Decoder(converted_config, rngs=rngs)
    nnx.update(converted, nnx.state(model, nnx.Param))
    _open_gates(converted.layers.attention)
    return converted, converted_config


def _open_gates(attention: Attention) -> None:
    """Makes the stacked gates constant, and undoes them in the projections that they multiply."""
    if attention.output_gate is not None:
        attention.out[...] /= _constant(attention.output_gate)[..., None]
    if attention.value_gate is not None:
        open_LGE = _constant(attention.value_gate)
        attention.value[...] /= open_LGE[:, None]
        if attention.value_bias is not None:
            attention.value_bias[...] /= open_LGE


def _constant(gate: Gate) -> jax.Array:
    """Removes the gate's dependence on its input; what it is then, [L, heads, width]."""
    gate.weight[...] = jnp.zeros_like(gate.weight[...])
    return jax.nn.sigmoid(gate.bias[...])
