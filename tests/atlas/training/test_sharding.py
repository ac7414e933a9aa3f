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
ONE, FSDP, CONTEXT = {}, {"mesh.fsdp": 8}, {"mesh.context": 4, "mesh.fsdp": 2}
IN_HEADS = {"mesh.context": 2, "mesh.tensor": 2}
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
            ways = [ONE, FSDP, CONTEXT, PARTS]
            ways += [] if kind in QUICK else [MIXED, FSDP | {"train.microbatches": 2}, IN_HEADS]
            found[kind] = devices([KINDS[kind] | way for way in ways])
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


@kinds
def test_context_keeps_tokens_apart_and_moves_keys(measured, kind):
    sizes = measured(kind)[2]["sizes"]
    model, windows, tokens = BASE.model, 8, 32
    keys = 4 * windows * tokens * model.kv_heads * model.head_width
    moved = [(opcode, size) for opcode, size, times in sizes if times >= model.layers]
    assert ("all-gather", keys) in {(opcode.removesuffix("-start"), size) for opcode, size in moved}
    assert max(size for _, size in moved) == keys < 4 * windows * tokens * model.d_model


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["tokens", "blocks"])
def test_one_window_trains_on_many_devices_in_a_share_of_the_memory(kind):
    length = {"data.window": 512, "train.batch_size": 1, "model.query_chunk": 8}
    one, *others = devices([KINDS[kind] | length | {"mesh.context": count} for count in (1, 2, 8)])
    for other in others:
        for name, value in one["sums"].items():
            np.testing.assert_allclose(other["sums"][name], value, rtol=2e-6, atol=2e-6, err_msg=name)
    assert others[1]["temporaries"] < 0.35 * others[0]["temporaries"]


def devices(cases: list[dict]) -> list[dict]:
    """What `measure` says of the cases, in a process with 8 devices."""
    command = [sys.executable, "-m", "tests.atlas.training.devices", json.dumps(cases)]
    done = subprocess.run(command, env=os.environ | host_devices(8), capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_temporaries_fall_with_the_number_of_devices():
    two, eight = (case["temporaries"] for case in devices([{"mesh.fsdp": 2}, {"mesh.fsdp": 8}]))
    assert eight < 0.35 * two
