import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.atlas.training.devices import BASE
from tests.experiments.binaries import host_devices

KINDS = {
    "dense": {"model.attention": "dense"},
    "tokens": {"model.attention": "gated_sparse"},
    "gated": {"model.attention": "gated"},
    "tiles": {"model.attention": "gated", "model.query_chunk": 8},
    "token tiles": {"model.attention": "sparse", "model.query_chunk": 8},
    "blocks": {"model.attention": "gated_sparse", "model.selection": "block", "model.block": 8},
}
QUICK = ("tokens",)
ONE, FSDP = {}, {"mesh.fsdp": 8}
MIXED = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
PARTS = {"train.microbatches": 4}
kinds = pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in QUICK else pytest.mark.thorough) for kind in KINDS]
)


@pytest.fixture(scope="module")
def measured():
    """What each kind gives on one device, on eight, and in microbatches; a process a kind."""
    found = {}

    def of(kind: str) -> list[dict]:
        if kind not in found:
            ways = (ONE, FSDP, PARTS) if kind in QUICK else (ONE, FSDP, PARTS, MIXED, FSDP | {"train.microbatches": 2})
            cases = json.dumps([KINDS[kind] | way for way in ways])
            command = [sys.executable, "-m", "tests.atlas.training.devices", cases]
            done = subprocess.run(command, env=os.environ | host_devices(8), capture_output=True, text=True, check=True)
            found[kind] = json.loads(done.stdout.splitlines()[-1])
        return found[kind]

    return of


@kinds
def test_many_devices_and_microbatches_train_like_one_device(measured, kind):
    one, *others = measured(kind)
    for other in others:
        # A mean over layers of what is largest in a part is not that of the whole.
        for name in one["metrics"].keys() - {"largest_activation"}:
            np.testing.assert_allclose(other["metrics"][name], one["metrics"][name], rtol=2e-6, err_msg=name)
        for name, value in one["sums"].items():
            np.testing.assert_allclose(other["sums"][name], value, rtol=2e-6, atol=2e-6, err_msg=name)


@kinds
def test_fsdp_gathers_weights_and_scatters_gradients_and_keeps_windows_apart(measured, kind):
    fsdp = measured(kind)[1]
    model, sizes = BASE.model, fsdp["sizes"]
    vectors = 4 * 8 * model.d_model  # bytes that metrics and the gradients of vectors may take
    activations = 4 * 16 * 32 * model.d_model  # of all windows: never on one device
    assert all(size < vectors for opcode, size, _ in sizes if opcode.startswith(("all-reduce", "all-to-all")))
    gathered = [times for opcode, size, times in sizes if opcode.startswith("all-gather")]
    scattered = [times for opcode, size, times in sizes if opcode.startswith("reduce-scatter")]
    assert max(size for _, size, _ in sizes) < activations
    # A layer's matrices are gathered in the forward and in the backward pass, where those of the indexer are not
    # needed, for its gradient ends with it; each gradient is scattered once.
    assert set(scattered) == set(gathered) == {1, model.layers}
    indexer = 3 if "sparse" in KINDS[kind]["model.attention"] else 0
    assert gathered.count(model.layers) == 2 * scattered.count(model.layers) - indexer


def test_temporaries_fall_with_the_number_of_devices():
    cases = json.dumps([{"mesh.fsdp": 2}, {"mesh.fsdp": 8}])
    command = [sys.executable, "-m", "tests.atlas.training.devices", cases]
    done = subprocess.run(command, env=os.environ | host_devices(8), capture_output=True, text=True, check=True)
    two, eight = (case["temporaries"] for case in json.loads(done.stdout.splitlines()[-1]))
    assert eight < 0.35 * two
