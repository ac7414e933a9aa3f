import json

import jax
import pytest

from atlas.training import MeshConfig, ahead, chips
from atlas.training.ahead import SPARE, report, savings, shapes
from checked import UserError, overlay
from configs import atlas_paper, quickstart
from experiments.compile import verdict
from tests.compilers import needs
from tests.experiments.binaries import run_binaries

PLAN = {"model.dtype": "bfloat16", "model.remat": "full", "model.loss_chunk": 4096, "mesh.data": 1}


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
@pytest.mark.parametrize(("scale", "topology", "parts", "most"), [(0, "v5p:2x2x1", 4, 1.3), (46, "v5p:4x4x4", 8, 10)])
def test_the_papers_smallest_and_largest_steps_fit(scale, topology, parts, most):
    """most: GiB of temporaries, a tenth above what the committed table has."""
    found = compiled(scale, topology, {"mesh.fsdp": -1, "train.microbatches": parts})
    step, n, held, total = found["programs"]["step"], found["chips"], found["held"], found["parameters"]["total"]
    assert found["fits"] and step["peak"] <= (1 - SPARE) * chips.CHIPS["v5p"].memory
    assert step["temporaries"] < most * chips.GIB
    assert sum(held.values()) == pytest.approx(3 * 4 * total / n, rel=0.01)
    assert sum(held.values()) <= step["arguments"] < 1.15 * sum(held.values())  # tiles of a chip are padded
    # A part of a batch gathers all matrices twice, in bfloat16, and scatters their gradients once; where XLA takes
    # all-reduces in their place, it receives twice as much. Activations are never among it.
    passes = sum(kind["bytes"] for kind in step["collectives"].values()) / (2 * total * parts) * n / (n - 1)
    assert 3 <= passes <= 6.1


@needs("libtpu")
def test_a_mesh_that_cannot_be():
    config = overlay(quickstart.get_config(), {"mesh.data": 3})
    with pytest.raises(UserError, match="needs 3 devices, there are 4; change"):
        report(config, "v5p:2x2x1")


def in_turn(config, sizes: dict, slices: int, excess: float) -> list[dict]:
    return list(savings(config, {"run": 1, "context": 1, "tensor": 1} | sizes, slices, excess))


def test_what_saves_memory_in_its_order():
    long = overlay(atlas_paper.get_config("46"), {"train.batch_size": 32, "data.window": 131_072})
    last = {"mesh.data": 1, "mesh.fsdp": 8, "mesh.context": 16, "train.microbatches": 4}
    assert in_turn(long, {"data": 1, "fsdp": 32, "context": 4}, 1, 1.3) == [
        {"model.remat": "full", "model.loss_chunk": 4096},
        {"model.query_chunk": 256},
        last,
    ]
    spare = {"model.remat": "full", "model.loss_chunk": 1024, "model.query_chunk": 64}
    long = overlay(long, spare | {"train.batch_size": 128})
    assert in_turn(long, {"data": 16, "fsdp": 2}, 1, 1.3) == [
        {"mesh.data": 1, "mesh.fsdp": 32},
        {"train.microbatches": 4},
        last | {"mesh.context": 4, "train.microbatches": 16},
    ]


def test_data_alone_spans_slices():
    first, *_, last = in_turn(atlas_paper.get_config(), {"data": 8, "fsdp": 2}, 2, 9.0)
    assert first == {"mesh.data": 2, "mesh.fsdp": 8}
    assert last == {"mesh.data": 2, "mesh.fsdp": 1, "mesh.context": 8, "train.microbatches": 128}
    one = {"data": 1, "fsdp": 1}
    assert not any("mesh.fsdp" in change for change in in_turn(atlas_paper.get_config(), one, 1, 9.0))


def test_a_change_that_cannot_be_is_left_out(monkeypatch):
    """The others are kept, until the step fits."""
    tried = []

    def fake(config, *_, **__):
        tried.append((config.mesh.fsdp, config.model.remat, config.train.microbatches))
        if config.mesh.fsdp != 1:
            raise UserError("it does not divide")
        return {"fits": config.train.microbatches > 1, "programs": {"step": {"peak": 7}}}

    monkeypatch.setattr(ahead, "topology", lambda name: (None, jax.devices()[:1]))
    monkeypatch.setattr(ahead, "report", fake)
    changes = ({"mesh.fsdp": 4}, {"model.remat": "full"}, {"train.microbatches": 2}, {"model.query_chunk": 8})
    monkeypatch.setattr(ahead, "savings", lambda *_: iter(changes))
    found = ahead._change(atlas_paper.get_config(), "", 1, 2.0)
    assert found == {"model.remat": "full", "train.microbatches": 2, "peak": 7}
    assert tried == [(4, "none", 0), (1, "full", 0), (1, "full", 2)]


def test_a_verdict_names_what_fits():
    found = {"memory": 2**34, "fits": False, "programs": {"step": {"peak": 2**35}}}
    change = {"model.remat": "full", "mesh.context": 4, "peak": 2**33}
    assert verdict(found) == (
        "does not fit: 32.00 GiB of 16.00 GiB, of which 10% should be spare; more chips, or a smaller batch"
    )
    assert verdict(found | {"change": change}).endswith(
        "; fits in 8.00 GiB with --config.model.remat=full --config.mesh.context=4"
    )
    assert verdict({"memory": 100, "fits": True, "programs": {"step": {"peak": 75}}}) == "fits, with 25% to spare"


@pytest.mark.thorough
@needs("jax_cuda12_plugin")
def test_the_command_says_what_fits_and_ends_so(tmp_path):
    """Of two sizes of batch; the second does not fit on a chip, but in parts."""
    command = ["experiments.compile", "--config=configs/quickstart.py", "--topology=h100:1", "--programs=step"]
    command += ["--config.model.attention=dense", "--config.model.remat=full", "--config.model.loss_chunk=256"]
    batches = ["--config.train.batch_size=64", "--config.train.batch_size=1048576"]
    small, large = run_binaries(*([*command, batch, f"--json={tmp_path / 'found.json'}"] for batch in batches))
    assert (small.returncode, large.returncode) == (0, 2), small.stderr + large.stderr
    (found,) = json.loads((tmp_path / "found.json").read_text())["runs"]
    assert small.stdout.splitlines()[-1].startswith("  fits, with ") and not found["fits"]
    parts = found["change"]["train.microbatches"]
    assert large.stdout.splitlines()[-1].endswith(f" GiB with --config.train.microbatches={parts}")
    assert found["change"]["peak"] <= (1 - SPARE) * found["memory"]


def test_a_sweep_is_its_distinct_shapes():
    runs = quickstart.get_sweep(quickstart.get_config()).plan
    found = shapes(runs)
    assert [(run.model.d_model, run.model.layers) for run in found] == [(16, 2), (32, 2), (48, 2)]
    assert all(run.mesh == MeshConfig() for run in found)
