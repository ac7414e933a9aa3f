import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import cache, kernels
from models.attention.keys import Reads
from models.attention.selection import extend_lists, list_length
from tests.models.attention.inputs import make_inputs, make_selection

S, W = 48, 8
SELECTION = make_selection(block=W, k_base=20, k_max=24, keep_first=3)


CASES = [(5, (6, 17)), (1, (0, 29)), (1, (15, 16)), (9, (7, 39))]


@pytest.mark.parametrize(
    ("C", "start"), [CASES[0], *(pytest.param(*case, marks=pytest.mark.thorough) for case in CASES[1:])], ids=str
)
def test_decoding_by_interpretation_is_that_of_the_cache(C, start):
    """Rows stand at their own positions; of five queries some lie in the next tile."""
    q, k, v, index = make_inputs(T=S, seed=3)
    lists = jnp.full((2, S // W, list_length(SELECTION, S)), -1, jnp.int32)
    whole = Reads(jnp.tile(jnp.arange(S), (2, 1)), jnp.zeros((2, S), jnp.int32), index, jnp.asarray(0.01))
    layer = cache.LayerCache(k, v, index.key, extend_lists(lists, whole, SELECTION))
    at = jnp.array(start)[:, None] + jnp.arange(C)
    new = jax.tree.map(
        lambda a: jnp.take_along_axis(a, at.reshape(2, C, *[1] * (a.ndim - 2)), axis=1), (q, index[0], index[2])
    )
    reads = Reads(at, jnp.zeros_like(at), index._replace(query=new[1], gate=new[2]), jnp.asarray(0.01))
    expected, layer = cache.attend(new[0], layer, reads, SELECTION)
    actual = kernels.extend(new[0], k, v, layer.lists, reads, W, interpret=True)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)


def test_prompts_are_no_extensions():
    q = jax.ShapeDtypeStruct((1, 17, 2, 128), jnp.bfloat16)
    assert kernels.refusal_of_extension(q, make_selection(block=128)) == "17 new tokens are more than 16"
    q = jax.ShapeDtypeStruct((1, 16, 2, 128), jnp.bfloat16)
    assert kernels.refusal_of_extension(q, make_selection(block=128)) == ""
