import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from atlas.training.executable import Text, flops

SQUARE = jax.ShapeDtypeStruct((64, 64), jnp.float32)
PRODUCT = 2.0 * 64**3


def repeated(x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda c, _: (jnp.tanh(c @ c), None), x, None, length=5)[0]


@pytest.mark.parametrize(
    ("function", "products"),
    [
        (repeated, 5),
        (jax.grad(lambda x: repeated(x).sum()), 15),
        (jax.grad(lambda x: jax.checkpoint(repeated)(x).sum()), 20),  # rematerialised, the forward pass counts twice
        (lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x), 2),
        (jax.vmap(lambda row: jnp.ones((64, 64)) @ row), 1),
    ],
)
def test_flops_count_loops_by_their_length(function, products):
    assert flops(jax.make_jaxpr(function)(SQUARE)) == products * PRODUCT


def test_flops_of_all_devices():
    mesh = jax.sharding.AbstractMesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.shard_map(lambda x: x @ jnp.ones((64, 64)), mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert flops(jax.make_jaxpr(split)(SQUARE)) == PRODUCT


def test_text_of_a_loop():
    text = Text(jax.jit(repeated).lower(SQUARE).compile().as_text())
    size = 4 * 64 * 64
    # A product reads and writes a matrix, and so does the tangent where the compiler does not fuse it.
    assert 5 * 2 * size <= text.traffic() <= 5 * 5 * size
    largest = text.largest()[0]
    assert largest["bytes"] == size and "f32[64,64]" in largest["shape"]
    assert text.collectives() == {}


COLLECTIVES = """
ENTRY %main (p: f32[8]) -> f32[64] {
  %p = bf16[1024]{0:T(1024)(128)(2,1)} parameter(0)
  %a = bf16[4096]{0:T(1024)(128)(2,1)} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}
  %s = (bf16[1024]{0}, bf16[4096]{0}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={0}
  %b = f32[256]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %c = f32[64]{0} all-reduce(%y), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""


def test_bytes_that_a_device_receives():
    found = Text(COLLECTIVES).collectives()
    assert found["all-gather"] == {"count": 2, "bytes": 2 * 2 * 4096 * 3 / 4}
    assert found["reduce-scatter"] == {"count": 1, "bytes": 4 * 256 * 3}
    assert found["all-reduce"] == {"count": 1, "bytes": 2 * 4 * 64 * 3 / 4}


LOOP = """
%condition (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(16), metadata={op_name="x"}
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %sum = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  ROOT %next = (s32[]{:T(128)}, f32[8]{0}) tuple(%i, %sum)
}

ENTRY %main (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, f32[8]{0}) while(%p), condition=%condition, body=%bodyKNOWN
}
"""


@pytest.mark.parametrize(
    ("known", "trips"), [("", 16), (', backend_config={"known_trip_count":{"n":"3"}}', 3)], ids=["tpu", "known"]
)
def test_loops_whose_length_only_the_condition_tells(known, trips):
    assert Text(LOOP.replace("KNOWN", known)).collectives()["all-reduce"] == {"count": trips, "bytes": trips * 32.0}
