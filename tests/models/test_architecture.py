"""Architectures other than our own: blocks, windows and norms, without the software that they come from."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import Decoder
from models.config import FAMILIES, Architecture, RopeScaling
from models.layers import make_rotation, rms_norm, scaled_norm
from tests.models.making import make_decoder, make_graphdef

WINDOW = 4
MIXED = Architecture(
    family="gemma3", tied_head=False, window=WINDOW, full_layers=(1,), window_rope_base=50.0, query_width=6
)


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, state, tokens_BT, segments_BT=None):
    return nnx.merge(graphdef, state)(tokens_BT, segments_BT)[0]


@functools.partial(jax.jit, static_argnums=0)
def extend(graphdef, state, tokens_BC, cache):
    return nnx.merge(graphdef, state).extend(tokens_BC, cache)


def build(config):
    return nnx.split(make_decoder(config))


def test_windows_reach_one_window_further_with_every_layer(tiny):
    model = build(tiny(architecture=Architecture(family="mistral", window=WINDOW)))
    T, reach = 12, 2 * (WINDOW - 1)
    tokens_T = jax.random.randint(jax.random.key(0), (T,), 0, 30)
    # Row t differs from the last row at token t alone.
    tokens_BT = jnp.tile(tokens_T, (T + 1, 1)).at[jnp.arange(T), jnp.arange(T)].add(1)
    logits = forward(*model, tokens_BT)
    change_BT = np.max(np.abs(logits[:-1] - logits[-1]), axis=-1)
    distance = np.arange(T)[None] - np.arange(T)[:, None]
    seen = (distance >= 0) & (distance <= reach)
    assert np.all(change_BT[~seen] < 1e-5) and np.all(change_BT[seen] > 1e-6)


@pytest.mark.parametrize("fields", [{"scan_layers": False}, {"remat": "full"}])
def test_scan_and_remat_change_nothing_where_layers_differ(tiny, tokens_BS, fields):
    config = tiny(architecture=MIXED, layers=3)
    _, state = build(config)
    other = make_graphdef(dataclasses.replace(config, **fields))
    expected = forward(make_graphdef(config), state, tokens_BS)
    np.testing.assert_allclose(forward(other, state, tokens_BS), expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("attention", [pytest.param("dense", marks=pytest.mark.thorough), "gated"])
def test_windows_in_tiles_are_windows_at_once(tiny, tokens_BS, attention):
    """Tiles of which a window begins in an earlier one, and layers with and without it in one scanned body."""
    config = tiny(architecture=MIXED, layers=3, attention=attention)
    _, state = build(config)
    segments_BT = jnp.cumsum(tokens_BS == 30, axis=1)

    @functools.partial(jax.jit, static_argnums=0)
    def gradient(graphdef, state):
        return jax.value_and_grad(lambda s: jnp.mean(forward(graphdef, s, tokens_BS, segments_BT) ** 2))(state)

    at_once, tiled = (
        gradient(make_graphdef(dataclasses.replace(config, query_chunk=chunk)), state) for chunk in (0, 3)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), at_once, tiled)


def test_tokens_taken_back_leave_no_trace_behind_a_window(tiny):
    """More rejected tokens than the window is long: a ring of slots would have lost what they replaced."""
    model = build(tiny(architecture=MIXED, layers=3))
    tokens_BT = jax.random.permutation(jax.random.key(1), 32)[None, :16]
    expected = forward(*model, tokens_BT)
    cache = nnx.merge(*model).init_cache(1, 16)
    _, cache = extend(*model, tokens_BT[:, :6], cache)
    cache = cache.advance(jnp.array([6]))
    _, cache = extend(*model, 31 - tokens_BT[:, 6:12], cache)
    logits, cache = extend(*model, tokens_BT[:, 6:12], cache.advance(jnp.array([0])))
    np.testing.assert_allclose(logits, expected[:, 6:12], rtol=0, atol=1e-5)


def test_norms_round_where_their_family_does():
    x = jnp.array([[1.0, 2.0, 3.0, 4.0]], jnp.bfloat16)
    scale = nnx.Param(jnp.array([0.3, 1.001, -2.0, 0.5]))
    llama, gemma = (scaled_norm(x, scale, Architecture(family=family)) for family in ("llama", "gemma2"))
    n = rms_norm(x.astype(jnp.float32))
    np.testing.assert_array_equal(llama, n.astype(jnp.bfloat16) * scale[...].astype(jnp.bfloat16))
    np.testing.assert_array_equal(gemma, (n * (1 + scale[...])).astype(jnp.bfloat16))
    assert llama.dtype == gemma.dtype == jnp.bfloat16


def test_llama3_stretches_long_wavelengths_only():
    position = jnp.array([[1]])
    scaling = RopeScaling("llama3", 8.0, 1.0, 4.0, 64)
    angle, plain = (jnp.arccos(make_rotation(position, 16, 1e4, scaling=s).cos[0, 0]) for s in (scaling, RopeScaling()))
    wavelength = 2 * np.pi / plain
    ratio = plain / angle
    np.testing.assert_allclose(ratio[wavelength < 16], 1, rtol=1e-3)
    # arccos of angles near 0 keeps few digits.
    np.testing.assert_allclose(ratio[(wavelength > 64) & (plain > 1e-2)], 8, rtol=0.1)
    between = (wavelength > 16) & (wavelength < 64)
    assert np.sum(between) > 0 and np.all((ratio[between] > 1) & (ratio[between] < 8))


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_other_families_train_and_keep_their_dtype(tiny, tokens_BS, family):
    config = tiny(architecture=dataclasses.replace(MIXED, family=family), dtype="bfloat16")
    graphdef, state = build(config)

    @jax.jit
    @jax.value_and_grad
    def loss(state):
        logits, metrics = nnx.merge(graphdef, state)(tokens_BS)
        assert logits.dtype == jnp.float32 and "largest_activation" in metrics
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 0])

    value, gradient = loss(state)
    assert np.isfinite(value)
    assert all(jnp.any(leaf != 0) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_family_names_its_dimensions(tiny, family):
    params = nnx.eval_shape(lambda: nnx.state(Decoder(tiny(architecture=Architecture(family)), rngs=nnx.Rngs(0))))
    for path, variable in nnx.to_flat_state(params):
        assert len(variable.get_metadata("axes")) == len(variable.shape) - (path[0] == "layers"), path
