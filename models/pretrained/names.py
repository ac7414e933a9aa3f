"""Where a parameter of the `Decoder` stands in the files of its family."""

import math
from typing import NamedTuple

import numpy as np


class Source(NamedTuple):
    """A tensor in a file.

    name: its name; those of a layer go without "model.layers.<i>.".
    inputs: torch stores a linear map as [out, in], and here its first `inputs` dimensions are the inputs; 0 is
      a bias or a scale, stored flat; None is stored as it is.
    fused: parameters that share the tensor, in order; each has some of its rows.
    """

    name: str
    inputs: int | None
    fused: tuple[str, ...] = ()

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the file of a parameter of a `shape`.

        >>> Source("o_proj.weight", 2).stored_shape((4, 8, 64))
        (64, 32)
        """
        if self.inputs is None:
            return shape
        outputs = math.prod(shape[self.inputs :])
        return (outputs, math.prod(shape[: self.inputs])) if self.inputs else (outputs,)

    def store(self, parameter: np.ndarray) -> np.ndarray:
        """The tensor in the file, contiguous."""
        if self.inputs is None:
            return np.ascontiguousarray(parameter)
        return np.ascontiguousarray(parameter.reshape(self.stored_shape(parameter.shape)[::-1]).T)


Names = dict[str, Source]

_LAYERS = "layers."
_QKV = tuple(f"layers.attention.{name}" for name in ("query", "key", "value"))
_GATE_UP = tuple(f"layers.feed_forward.{name}" for name in ("gate", "up"))

_COMMON: Names = {
    "embedding": Source("model.embed_tokens.weight", None),
    "final_norm": Source("model.norm.weight", 0),
    "head": Source("lm_head.weight", None),
    "layers.attention.query": Source("self_attn.q_proj.weight", 1),
    "layers.attention.key": Source("self_attn.k_proj.weight", 1),
    "layers.attention.value": Source("self_attn.v_proj.weight", 1),
    "layers.attention.out": Source("self_attn.o_proj.weight", 2),
    "layers.feed_forward.gate": Source("mlp.gate_proj.weight", 1),
    "layers.feed_forward.up": Source("mlp.up_proj.weight", 1),
    "layers.feed_forward.down": Source("mlp.down_proj.weight", 1),
    "layers.attention_norm": Source("input_layernorm.weight", 0),
}
_LLAMA = _COMMON | {"layers.feed_forward_norm": Source("post_attention_layernorm.weight", 0)}
_QKV_BIAS: Names = {
    "layers.attention.query_bias": Source("self_attn.q_proj.bias", 0),
    "layers.attention.key_bias": Source("self_attn.k_proj.bias", 0),
    "layers.attention.value_bias": Source("self_attn.v_proj.bias", 0),
}
_QK_NORM: Names = {
    "layers.attention.query_norm": Source("self_attn.q_norm.weight", 0),
    "layers.attention.key_norm": Source("self_attn.k_norm.weight", 0),
}
_BIAS = _QKV_BIAS | {"layers.attention.out_bias": Source("self_attn.o_proj.bias", 0)}
_FUSED: Names = {name: Source("self_attn.qkv_proj.weight", 1, _QKV) for name in _QKV}
_FUSED |= {name: Source("mlp.gate_up_proj.weight", 1, _GATE_UP) for name in _GATE_UP}
# The name that is the second norm's in Llama is here that of the norm behind the attention.
_OUTPUT_NORMS: Names = {
    "layers.attention_output_norm": Source("post_attention_layernorm.weight", 0),
    "layers.feed_forward_output_norm": Source("post_feedforward_layernorm.weight", 0),
}
_GEMMA = _COMMON | _OUTPUT_NORMS | {"layers.feed_forward_norm": Source("pre_feedforward_layernorm.weight", 0)}

# A model has only some of the parameters that its family may have.
NAMES: dict[str, Names] = {
    "llama": _LLAMA | _BIAS,
    "mistral": _LLAMA,
    "phi3": _LLAMA | _FUSED,
    "smollm3": _LLAMA | _BIAS,
    "granite": _LLAMA | _BIAS,
    "qwen2": _LLAMA | _QKV_BIAS,
    "qwen3": _LLAMA | _QK_NORM | _BIAS,
    "olmo2": _COMMON | _OUTPUT_NORMS | _QK_NORM | _BIAS,
    "gemma2": _GEMMA | _BIAS,
    "gemma3": _GEMMA | _QK_NORM | _BIAS,
}


def stored_name(key: str, source: Source, layer: int | None) -> str:
    """The tensor of a parameter, of one layer where every layer has its own.

    >>> stored_name("layers.attention.key_norm", Source("self_attn.k_norm.weight", 0), 2)
    'model.layers.2.self_attn.k_norm.weight'
    """
    return f"model.{_LAYERS}{layer}.{source.name}" if key.startswith(_LAYERS) else source.name


def is_stacked(key: str) -> bool:
    """Whether the first dimension of the parameter is that of layers."""
    return key.startswith(_LAYERS)
