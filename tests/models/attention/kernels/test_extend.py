import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from atlas.training.chips import topology
from models.attention import cache, kernels
from models.attention.keys import IndexInputs, Reads
from models.attention.selection import extend_lists, list_length
from tests.compilers import needs
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


def decoded(q, layer, position, query, gate, bias, selection):
    index = IndexInputs(query, layer.index_key, gate, bias)
    return cache.attend(q, layer, Reads(position, jnp.zeros_like(position), index, jnp.zeros(())), selection)


@pytest.mark.thorough
@needs("libtpu")
@pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_decoding_compiles_for_tpus_and_copies_no_slots(chip):
    """One token of four rows of 131,072 slots, and five to verify; 16 heads of 128, 8 key/value heads."""
    mesh = Mesh(np.array(topology(chip)[1][:1]), ("data",), axis_types=(AxisType.Auto,))
    rows, slots, G, J, I, half = 4, 2**17, 8, 4, 64, jnp.bfloat16
    selection = make_selection(block=128, k_rule="fixed", k_base=2048)

    def of(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=NamedSharding(mesh, P()))

    lists = of(slots // 128, list_length(selection, slots), dtype=jnp.int32)
    layer = cache.LayerCache(of(slots, G, 128, dtype=half), of(slots, G, 128, dtype=half), of(slots, I), lists)
    for C in (1, 5):
        queries = of(C, 16, 128, dtype=half), layer, of(C, dtype=jnp.int32), of(C, J, I), of(C, J)
        with jax.set_mesh(mesh):
            extend = jax.jit(functools.partial(decoded, selection=selection), donate_argnums=1)
            compiled = extend.lower(*queries, jax.ShapeDtypeStruct((J,), jnp.float32)).compile()
        assert "tpu_custom_call" in compiled.as_text()
        assert compiled.memory_analysis().temp_size_in_bytes < 2**25  # slots of keys are 2**30
