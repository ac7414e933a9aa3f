import os

import jax
import pytest
from jax.sharding import PartitionSpec as P

from atlas.training.config import MeshConfig
from atlas.training.mesh import AXES, check_divisible, initialize_distributed, make_mesh, parameter_sharding
from checked import UserError


def mesh_of(run: int, data: int, fsdp: int, tensor: int) -> jax.sharding.AbstractMesh:
    return jax.sharding.AbstractMesh((run, data, fsdp, tensor), AXES)


def test_data_axis_takes_the_devices_that_are_left():
    assert dict(make_mesh(MeshConfig()).shape) == {"run": 1, "data": jax.device_count(), "fsdp": 1, "tensor": 1}


def test_mesh_that_does_not_fill_the_devices():
    with pytest.raises(UserError, match=r"tensor=64 needs .* devices, there are"):
        make_mesh(MeshConfig(tensor=64))


def test_rules_shard_what_divides_and_replicate_what_does_not():
    mesh = mesh_of(1, 1, 2, 4)
    query = parameter_sharding(mesh, ("embed", "heads", "head"), (1, 3, 64, 8, 16))
    assert query.spec == P("run", None, "fsdp", "tensor", None)
    key = parameter_sharding(mesh, ("embed", "kv_heads", "head"), (1, 3, 64, 2, 16))
    assert key.spec == P("run", None, "fsdp", None, None)


@pytest.mark.parametrize(("batch", "population", "message"), [(6, 2, "batch_size=6"), (8, 3, "population of 3")])
def test_batches_and_populations_must_divide(batch, population, message):
    with pytest.raises(UserError, match=message):
        check_divisible(mesh_of(2, 2, 2, 1), batch, population)


def test_half_given_environment_is_named(monkeypatch):
    monkeypatch.setattr(os, "environ", {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_PROCESS_ID": "0"})
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES"):
        initialize_distributed()
