"""config.json of the supported families, read as a ModelConfig and written from one.

Keys that are absent have the defaults of the format's owner, the configuration classes of transformers, and both
spellings of rotary positions are read: `rope_parameters` of transformers 5, and `rope_theta` with `rope_scaling` of the
versions before.
"""

import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from models.config import Architecture, ModelConfig, RopeScaling

Json = Mapping[str, Any]


class Format(NamedTuple):
    """Of a family: the class in "architectures", "model_type", and the values of keys that are absent."""

    name: str
    model_type: str
    absent: Json


_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
}
FORMATS = {
    "llama": Format("LlamaForCausalLM", "llama", {}),
    "mistral": Format("MistralForCausalLM", "mistral", {"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Format("Qwen2ForCausalLM", "qwen2", _QWEN),
    "qwen3": Format("Qwen3ForCausalLM", "qwen3", _QWEN | {"head_dim": 128}),
    "gemma2": Format(
        "Gemma2ForCausalLM", "gemma2", _GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    ),
    "gemma3": Format("Gemma3ForCausalLM", "gemma3_text", _GEMMA | {"rope_theta": 1e6, "sliding_window_pattern": 6}),
    "phi3": Format("Phi3ForCausalLM", "phi3", {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}),
    "olmo2": Format("Olmo2ForCausalLM", "olmo2", {"rms_norm_eps": 1e-5}),
    "smollm3": Format(
        "SmolLM3ForCausalLM",
        "smollm3",
        {"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True, "no_rope_layer_interval": 4},
    ),
    "granite": Format("GraniteForCausalLM", "granite", {}),
}
_RECURRENT = ("mamba", "rwkv", "recurrentgemma", "jamba", "zamba", "bamba", "xlstm", "falconh1", "qwen3next", "lfm2")
_GEMMAS = ("gemma2", "gemma3")
_SLIDING, _FULL = "sliding_attention", "full_attention"
# What null means other than an absent key: none of it.
_NONE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "num_key_value_heads")
# What would change the function and is not computed here: the only values that are read.
_FIXED = {"mlp_bias": (False,), "use_bidirectional_attention": (False,), "quantization_config": ()}
_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


def read_config(json: Json, dtype: str) -> ModelConfig:
    """The ModelConfig of a config.json.

    Raises:
      ValueError: the architecture or one of its settings is not supported, or a key is missing or has a value
        of another type; the message begins with the key.
    """
    _require_forms(json)
    family = _family(json)
    values = _values(json, family)
    for key, allowed in _FIXED.items():
        if values.get(key) is not None and values[key] not in allowed:
            raise ValueError(f"{key}={values[key]!r} is not supported")
    _require_activation(values, family)
    heads, width, layers = (_integer(values, k) for k in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    head_width = _integer(values, "head_dim", width // heads)
    base, scaling, window_base, rotary = _rope(values, family, head_width)
    window, full_layers = _windows(values, family, layers)
    architecture = Architecture(
        family=family,
        norm_epsilon=_number(values, "rms_norm_eps"),
        tied_head=bool(values["tie_word_embeddings"]),
        rope_scaling=scaling,
        window=window,
        full_layers=full_layers,
        window_rope_base=window_base,
        rotary_width=rotary,
        unrotated_layers=_unrotated(values, layers) if family == "smollm3" else (),
        attention_bias=family not in ("mistral", "qwen2", "phi3") and bool(values.get("attention_bias")),
        attention_softcap=_number(values, "attn_logit_softcapping", 0.0) if family == "gemma2" else 0.0,
        logit_softcap=_number(values, "final_logit_softcapping", 0.0) if family in _GEMMAS else 0.0,
        **(_multipliers(values) if family == "granite" else {}),
        **({"query_width": _number(values, "query_pre_attn_scalar")} if family in _GEMMAS else {}),
    )
    return ModelConfig(
        d_model=width,
        layers=layers,
        heads=heads,
        kv_heads=_integer(values, "num_key_value_heads", heads),
        head_width=head_width,
        d_ff=_integer(values, "intermediate_size"),
        vocab_size=_integer(values, "vocab_size"),
        rope_base=base,
        dtype=dtype,
        architecture=architecture,
    )


def read_max_length(json: Json) -> int:
    """The tokens that the model was made to read at once; errors as of `read_config`.

    Behind the original context "longrope" has other factors for all of the text, also for what was read before: longer
    texts are not supported.
    """
    values = _values(json, _family(json))
    scaling = _given_rope(values)
    length = _integer(values, "max_position_embeddings")
    return _original_context(values, scaling) if _rope_type(scaling, _family(json)) == "longrope" else length


def write_config(config: ModelConfig, max_length: int) -> dict[str, Any]:
    """The config.json of a model with dense attention of a family that Hugging Face knows.

    Raises:
      ValueError: it knows no such model.

    >>> write_config(ModelConfig(), 32)
    Traceback (most recent call last):
    ValueError: family 'atlas', attention 'dense' has no form in Hugging Face's layout: it knows llama, mistral, \
qwen2, qwen3, olmo2, smollm3, granite, with dense attention
    """
    a, family = config.architecture, config.architecture.family
    if family not in _WRITTEN or config.attention != "dense":
        raise ValueError(
            f"family {family!r}, attention {config.attention!r} has no form in Hugging Face's layout: it knows "
            f"{', '.join(_WRITTEN)}, with dense attention"
        )
    name, model_type, _ = FORMATS[family]
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
        "rms_norm_eps": a.norm_epsilon,
        "tie_word_embeddings": a.tied_head,
        "rope_theta": config.rope_base,
        "attention_bias": a.attention_bias,
        "sliding_window": a.window or None,
        "use_sliding_window": a.window > 0,
        "max_window_layers": len(a.full_layers),
        "no_rope_layers": [int(layer not in a.unrotated_layers) for layer in range(config.layers)],
        "embedding_multiplier": a.embedding_scale,
        "residual_multiplier": a.residual_scale,
        "logits_scaling": a.logit_scale,
        "attention_multiplier": (a.query_width or config.head_width) ** -0.5,
        "hidden_act": "silu",
        # Else transformers takes ids of its own, which the vocabulary need not have.
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }
    # What the family has no key for would be lost without a word.
    if (back := read_config(written, config.dtype)).architecture != a:
        lost = next(key for key, value in vars(a).items() if value != getattr(back.architecture, key))
        raise ValueError(f"architecture.{lost}={getattr(a, lost)!r} has no form in the config.json of {family}")
    return written


_WRITTEN = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3", "granite")


def _require_forms(json: Json) -> None:
    for key in ("architectures", "layer_types"):
        names = json.get(key)
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"{key}={names!r} must be a list of names")
    parameters = json.get("rope_parameters") or {}
    objects = {key: json.get(key) for key in ("rope_scaling", "rope_parameters")}
    objects |= {key: parameters.get(key) for key in (_FULL, _SLIDING) if isinstance(parameters, dict)}
    for key, value in objects.items():
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{key}={value!r} must be an object")


def _family(json: Json) -> str:
    names = json.get("architectures") or []
    found = names[0] if names else json.get("model_type")
    for family, known in FORMATS.items():
        if found in known[:2]:
            return family
    supported = ", ".join(known.name for known in FORMATS.values())
    recurrent = str(found).lower().startswith(_RECURRENT)
    reason = "is recurrent, so that no token could be taken back" if recurrent else "is not supported"
    raise ValueError(f"architecture {found!r} {reason}; supported are {supported}")


def _values(json: Json, family: str) -> dict[str, Any]:
    """A config.json with the family's values of what it leaves out."""
    common = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False}
    given = {key: value for key, value in json.items() if value is not None or key in _NONE}
    return common | dict(FORMATS[family].absent) | given


def _require_activation(values: Json, family: str) -> None:
    key, expected = ("hidden_activation", "gelu_pytorch_tanh") if family in _GEMMAS else ("hidden_act", "silu")
    if (found := values.get(key, expected)) != expected:
        raise ValueError(f"{key}={found!r} must be {expected!r} for {family}")


def _integer(values: Json, key: str, default: int | None = None) -> int:
    value = _value(values, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{key}={value!r} must be a positive integer")
    return value


def _number(values: Json, key: str, default: float | None = None) -> float:
    value = _value(values, key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > sys.float_info.max:
        raise ValueError(f"{key}={value!r} must be a number")
    return float(value)


def _value(values: Json, key: str, default: float | None) -> Any:
    """A key that is absent or null has its default; without one it is missing."""
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise ValueError(f"{key} is missing")
    return value


def _multipliers(values: Json) -> dict[str, float]:
    """Those of Granite; products of queries and keys are multiplied, not divided by a root."""
    names = {"embedding_scale": "embedding_multiplier", "residual_scale": "residual_multiplier"}
    names["logit_scale"] = "logits_scaling"
    scales = {field: _number(values, key, 1.0) for field, key in names.items()}
    return scales | {"query_width": _number(values, "attention_multiplier", 1.0) ** -2}


def _unrotated(values: Json, layers: int) -> tuple[int, ...]:
    interval = _integer(values, "no_rope_layer_interval")
    rotated = values.get("no_rope_layers") or [(i + 1) % interval for i in range(layers)]
    return tuple(i for i in range(layers) if not rotated[i])


def _given_rope(values: Json) -> dict[str, Any]:
    """What is said of rotary positions, without what is null; the older spelling goes first, as in transformers."""
    given = values.get("rope_scaling") or values.get("rope_parameters") or {}
    return {key: value for key, value in given.items() if value is not None}


def _rope(values: Json, family: str, head_width: int) -> tuple[float, RopeScaling, float, int]:
    """Base, scaling, base of layers with a window (0 if they have the same), and rotary width (0 if it is all)."""
    new = values.get("rope_parameters") or {}
    if bool(new) and (family == "gemma3") != bool({_FULL, _SLIDING} & new.keys()):
        raise ValueError(f"rope_parameters={new!r} is not of the form that {family} has")
    far, near_base = _given_rope(values), 0.0
    if family == "gemma3":
        near = {"rope_theta": values.get("rope_local_base_freq")} | (new.get(_SLIDING) or {})
        if _rope_type(near, family) != "default":
            raise ValueError(f"rope_parameters: {_SLIDING} must have rope_type 'default'")
        far, near_base = (new.get(_FULL) or {}) | (values.get("rope_scaling") or {}), _number(near, "rope_theta", 1e4)
    share = _number(far, "partial_rotary_factor", _number(values, "partial_rotary_factor", 1.0))
    rotary = int(head_width * share)
    base = _number(far, "rope_theta", _number(values, "rope_theta"))
    return base, _scaling(far, values, family), near_base, 0 if rotary == head_width else rotary


def _rope_type(scaling: Json, family: str) -> str:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    # What Phi-3 called it before.
    return "longrope" if family == "phi3" and kind in ("su", "yarn") else kind


def _original_context(values: Json, scaling: Json) -> int:
    length = _integer(scaling, "original_max_position_embeddings", _integer(values, "max_position_embeddings"))
    return _integer(values, "original_max_position_embeddings", length)


def _scaling(scaling: Json, values: Json, family: str) -> RopeScaling:
    kind = _rope_type(scaling, family)
    if kind not in _ROPE_TYPES or not scaling.get("truncate", True):
        reason = f"rope_type={kind!r}" if kind not in _ROPE_TYPES else "truncate=False"
        raise ValueError(f"{reason} is not supported; supported are {', '.join(_ROPE_TYPES)}")
    if kind == "default":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind, _number(scaling, "factor"))
    original = _original_context(values, scaling)
    if kind == "llama3":
        low, high = (_number(scaling, f"{end}_freq_factor") for end in ("low", "high"))
        return RopeScaling(kind, _number(scaling, "factor"), low, high, original)
    factor = _number(scaling, "factor", _integer(values, "max_position_embeddings") / original)
    if kind == "yarn":
        low, high = (_number(scaling, key, default) for key, default in (("beta_slow", 1.0), ("beta_fast", 32.0)))
        attention = _number(scaling, "attention_factor", _yarn_attention(scaling, factor))
        return RopeScaling(kind, factor, low, high, original, attention_factor=attention)
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    factors = scaling.get("short_factor")
    if not isinstance(factors, list) or not all(isinstance(x, (int, float)) for x in factors):
        raise ValueError(f"short_factor={factors!r} must be a list of numbers")
    attention = _number(scaling, "attention_factor", attention)
    return RopeScaling(kind, original_context=original, factors=tuple(map(float, factors)), attention_factor=attention)


def _yarn_attention(scaling: Json, factor: float) -> float:
    """The factor on rotated queries and keys (arXiv 2309.00071, equation 22)."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    weights = [_number(scaling, key, 0.0) for key in ("mscale", "mscale_all_dim")]
    return scale(weights[0]) / scale(weights[1]) if all(weights) else scale(1.0)


def _windows(values: Json, family: str, layers: int) -> tuple[int, tuple[int, ...]]:
    """The window (0 if there is none), and the layers without it."""
    optional = family.startswith("qwen") or family == "smollm3"
    has_window = values.get("use_sliding_window", False) if optional else family in ("mistral", "phi3", *_GEMMAS)
    if not has_window or values.get("sliding_window") is None:
        return 0, ()
    types = _layer_types(values, family, layers)
    full_layers = tuple(i for i, kind in enumerate(types) if kind == _FULL)
    return (0, ()) if len(full_layers) == layers else (_integer(values, "sliding_window"), full_layers)


def _layer_types(values: Json, family: str, layers: int) -> list[str]:
    if family in ("mistral", "phi3"):
        return [_SLIDING] * layers
    types = values.get("layer_types")
    if types is None:
        unrotated = _unrotated(values, layers) if family == "smollm3" else ()
        near = {
            "gemma2": lambda i: i % 2 == 0,
            "gemma3": lambda i: (i + 1) % _integer(values, "sliding_window_pattern") != 0,
            "smollm3": lambda i: i in unrotated,
        }.get(family, lambda i: i >= _integer(values, "max_window_layers"))
        return [_SLIDING if near(i) else _FULL for i in range(layers)]
    if len(types) != layers or not set(types) <= {_SLIDING, _FULL}:
        raise ValueError(f"layer_types={types!r} must be {layers} of {_SLIDING!r} and {_FULL!r}")
    return types
