import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import selection as reference
from models.attention.kernels import scores
from models.attention.keys import in_documents
from tests.models.attention.inputs import make_inputs, make_segments, make_selection

FIELDS = [
    {"block": 4, "k_base": 9, "k_max": 16},
    {"block": 4, "k_rule": "inverse", "keep_first": 3, "keep_local": 10},
    {"block": 5, "k_rule": "fixed", "k_base": 12},
]


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("ties", [False, True])
def test_lists_are_those_of_whole_scores(fields, ties):
    """77 keys are three steps of 8 blocks, the last one ragged."""
    index = make_inputs(T=77, ties=ties, I=2 if ties else 5)[3]
    selection, segments = make_selection(**fields), make_segments("documents", 2, 77)
    reads = in_documents(segments)._replace(index=index, running_variance=jnp.asarray(0.01))
    expected = jax.jit(lambda: reference.select_blocks(reads, selection))()
    actual = jax.jit(lambda: scores.select_blocks(reads, selection, interpret=True))()
    np.testing.assert_array_equal(actual[0], expected[0])
    if expected[1] is None:
        assert actual[1] is None
    else:
        np.testing.assert_allclose(actual[1], expected[1], rtol=1e-5, atol=1e-7)
