"""Trained arrays as the start of another attention kind: gates and an indexer added to a model without them."""

import jax
import jax.numpy as jnp

from models.config import ModelConfig
from models.decoder import array_shapes

Arrays = dict[str, jax.Array]

_ATTENTION = "layers.attention."
_ADDED = tuple(_ATTENTION + part for part in ("output_gate.", "value_gate.", "indexer.", "running_variance"))
_GATED = {"output_gate": ("out",), "value_gate": ("value", "value_bias")}  # the projections that a gate multiplies


def can_become(trained: ModelConfig, wanted: ModelConfig) -> bool:
    """Whether a trained model has the arrays of another config, but for gates and indexers that are to be added.

    >>> can_become(ModelConfig(), ModelConfig(attention="gated_sparse"))
    True
    >>> can_become(ModelConfig(attention="gated"), ModelConfig())
    False
    """
    have, want = array_shapes(trained), array_shapes(wanted)
    return have.items() <= want.items() and all(name.startswith(_ADDED) for name in want.keys() - have.keys())


def become(trained: Arrays, fresh: Arrays) -> Arrays:
    """A model of another attention kind that computes what the trained one does, as long as every key is selected.

    Gates do not depend on their input yet: their weights are 0 and they are sigmoid(bias) everywhere, by which the
    projections that they multiply are divided. So they are open whatever the bias is, and need not be saturated, where
    they would not learn. The indexer is fresh, and has yet to learn what dense attention reads.

    Args:
      trained: parameters or parameters and buffers by dotted name, with any leading axes.
      fresh: those of a new model that `can_become` allows.
    """
    arrays = fresh | trained
    for gate, projections in _GATED.items():
        weight, bias = (f"{_ATTENTION}{gate}.{part}" for part in ("weight", "bias"))
        if weight in trained or weight not in fresh:
            continue
        arrays[weight] = jnp.zeros_like(fresh[weight])
        open_LHE = jax.nn.sigmoid(fresh[bias])
        for name in (_ATTENTION + part for part in projections if _ATTENTION + part in trained):
            # Heads and their width come last in what makes values, and before the width M in what reads heads.
            axis = {"out": -1, "value": -3}.get(name.removeprefix(_ATTENTION))
            arrays[name] = trained[name] / (open_LHE if axis is None else jnp.expand_dims(open_LHE, axis))
    return arrays
