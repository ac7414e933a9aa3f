"""config.json of the supported families, read as a ModelConfig; that of a Llama is written from one, too.

Both spellings of rotary positions are read: `rope_parameters` of transformers 5, and `rope_theta` with
`rope_scaling` of the versions before.
"""

from collections.abc import Mapping
from typing import Any

from models.config import Architecture, ModelConfig, RopeScaling

Json = Mapping[str, Any]

# Family: the class in "architectures", and "model_type".
CLASSES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "mistral": ("MistralForCausalLM", "mistral"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma2": ("Gemma2ForCausalLM", "gemma2"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
_RECURRENT = ("mamba", "rwkv", "recurrentgemma", "jamba", "zamba", "bamba", "xlstm", "falconh1", "qwen3next", "lfm2")
_GEMMAS = ("gemma2", "gemma3")
_SLIDING, _FULL = "sliding_attention", "full_attention"
# What would change the function and is not computed here: the only values that are read.
_FIXED = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_bidirectional_attention": (False,),
    "partial_rotary_factor": (1, 1.0),
    "quantization_config": (),
}
_LLAMA3 = {
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "original_max_position_embeddings": "original_context",
}


def read_config(json: Json, dtype: str) -> ModelConfig:
    """The ModelConfig of a config.json.

    Raises:
      ValueError: the architecture or one of its settings is not supported, or a key is missing or has a value
        of another type; the message begins with the key.
    """
    family = _family(json)
    for key, allowed in _FIXED.items():
        if json.get(key) is not None and json[key] not in allowed:
            raise ValueError(f"{key}={json[key]!r} is not supported")
    _require_activation(json, family)
    heads, width = _integer(json, "num_attention_heads"), _integer(json, "hidden_size")
    base, scaling, window_base = _rope(json, family)
    layers = _integer(json, "num_hidden_layers")
    window, full_layers = _windows(json, family, layers)
    architecture = Architecture(
        family=family,
        norm_epsilon=_number(json, "rms_norm_eps"),
        tied_head=bool(json.get("tie_word_embeddings", family in _GEMMAS)),
        rope_scaling=scaling,
        window=window,
        full_layers=full_layers,
        window_rope_base=window_base,
        query_width=_integer(json, "query_pre_attn_scalar") if family in _GEMMAS else 0,
        attention_softcap=_number(json, "attn_logit_softcapping", 0.0) if family == "gemma2" else 0.0,
        logit_softcap=_number(json, "final_logit_softcapping", 0.0) if family in _GEMMAS else 0.0,
    )
    # Qwen3 and Gemma have a default of their own, and so must say which it is.
    default = {} if family in ("qwen3", *_GEMMAS) else {"default": width // heads}
    return ModelConfig(
        d_model=width,
        layers=layers,
        heads=heads,
        kv_heads=_integer(json, "num_key_value_heads", heads),
        head_width=_integer(json, "head_dim", **default),
        d_ff=_integer(json, "intermediate_size"),
        vocab_size=_integer(json, "vocab_size"),
        rope_base=base,
        dtype=dtype,
        architecture=architecture,
    )


def read_max_length(json: Json) -> int:
    """The tokens that the model was made to read at once; errors as of `read_config`."""
    return _integer(json, "max_position_embeddings")


def write_config(config: ModelConfig, max_length: int) -> dict[str, Any]:
    """The config.json of a Llama with dense attention and rotary positions that are not scaled.

    Raises:
      ValueError: the model is another.

    >>> write_config(ModelConfig(), 32)
    Traceback (most recent call last):
    ValueError: only Llamas with dense attention and no further settings are written, not family 'atlas', 'dense'
    """
    name, model_type = CLASSES["llama"]
    written = {
        "architectures": [name],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": max_length,
        "rms_norm_eps": config.architecture.norm_epsilon,
        "tie_word_embeddings": config.architecture.tied_head,
        "rope_theta": config.rope_base,
        "hidden_act": "silu",
    }
    if config.attention != "dense" or read_config(written, config.dtype).architecture != config.architecture:
        found = f"family {config.architecture.family!r}, {config.attention!r}"
        raise ValueError(f"only Llamas with dense attention and no further settings are written, not {found}")
    return written


def _family(json: Json) -> str:
    names = json.get("architectures") or []
    found = names[0] if names else json.get("model_type")
    for family, known in CLASSES.items():
        if found in known:
            return family
    supported = ", ".join(name for name, _ in CLASSES.values())
    recurrent = str(found).lower().startswith(_RECURRENT)
    reason = "is recurrent, so that no token could be taken back" if recurrent else "is not supported"
    raise ValueError(f"architecture {found!r} {reason}; supported are {supported}")


def _require_activation(json: Json, family: str) -> None:
    key, expected = ("hidden_activation", "gelu_pytorch_tanh") if family in _GEMMAS else ("hidden_act", "silu")
    if (found := json.get(key) or expected) != expected:
        raise ValueError(f"{key}={found!r} must be {expected!r} for {family}")


def _integer(json: Json, key: str, default: int | None = None) -> int:
    value = _value(json, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{key}={value!r} must be a positive integer")
    return value


def _number(json: Json, key: str, default: float | None = None) -> float:
    value = _value(json, key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{key}={value!r} must be a number")
    return float(value)


def _value(json: Json, key: str, default: float | None) -> Any:
    """A key that is absent or null has its default; without one it is missing."""
    value = default if json.get(key) is None else json[key]
    if value is None:
        raise ValueError(f"{key} is missing")
    return value


def _rope(json: Json, family: str) -> tuple[float, RopeScaling, float]:
    """Base, scaling, and the base of layers with a window (0 if they have the same)."""
    new = json.get("rope_parameters") or {}
    old = {"rope_theta": json.get("rope_theta"), **(json.get("rope_scaling") or {})}
    length = json.get("max_position_embeddings")
    if bool(new) and (family == "gemma3") != (_FULL in new):
        raise ValueError(f"rope_parameters={new!r} is not of the form that {family} has")
    if family != "gemma3":
        values = new or old
        return _number(values, "rope_theta", 10_000.0), _scaling(values, length), 0.0
    full, near = new.get(_FULL) or old, new.get(_SLIDING) or {"rope_theta": json.get("rope_local_base_freq")}
    if _scaling(near, length).kind != "none":
        raise ValueError(f"rope_parameters: {_SLIDING} must have rope_type 'default'")
    return _number(full, "rope_theta", 1e6), _scaling(full, length), _number(near, "rope_theta", 10_000.0)


def _scaling(values: Json, length: int | None) -> RopeScaling:
    kind = values.get("rope_type") or values.get("type") or "default"
    if values.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(f"partial_rotary_factor={values['partial_rotary_factor']!r} is not supported")
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind, _number(values, "factor"))
    if kind != "llama3":
        raise ValueError(f"rope_type={kind!r} is not supported; supported are default, linear, llama3")
    low, high, original = _LLAMA3
    factors = (_number(values, key) for key in ("factor", low, high))
    return RopeScaling(kind, *factors, _integer(values, original, length))


def _windows(json: Json, family: str, layers: int) -> tuple[int, tuple[int, ...]]:
    """The window (0 if there is none), and the layers without it."""
    has_window = json.get("use_sliding_window", False) if family.startswith("qwen") else family != "llama"
    if not has_window or json.get("sliding_window") is None:
        return 0, ()
    types = _layer_types(json, family, layers)
    full_layers = tuple(i for i, kind in enumerate(types) if kind == _FULL)
    return (0, ()) if len(full_layers) == layers else (_integer(json, "sliding_window"), full_layers)


def _layer_types(json: Json, family: str, layers: int) -> list[str]:
    if family == "mistral":
        return [_SLIDING] * layers
    types = json.get("layer_types")
    if types is None:
        near = {
            "gemma2": lambda i: i % 2 == 0,
            "gemma3": lambda i: (i + 1) % _integer(json, "sliding_window_pattern", 6) != 0,
        }.get(family, lambda i: i >= _integer(json, "max_window_layers"))
        return [_SLIDING if near(i) else _FULL for i in range(layers)]
    if len(types) != layers or not set(types) <= {_SLIDING, _FULL}:
        raise ValueError(f"layer_types={types!r} must be {layers} of {_SLIDING!r} and {_FULL!r}")
    return types
