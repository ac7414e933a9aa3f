"""Logits of random models of every family equal those of transformers, which also reads what we write."""

import functools
import inspect
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.pretrained import load_pretrained, save_pretrained
from models.pretrained.settings import FORMATS, read_config

torch = pytest.importorskip("torch", reason="conformance needs torch: pip install '.[peers]'")
transformers = pytest.importorskip("transformers", reason="conformance needs transformers: pip install '.[peers]'")
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._pytree import tree_map  # noqa: E402

VOCAB, LENGTH, PIECES = 50, 14, (6, 1, 1, 6)
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Windows and softcaps are small enough to matter at 14 tokens, and head widths are not hidden_size / heads.
CASES = {
    "llama": (
        "LlamaForCausalLM",
        {"rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "llama3": (
        "LlamaForCausalLM",
        {
            "head_dim": 10,
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3 | {"rope_theta": 100.0, "original_max_position_embeddings": 24},
        },
    ),
    "mistral": ("MistralForCausalLM", {"head_dim": 14, "num_key_value_heads": 1, "sliding_window": 5}),
    "qwen2": (
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 10, "num_key_value_heads": 4, "attention_bias": True}),
    "yarn": (
        "Qwen3ForCausalLM",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "beta_fast": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": 5}),
    "phi4 mini": (
        "Phi3ForCausalLM",
        {
            "hidden_size": 32,
            "num_key_value_heads": 1,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.5, 2.0],
                "long_factor": [2.0, 3.0, 4.0],
            },
        },
    ),
    "olmo2": ("Olmo2ForCausalLM", {"attention_bias": True}),
    "smollm3": (
        "SmolLM3ForCausalLM",
        {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 4},
    ),
    "granite": (
        "GraniteForCausalLM",
        {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.5,
            "attention_multiplier": 0.7,
        },
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        {
            "head_dim": 8,
            "sliding_window": 4,
            "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            "head_dim": 10,
            "num_key_value_heads": 1,
            "sliding_window": 5,
            "query_pre_attn_scalar": 7,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0},
            },
        },
    ),
}


