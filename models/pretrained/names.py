"""Where a parameter of the `Decoder` stands in the files of its family."""

import math
from typing import NamedTuple

import numpy as np


class Source(NamedTuple):
    """A tensor in a file.

    name: its name; those of a layer go without "model.layers.<i>.".
    inputs: torch stores a linear map as [out, in], and here its first `inputs` dimensions are the inputs; 0 is
      a bias or a scale, stored flat; None is stored as it is.
    """

    name: str
    inputs: int | None

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in the file of a parameter of a `shape`.

        >>> Source("o_proj.weight", 2).stored_shape((4, 8, 64))
        (64, 32)
        """
        if self.inputs is None:
            return shape
        outputs = math.prod(shape[self.inputs :])
        return (outputs, math.prod(shape[: self.inputs])) if self.inputs else (outputs,)

    def load(self, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The parameter of a `shape`."""
        return stored if self.inputs is None else stored.T.reshape(shape)

    def store(self, parameter: np.ndarray) -> np.ndarray:
        """The tensor in the file, contiguous."""
        if self.inputs is None:
            return np.ascontiguousarray(parameter)
        return np.ascontiguousarray(parameter.reshape(self.stored_shape(parameter.shape)[::-1]).T)


Names = dict[str, Source]

_LAYERS = "layers."

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
# The name that is the second norm's in Llama is here that of the norm behind the attention.
_GEMMA = _COMMON | {
    "layers.attention_output_norm": Source("post_attention_layernorm.weight", 0),
    "layers.feed_forward_norm": Source("pre_feedforward_layernorm.weight", 0),
    "layers.feed_forward_output_norm": Source("post_feedforward_layernorm.weight", 0),
}

NAMES: dict[str, Names] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA | _QKV_BIAS,
    "qwen3": _LLAMA | _QK_NORM,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA | _QK_NORM,
}


def is_stacked(path: str) -> bool:
    """Whether the first dimension of the parameter is that of layers."""
    return path.startswith(_LAYERS)


def stored_names(path: str, source: Source, layers: int) -> list[str]:
    """The tensors that a parameter consists of: one, or one a layer.

    >>> stored_names("layers.attention.key_norm", Source("self_attn.k_norm.weight", 0), 2)
    ['model.layers.0.self_attn.k_norm.weight', 'model.layers.1.self_attn.k_norm.weight']
    """
    if not is_stacked(path):
        return [source.name]
    return [f"model.{_LAYERS}{i}.{source.name}" for i in range(layers)]
