import os

import jax
import pytest
from jax.sharding import PartitionSpec as P

from atlas.training.config import MeshConfig, RunConfig, TrainConfig
from atlas.training.mesh import AXES, check_divisible, initialize_distributed, make_mesh, parameter_sharding
from checked import UserError, overlay


def mesh_of(run: int, data: int, fsdp: int, tensor: int, context: int = 1) -> jax.sharding.AbstractMesh:
    return jax.sharding.AbstractMesh((run, data, fsdp, context, tensor), AXES)


def test_data_axis_takes_the_devices_that_are_left():
    assert dict(make_mesh(MeshConfig()).shape) == dict.fromkeys(AXES, 1) | {"data": jax.device_count()}


def test_mesh_that_does_not_fill_the_devices():
    with pytest.raises(UserError, match=r"tensor=64 needs .* devices, there are"):
        make_mesh(MeshConfig(tensor=64))


def test_rules_shard_what_divides_and_replicate_what_does_not():
    mesh = mesh_of(1, 1, 2, 4, context=2)
    query = parameter_sharding(mesh, ("embed", "heads", "head"), (1, 3, 64, 8, 16))
    assert query.spec == P("run", None, ("fsdp", "context"), "tensor", None)
    key = parameter_sharding(mesh, ("embed", "kv_heads", "head"), (1, 3, 64, 2, 16))
    assert key.spec == P("run", None, ("fsdp", "context"), None, None)


@pytest.mark.parametrize(("batch", "population", "message"), [(6, 2, "batch_size=6"), (8, 3, "population of 3")])
def test_batches_and_populations_must_divide(batch, population, message):
    with pytest.raises(UserError, match=message):
        check_divisible(mesh_of(2, 2, 2, 1), RunConfig(train=TrainConfig(batch_size=batch)), population)


def test_microbatches_and_widths_must_divide():
    mesh = mesh_of(1, 2, 3, 1)
    with pytest.raises(UserError, match=r"6 devices × 4 microbatches"):
        check_divisible(mesh, RunConfig(train=TrainConfig(batch_size=12, microbatches=4)), 1)
    with pytest.raises(UserError, match=r"d_model=64 does not divide over mesh\.fsdp=3;"):
        check_divisible(mesh, RunConfig(train=TrainConfig(batch_size=12)), 1)
    with pytest.raises(UserError, match=r"d_model=64 does not divide over mesh\.fsdp=2 × mesh\.context=3;"):
        check_divisible(mesh_of(1, 1, 2, 1, context=3), RunConfig(), 1)


def test_windows_must_divide_into_whole_blocks():
    def check(**changes):
        check_divisible(mesh_of(1, 1, 1, 1, context=4), overlay(RunConfig(), changes), 1)

    check(**{"data.window": 96})
    with pytest.raises(UserError, match=r"data\.window=98 does not divide over mesh\.context=4; use a multiple"):
        check(**{"data.window": 98})
    blocks = {"model.attention": "sparse", "model.selection": "block", "model.block": 32}
    with pytest.raises(UserError, match=r"data\.window=96 does not divide over mesh\.context=4 in blocks of 32; use"):
        check(**{"data.window": 96}, **blocks)


def test_only_data_spans_slices():
    class Chip:
        platform = device_kind = "fake"

        def __init__(self, number: int):
            self.id, self.slice_index = number, number % 2

    chips = [Chip(number) for number in range(8)]
    mesh = make_mesh(MeshConfig(data=4, fsdp=2), chips)
    assert {tuple(chip.slice_index for chip in row) for row in mesh.devices.reshape(4, 2)} == {(0, 0), (1, 1)}
    assert [chip.slice_index for chip in mesh.devices[0, :, 0, 0, 0]] == [0, 0, 1, 1]
    with pytest.raises(UserError, match=r"mesh\.data=1 must be a multiple of the 2 slices"):
        make_mesh(MeshConfig(data=1, fsdp=8), chips)


def test_half_given_environment_is_named(monkeypatch):
    monkeypatch.setattr(os, "environ", {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_PROCESS_ID": "0"})
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES"):
        initialize_distributed()
