import functools
import logging

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from models.attention import fused, oracle
from tests.models.attention.inputs import assert_near, make_inputs, make_segments, value_and_gradients

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


def chosen(monkeypatch, kind, **options):
    device = type("Device", (), {"device_kind": kind})
    mesh = type("Mesh", (), {"abstract_device": device})
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    q = jnp.zeros((1, 64, 2, 16), options.pop("dtype", jnp.bfloat16))
    return fused.kernel(q, **options)


def test_kernels_follow_the_devices_of_the_mesh(monkeypatch, caplog):
    monkeypatch.setattr(fused, "_has_cudnn", lambda: True)
    assert chosen(monkeypatch, "cpu") is None
    assert chosen(monkeypatch, "TPU v5").func is fused.attend_splash
    assert chosen(monkeypatch, "NVIDIA H100 80GB HBM3") is fused.attend_cudnn
    assert AbstractMesh((), ()).abstract_device is None
    with caplog.at_level(logging.WARNING):
        assert all(chosen(monkeypatch, "NVIDIA H100", softcap=30.0) is None for _ in range(3))
    assert len([record for record in caplog.records if "cuDNN does not take" in record.message]) == 1
    monkeypatch.setattr(fused, "_has_cudnn", lambda: False)
    assert chosen(monkeypatch, "NVIDIA H100") is None
