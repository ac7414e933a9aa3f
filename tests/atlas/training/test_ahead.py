import importlib.util

import pytest

from atlas.training import MeshConfig
from atlas.training.ahead import SPARE, report, shapes
from checked import UserError, overlay
from configs import atlas_paper, quickstart

PLAN = {"model.dtype": "bfloat16", "model.remat": "full", "model.loss_chunk": 4096, "mesh.data": 1}


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not importlib.util.find_spec(module), reason=f"without the extra compile ({module})")


def compiled(scale: int, topology: str, changes: dict) -> dict:
    config = overlay(atlas_paper.get_config(str(scale)), PLAN | changes)
    return report(config, topology, programs=("step",), suggest=False)


@pytest.mark.thorough
@needs("jax_cuda12_plugin")
def test_temporaries_fall_with_the_number_of_chips():
    few, many = (
        compiled(8, f"h100:{chips}", {"mesh.fsdp": chips, "train.batch_size": 64})["programs"]["step"]
        for chips in (4, 16)
    )
    assert many["temporaries"] <= 0.35 * few["temporaries"]
    # XLA may join several matrices in one operation; whole windows are never gathered or summed.
    assert many["collectives"]["reduce-scatter"]["bytes"] > 0
    assert many["collectives"]["all-reduce"]["bytes"] < 0.01 * many["collectives"]["all-gather"]["bytes"]


@pytest.mark.thorough
@needs("libtpu")
@pytest.mark.parametrize(
    ("scale", "topology", "changes"),
    [(0, "v5p:2x2x1", {"mesh.fsdp": 4}), (46, "v5p:4x4x4", {"mesh.fsdp": 64, "train.microbatches": 8})],
)
def test_the_papers_smallest_and_largest_runs_fit(scale, topology, changes):
    found = compiled(scale, topology, changes)
    assert found["fits"] and found["programs"]["step"]["peak"] < (1 - SPARE) * found["memory"]


@needs("libtpu")
def test_a_mesh_that_cannot_be():
    config = overlay(quickstart.get_config(), {"mesh.data": 3})
    with pytest.raises(UserError, match="needs 3 devices, there are 4; change"):
        report(config, "v5p:2x2x1")


def test_a_sweep_is_its_distinct_shapes():
    runs = quickstart.get_sweep(quickstart.get_config()).plan
    found = shapes(runs)
    assert [(run.model.d_model, run.model.layers) for run in found] == [(16, 2), (32, 2), (48, 2)]
    assert all(run.mesh == MeshConfig() for run in found)
