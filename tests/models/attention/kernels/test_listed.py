import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import kernels, oracle
from models.attention.kernels import listed
from tests.models.attention.inputs import (
    assert_near,
    make_inputs,
    make_segments,
    make_selection,
    run,
    splice,
    value_and_gradients,
)

ATTEND = functools.partial(kernels.attend, interpret=True)


@pytest.fixture(autouse=True)
def few_together(monkeypatch):
    """Several steps a list, at lengths that are tested quickly."""
    monkeypatch.setattr(listed, "_TOGETHER", 8)


CASES = [
    # name, segments, shape, selection
    ("documents", "documents", {"T": 37}, {"block": 4, "k_base": 9, "k_max": 16}),
    ("kept", "padded", {"T": 33, "J": 1}, {"block": 8, "k_rule": "inverse", "keep_first": 3, "keep_local": 10}),
    ("fixed", "documents", {"T": 21, "G": 4}, {"block": 5, "k_rule": "fixed", "k_base": 1, "keep_first": 7}),
    ("one group", "padded", {"T": 32, "H": 3, "G": 1}, {"block": 4, "k_rule": "fixed", "k_base": 12}),
    ("everything", "one", {"T": 16, "B": 1}, {"block": 4, "k_rule": "fixed", "k_base": 16}),
    ("one block", "one", {"T": 5}, {"block": 8, "k_rule": "fixed"}),
    ("ties", "documents", {"T": 29, "ties": True, "I": 2}, {"block": 4, "k_rule": "fixed", "k_base": 8}),
]


@pytest.mark.parametrize(
    ("segments", "shape", "fields"),
    [pytest.param(*c[1:], id=c[0], marks=[pytest.mark.thorough] * (c[0] != "documents")) for c in CASES],
)
def test_kernels_by_interpretation_are_the_oracle(segments, shape, fields):
    inputs = make_inputs(**shape)
    segments, selection = make_segments(segments, *inputs[0].shape[:2]), make_selection(**fields)
    expected = value_and_gradients(oracle.attend, inputs, segments, selection)
    actual = value_and_gradients(ATTEND, inputs, segments, selection)
    assert_near(actual, expected, 1e-5)


@pytest.mark.thorough
def test_bfloat16_is_near_the_oracle():
    """With the bounds of `streamed.attend`, whose roundings are the same."""
    inputs = make_inputs(dtype=jnp.bfloat16)
    segments, selection = make_segments("documents", 2, 29), make_selection(block=4)
    expected = value_and_gradients(oracle.attend, inputs, segments, selection)
    actual = value_and_gradients(ATTEND, inputs, segments, selection)
    assert_near(actual[0].output, expected[0].output, 2**-8)
    assert_near(actual[0][1:], expected[0][1:], 1e-5)
    assert_near(actual[1][:3], expected[1][:3], 2**-6)
    assert_near(actual[1][3], expected[1][3], 1e-5)


@pytest.mark.thorough
def test_no_query_depends_on_later_tokens():
    inputs, others = make_inputs(seed=1), make_inputs(seed=2)
    segments, selection = make_segments("documents", 2, 29), make_selection(block=4)
    forward = jax.jit(lambda inputs: run(ATTEND, inputs, segments, selection))
    expected = forward(inputs)
    for t in range(1, 29):
        changed = forward(splice(inputs, others, t))
        for a, e in zip(jax.tree.leaves(changed), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(a[:, :t], e[:, :t])