class Wide(TorchFunctionMode):
    """float64 wherever transformers casts to float32: in norms, rotary tables and the softmax."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        wide = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*tree_map(wide, args), **tree_map(wide, kwargs or {}))


def peer_class(case):
    return getattr(transformers, CASES[case][0])


@functools.cache
def make_peer(case):
    """A model of transformers with random numbers everywhere, of a size at which all of them matter."""
    peer_type, changes = CASES[case]
    config = getattr(transformers, peer_type).config_class(**COMMON | changes)
    config._attn_implementation = "eager"  # which alone applies the softcap
    torch.manual_seed(0)
    peer = getattr(transformers, peer_type)(config).eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            scale = 1.0 if "embed" in name else 0.3
            parameter.add_(scale * torch.randn_like(parameter))
    return peer


@pytest.fixture(name="directory", scope="module")
def make_directory(tmp_path_factory):
    @functools.cache
    def save(case):
        path = tmp_path_factory.mktemp(case)
        make_peer(case).save_pretrained(path)
        return path

    return save


def tokens():
    return np.random.default_rng(0).integers(4, VOCAB, (2, LENGTH))


@torch.no_grad()
def peer_logits(peer):
    """Logits of the whole text, and of its pieces through the cache."""
    text = torch.from_numpy(tokens())
    pieces, cache = [], None
    for piece in text.split(PIECES, dim=1):
        output = peer(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    return peer(text, use_cache=False).logits.numpy(), torch.cat(pieces, 1).numpy()


def wide_logits(case):
    narrow = make_peer(case)
    torch.set_default_dtype(torch.float64)
    try:
        with Wide():
            peer = type(narrow)(narrow.config).eval()
            peer.load_state_dict(narrow.state_dict())
            return peer_logits(peer)
    finally:
        torch.set_default_dtype(torch.float32)


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, state, tokens_BT):
    return nnx.merge(graphdef, state)(tokens_BT)[0]


@functools.partial(jax.jit, static_argnums=0)
def extend(graphdef, state, tokens_BC, cache):
    logits, cache = nnx.merge(graphdef, state).extend(tokens_BC, cache)
    return logits, cache.advance(jnp.full(2, tokens_BC.shape[1], jnp.int32))


def our_logits(model):
    graphdef, state = nnx.split(model)
    text = jnp.asarray(tokens(), jnp.int32)
    pieces, cache = [], model.init_cache(2, LENGTH)
    for piece in jnp.split(text, np.cumsum(PIECES)[:-1], axis=1):
        logits, cache = extend(graphdef, state, piece, cache)
        pieces.append(logits)
    return forward(graphdef, state, text), jnp.concatenate(pieces, 1)


# Float64 sees what float32 sees, and more.
FLOATS = [("llama", "float32"), *((case, "float64") for case in CASES)]
FLOATS += [pytest.param(case, "float32", marks=pytest.mark.thorough) for case in CASES if case != "llama"]


@pytest.mark.parametrize(("case", "dtype"), FLOATS)
def test_logits_and_cached_logits_equal(case, dtype, directory):
    with jax.enable_x64(dtype == "float64"):
        expected = peer_logits(make_peer(case)) if dtype == "float32" else wide_logits(case)
        assert 0.5 < np.std(expected[0]) < 100
        for ours, peers in zip(our_logits(load_pretrained(directory(case), dtype).model), expected, strict=True):
            np.testing.assert_allclose(ours, peers, rtol=0, atol=TOLERANCE[dtype])


WRITTEN = ["mistral", "qwen2", "qwen3", "olmo2", "smollm3", "granite"]


@pytest.mark.parametrize("case", ["llama", *(pytest.param(case, marks=pytest.mark.thorough) for case in WRITTEN)])
def test_what_we_write_is_the_same_model_to_transformers(case, directory, tmp_path):
    loaded = load_pretrained(directory(case))
    assert loaded.max_length == 64
    save_pretrained(loaded, tmp_path)
    peer = type(make_peer(case)).from_pretrained(tmp_path, attn_implementation="eager")
    for actual, expected in zip(peer_logits(peer), peer_logits(make_peer(case)), strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert_equal(load_pretrained(tmp_path), loaded)


def test_longer_texts_than_the_original_context_are_not_promised(directory):
    assert load_pretrained(directory("phi4 mini")).max_length == 16


def required(family):
    """A config.json that says only what no family has a default for."""
    name, model_type, _ = FORMATS[family]
    return COMMON | {"architectures": [name], "model_type": model_type}


# Keys of several families, and values that differ from any default.
VALUES = {
    "rope_theta": 123.0,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    "rope_scaling": {"type": "linear", "factor": 2.0},
    "partial_rotary_factor": 0.5,
    "sliding_window": 3,
    "use_sliding_window": True,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rms_norm_eps": 0.25,
    "tie_word_embeddings": ...,
    "attention_bias": True,
    "attn_logit_softcapping": 7.0,
    "final_logit_softcapping": 7.0,
    "query_pre_attn_scalar": 7,
    "sliding_window_pattern": 2,
    "rope_local_base_freq": 77.0,
    "max_window_layers": 1,
    "no_rope_layer_interval": 2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 3.0,
    "logits_scaling": 3.0,
    "attention_multiplier": 3.0,
}
# Keys that may not be null for transformers.
NEVER_NULL = {"tie_word_embeddings", "partial_rotary_factor", "use_sliding_window", "rms_norm_eps", "attention_bias"}


@pytest.mark.parametrize("family", FORMATS)
def test_keys_mean_what_transformers_takes_them_for(family):
    """Every key: absent, null and given, beside a base of rotary positions and without; and the base beside a type."""
    peer_type = getattr(transformers, FORMATS[family].name).config_class
    known = set(inspect.signature(peer_type).parameters) | {"rope_theta", "rope_scaling"}
    known |= {"sliding_window_pattern", "rope_local_base_freq"} if family == "gemma3" else set()
    cases = [{}, {"rope_theta": 9.0, "rope_parameters": {"rope_type": "default"}}]
    for key, value in VALUES.items():
        if key not in known or (family == "gemma3" and key == "rope_parameters"):
            continue
        value = not peer_type().tie_word_embeddings if value is ... else value
        nullable = peer_type().to_dict().get(key, None) is None or key in ("sliding_window", "num_key_value_heads")
        cases += [{key: value}, {key: value, "use_sliding_window": True}]
        cases += [{key: None}] if nullable and key not in NEVER_NULL else []
    if family == "gemma3":
        cases = [case for case in cases if "rope_parameters" not in case]
    for case in cases:
        json = {key: value for key, value in required(family).items() if key not in case} | case
        try:
            told = peer_type(**json).to_dict()
        except Exception as error:  # what the owner of the format refuses needs no meaning
            print(family, case, error)
            continue
        explicit = {"architectures": [FORMATS[family].name]} | told
        assert read_config(json, "float32") == read_config(explicit, "float32"), case


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shards_of_16_bits_are_read_exactly(dtype, tmp_path):
    peer = type(make_peer("qwen2"))(make_peer("qwen2").config)
    peer.load_state_dict(make_peer("qwen2").state_dict())
    peer.to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size="5KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = nnx.to_pure_dict(nnx.state(load_pretrained(tmp_path).model))
    for name, path in {"q_proj.weight": ("query", (24, 4, 6)), "v_proj.bias": ("value_bias", (2, 6))}.items():
        stored = [layer.self_attn.get_parameter(name).detach().float().numpy().T for layer in peer.model.layers]
        expected = np.stack(stored).reshape(2, *path[1])
        np.testing.assert_array_equal(loaded["layers"]["attention"][path[0]], expected)


@pytest.mark.parametrize("case", ["llama3", "gemma3"])
def test_both_spellings_of_rotary_positions_are_read(case, directory, tmp_path):
    """Before version 5 the base stood by itself, and Gemma 3 had a key for that of layers with a window."""
    shutil.copytree(directory(case), tmp_path, dirs_exist_ok=True)
    settings = json.loads((tmp_path / "config.json").read_text())
    new = settings.pop("rope_parameters")
    if case == "gemma3":
        settings["rope_local_base_freq"] = new["sliding_attention"]["rope_theta"]
        new = new["full_attention"]
    settings["rope_theta"], settings["rope_scaling"] = new.pop("rope_theta"), new
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert load_pretrained(tmp_path).config == load_pretrained(directory(case)).config


def assert_equal(actual, expected):
    assert (actual.config, actual.max_length) == (expected.config, expected.max_length)
    states = [dict(nnx.to_flat_state(nnx.state(p.model))) for p in (actual, expected)]
    assert states[0].keys() == states[1].keys()
    for path, variable in states[0].items():
        np.testing.assert_array_equal(variable[...], states[1][path][...])
