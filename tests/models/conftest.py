"""A tiny configuration for every test of the models."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from models import ModelConfig

SEPARATOR, PADDING = 30, 31


@pytest.fixture
def tiny():
    """Makes a config of two layers that selects 4 of 16 keys; keyword arguments replace fields."""
    base = ModelConfig(d_model=16, layers=2, heads=4, kv_heads=2, head_width=4, d_ff=24, vocab_size=32, indexer_width=4)
    base = dataclasses.replace(base, k_base=4, k_min=2, k_max=8)
    return lambda **fields: dataclasses.replace(base, **fields)


@pytest.fixture(name="tokens_BS")
def make_tokens():
    """Three windows of 16 + 1 tokens; the second has two separators, the third ends in padding."""
    tokens = jax.random.randint(jax.random.key(7), (3, 17), 0, SEPARATOR)
    tokens = tokens.at[1, jnp.array([5, 11])].set(SEPARATOR)
    return tokens.at[2, 12:].set(PADDING)
