"""Directories as a user may bring them: every fault is one line that names it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from models import Decoder, ModelConfig
from models.config import Architecture, RopeScaling
from models.pretrained import Pretrained, load_pretrained, save_pretrained

SHAPE = {"d_model": 12, "layers": 2, "heads": 2, "kv_heads": 1, "head_width": 4, "d_ff": 20, "vocab_size": 16}
QUERY = "model.layers.1.self_attn.q_proj.weight"


def make(**architecture):
    config = ModelConfig(**SHAPE, architecture=Architecture(**{"family": "llama"} | architecture))
    return Pretrained(Decoder(config, rngs=nnx.Rngs(0)), config, 32)


@pytest.fixture(name="directory")
def make_directory(tmp_path):
    save_pretrained(make(tied_head=False), tmp_path)
    return tmp_path


def change_config(directory, **changes):
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_tensors(directory, change):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(directory, message, **arguments):
    with pytest.raises(ValueError, match=message) as raised:
        load_pretrained(directory, **arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("architecture", [{"norm_epsilon": 1e-5}, {"tied_head": False}])
def test_a_round_trip_is_exact(architecture, tmp_path):
    saved = make(**architecture)
    save_pretrained(saved, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded = load_pretrained(tmp_path)
    assert loaded.config == saved.config
    assert loaded.max_length == 32
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded.model), nnx.state(saved.model))
    axes = [jax.tree.map(lambda v: v.get_metadata("axes"), s, is_leaf=is_variable) for s in map(flat, (loaded, saved))]
    assert axes[0] == axes[1]


def is_variable(x):
    return isinstance(x, nnx.Variable)


def flat(pretrained):
    return dict(nnx.to_flat_state(nnx.state(pretrained.model)))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "config.json: architecture 'GPT2LMHeadModel' is not supported; supported are LlamaForCausalLM, Mistral",
        ),
        ({"architectures": ["MambaForCausalLM"]}, "'MambaForCausalLM' is recurrent, .* supported are LlamaForCausalLM"),
        ({"architectures": ..., "model_type": "rwkv"}, "'rwkv' is recurrent"),
        ({"architectures": ..., "model_type": ...}, "architecture None is not supported"),
        ({"hidden_size": ...}, "config.json: hidden_size is missing"),
        ({"max_position_embeddings": ...}, "config.json: max_position_embeddings is missing"),
        ({"hidden_size": "12"}, "hidden_size='12' must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a positive integer"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small' must be a number"),
        ({"hidden_act": "relu"}, "hidden_act='relu' must be 'silu'"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"attention_bias": True}, "has no tensor model.layers.0.self_attn.k_proj.bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_type='dynamic' is not supported; supported are def",
        ),
        ({"rope_scaling": {"type": "yarn", "truncate": False}}, "truncate=False is not supported"),
        ({"rope_scaling": {"type": "longrope"}}, "short_factor=None must be a list of numbers"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters=.* is not of the form that llama has"),
        ({"num_key_value_heads": 3}, "kv_heads=3 must divide heads=2"),
        ({"head_dim": 5}, "head_width=5 must be even"),
        ({"num_hidden_layers": 3}, r"has no tensor model.layers.2.input_layernorm.weight, .* and 6 more"),
        ({"num_hidden_layers": 1}, r"does not ask for: model.layers.1.input_layernorm.weight, .* and 6 more"),
        ({"intermediate_size": 21}, r"mlp.down_proj.weight has shape \(12, 20\), but config.json asks for \(12, 21\)"),
        ({"vocab_size": 17}, r"lm_head.weight has shape \(16, 12\)|embed_tokens.weight has shape \(16, 12\)"),
        ({"tie_word_embeddings": True}, "lm_head.weight is not the embedding, but config.json ties them"),
        (
            {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
            "has no tensor model.layers.0.self_attn.k_proj.b",
        ),
    ],
)
def test_a_config_that_does_not_fit(directory, changes, message):
    change_config(directory, **changes)
    refused(directory, message)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(QUERY), f"has no tensor {QUERY}$"),
        (lambda t: t.update(extra=np.zeros(2, np.float32)), "does not ask for: extra$"),
        (lambda t: t.update({QUERY: t[QUERY].T.copy()}), rf"{QUERY} has shape \(12, 8\), but .* asks for \(8, 12\)"),
        (lambda t: t.update({QUERY: t[QUERY].astype(np.int8)}), f"{QUERY} is of type I8; supported are F64, F32"),
        (lambda t: np.put(t[QUERY], 5, np.nan), f"{QUERY} holds numbers that are not finite; the file is damaged"),
        (lambda t: np.put(t[QUERY], 5, -np.inf), f"{QUERY} holds numbers that are not finite"),
    ],
)
def test_tensors_that_do_not_fit(directory, change, message):
    change_tensors(directory, change)
    refused(directory, message)


def test_what_files_hold_beside_the_weights(directory):
    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    change_tensors(directory, add)
    change_config(directory, tie_word_embeddings=True)
    assert load_pretrained(directory).model.head is None


def test_missing_and_broken_files(directory):
    refused(directory / "nowhere", "no model at '.*nowhere/config.json'")
    refused(directory, "model.dtype='half' must be one of", dtype="half")
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    refused(directory, "model.safetensors is not a complete safetensors file")
    weights.unlink()
    refused(directory, "has neither model.safetensors nor shards of it")
    (directory / "pytorch_model.bin").touch()
    refused(directory, "pytorch_model.bin may execute code when read")
    (directory / "config.json").write_text("{")
    refused(directory, "config.json' is no model: Expecting")
    (directory / "config.json").write_text("[]")
    refused(directory, "config.json' is no model: it holds no JSON object")


def test_shards_are_read_and_missing_ones_named(directory):
    whole = directory / "model.safetensors"
    weights, expected = load_file(whole), nnx.state(load_pretrained(directory).model)
    for i, names in enumerate((set(weights) - {QUERY}, {QUERY})):
        save_file({name: weights[name] for name in names}, directory / f"model-{i + 1:05d}-of-00002.safetensors")
    save_file(weights, directory / "consolidated.safetensors")
    whole.unlink()
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load_pretrained(directory).model), expected)
    (directory / "model-00002-of-00002.safetensors").unlink()
    refused(directory, f"has no tensor {QUERY}")


def test_what_hugging_face_does_not_know_is_not_written(tmp_path):
    llama = make()
    gated = dataclasses.replace(llama, config=dataclasses.replace(llama.config, attention="gated"))
    for other, message in (
        (make(family="atlas"), "family 'atlas', attention 'dense' has no form in Hugging Face's layout"),
        (gated, "attention 'gated' has no form"),
        (make(window=4), "architecture.window=4 has no form in the config.json of llama"),
        (make(rope_scaling=RopeScaling("linear", 8.0)), "architecture.rope_scaling=.* has no form"),
        (make(family="qwen2", attention_bias=True), "architecture.attention_bias=True has no form"),
    ):
        with pytest.raises(ValueError, match=message):
            save_pretrained(other, tmp_path)
    assert not list(tmp_path.iterdir())


def write_shards(directory, weights, count):
    """Shards without their index, by name."""
    names = sorted(weights)
    shards = {f"model-{i + 1:05d}-of-{count:05d}.safetensors": names[i::count] for i in range(count)}
    for file, held in shards.items():
        save_file({name: weights[name] for name in held}, directory / file)
    return {name: file for file, held in shards.items() for name in held}


def test_one_directory_holds_one_model(directory):
    """Of two models the file that transformers prefers is read, and writing leaves no other."""
    whole = directory / "model.safetensors"
    weights, expected = load_file(whole), nnx.state(load_pretrained(directory).model)
    other = {name: weight + 1 for name, weight in weights.items()}
    index = {"weight_map": write_shards(directory, other, 3)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load_pretrained(directory).model), expected)
    whole.unlink()
    # Newer shards, of which the index knows: the three older ones are not read.
    index = {"weight_map": write_shards(directory, weights, 2)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(load_pretrained(directory).model), expected)
    (directory / "model.safetensors.index.json").unlink()
    refused(directory, "holds two models: .* is in model-0000")
    save_pretrained(make(tied_head=False), directory)
    assert {path.name for path in directory.iterdir()} == {"config.json", "model.safetensors"}


def test_shards_that_the_index_names_must_be_there(directory):
    index = {"weight_map": write_shards(directory, load_file(directory / "model.safetensors"), 2)}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()
    (directory / "model-00002-of-00002.safetensors").unlink()
    refused(directory, "has no model-00002-of-00002.safetensors, which model.safetensors.index.json names")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_of_their_own_are_slices_of_stacked_ones(dtype, directory):
    stacked, own = (load_pretrained(directory, dtype, stacked=value).model for value in (True, False))
    pairs = zip(jax.tree.leaves(nnx.state(stacked.unstack())), jax.tree.leaves(nnx.state(own)), strict=True)
    for expected, actual in pairs:
        assert actual.dtype == dtype
        np.testing.assert_array_equal(actual, expected)
