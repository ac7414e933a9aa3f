import functools
import logging

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from models.attention import Attention, fused, kernels, oracle
from models.layers import make_rotation
from tests.models.attention.inputs import assert_near, make_inputs, make_segments, make_selection, value_and_gradients

T = 300  # three blocks, the last one ragged


def compare(attend, segments, softcap=0.0, **shape):
    """Output and gradients of a way of attending against the oracle's: sums in another order, so float32's rounding."""
    inputs = make_inputs(T=segments.shape[1], **shape)
    actual = value_and_gradients(lambda q, k, v, reads, _: attend(q, k, v, reads), inputs, segments)
    expected = value_and_gradients(functools.partial(oracle.attend, softcap=softcap), inputs, segments)
    assert_near((actual[0].output, actual[1][:3]), (expected[0].output, expected[1][:3]), 1e-5)


@pytest.mark.parametrize("kind", ["documents", pytest.param("padded", marks=pytest.mark.thorough)])
@pytest.mark.parametrize("softcap", [0.0, pytest.param(3.0, marks=pytest.mark.thorough)])
def test_splash_by_interpretation_is_the_oracle(kind, softcap):
    attend = functools.partial(fused.attend_splash, softcap=softcap, interpret=True)
    compare(attend, make_segments(kind, 2, T), softcap, H=2, G=1)


def test_what_cudnn_is_asked_for_is_the_oracle():
    compare(functools.partial(fused.attend_cudnn, implementation="xla"), make_segments("documents", 2, 29))


def chosen(monkeypatch, kind, tensor=1, block=None, dtype=jnp.bfloat16, width=128, **options):
    fields = {"device_kind": kind, "axis_names": ("tensor",), "shape": {"tensor": tensor}, "manual_axes": ()}
    mesh = type("Mesh", (), fields)
    mesh.abstract_device = mesh
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    selection = None if block is None else make_selection(block=block)
    return fused.kernel(jax.ShapeDtypeStruct((1, 256, 2, width), dtype), selection, **options)


def test_kernels_follow_the_devices_of_the_mesh(monkeypatch, caplog):
    monkeypatch.setattr(fused, "_has_cudnn", lambda: True)
    assert chosen(monkeypatch, "cpu") is None and chosen(monkeypatch, "cpu", block=128) is None
    assert chosen(monkeypatch, "TPU v5").func is fused.attend_splash
    assert chosen(monkeypatch, "TPU v5", block=128).func is kernels.attend
    assert chosen(monkeypatch, "NVIDIA H100 80GB HBM3") is fused.attend_cudnn
    assert AbstractMesh((), ()).abstract_device is None
    monkeypatch.setattr(fused, "_has_cudnn", lambda: False)
    assert chosen(monkeypatch, "NVIDIA H100") is None


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("NVIDIA H100", {"softcap": 30.0}, "windows are 256 tokens in bfloat16, softcap 30"),
        ("NVIDIA H100", {"block": 128}, "cuDNN does not attend: keys are selected"),
        ("TPU v5", {"tensor": 2}, "XLA cannot split it over tensor"),
        ("TPU v5", {"block": 0}, "single tokens are selected, not blocks"),
        ("TPU v5", {"block": 64}, "blocks are 64 tokens, not a multiple of 128"),
        ("TPU v5", {"block": 128, "dtype": jnp.float16}, "queries are float16"),
        ("TPU v5", {"block": 128, "width": 2**14}, "128 queries of 2 heads of 16384 are more than"),
    ],
)
def test_what_no_kernel_takes_is_said_once(monkeypatch, caplog, kind, options, why):
    fused._say.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert all(chosen(monkeypatch, kind, **options) is None for _ in range(3))
    (record,) = caplog.records
    assert why in record.message and record.message.endswith("XLA does, as model.query_chunk says")


@pytest.mark.parametrize("attention", ["dense", "gated_sparse"])
def test_the_module_calls_the_kernel(monkeypatch, tiny, attention):
    chosen(monkeypatch, "TPU v5")
    config = tiny(attention=attention, selection="block", block=128, head_width=128, query_chunk=64)
    x, segments = jnp.zeros((1, 256, config.d_model)), jnp.zeros((1, 256), jnp.int32)
    rotation = make_rotation(jnp.arange(256)[None], 128, 1e4)
    jaxpr = jax.make_jaxpr(lambda: Attention(config, rngs=nnx.Rngs(0))(x, segments, rotation)[0])()
    assert "pallas_call" in str(jaxpr)
