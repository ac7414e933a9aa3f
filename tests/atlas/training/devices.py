"""Steps on 8 host devices: python -m tests.atlas.training.devices '[{"model.attention": "gated"}, …]'.

Of every case, dotted changes of one small run, it prints the loss and the sizes of two steps and what the compiled step
moves between devices, as one line of JSON.
"""

import json
import os
import sys

import jax
import numpy as np

from atlas.data import DataConfig
from atlas.training import MeshConfig, RunConfig, TrainConfig, make_mesh
from atlas.training.executable import Text
from atlas.training.mesh import AXES
from atlas.training.program import program_of
from atlas.training.step import NO_COOLDOWN
from checked import overlay
from models import ModelConfig

SEPARATOR, PADDING, VOCABULARY = 1, 0, 97
# No matrix has the size of activations, and every matrix is larger than all vectors together.
BASE = RunConfig(
    model=ModelConfig(
        d_model=64, layers=2, heads=4, kv_heads=2, head_width=16, d_ff=96, indexer_width=8, k_base=8, k_min=2, k_max=16,
        loss_chunk=16,
    ),
    data=DataConfig(window=32),
    train=TrainConfig(batch_size=16),
    mesh=MeshConfig(data=1),
)  # fmt: skip


def batch(config: RunConfig) -> np.ndarray:
    """Windows int32 [1, B, T+1] with documents and padding, unevenly; a batch of one window has both."""
    shape = 16, config.data.window + 1
    tokens = np.random.default_rng(0).integers(2, VOCABULARY, (1, *shape)).astype(np.int32)
    tokens[:, :5, 7] = SEPARATOR
    tokens[:, 3, 20:] = PADDING
    return tokens[:, 3 : 3 + config.train.batch_size] if config.train.batch_size < 16 else tokens


def measure(changes: dict) -> dict:
    """What two steps of a run give: metrics, a checksum of every parameter and buffer, collectives, temporaries."""
    config = overlay(BASE, changes)
    sizes = [getattr(config.mesh, axis) for axis in AXES]
    mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod(sizes))])
    program = program_of(config, (SEPARATOR, PADDING, VOCABULARY), 2, 1, mesh)
    cooldown = tuple(np.int32(bound) for bound in NO_COOLDOWN)
    with jax.set_mesh(mesh):
        state = program.init(np.zeros(1, np.int32))
        tokens = jax.device_put(batch(config), program.batch_sharding)
        languages = jax.device_put(np.zeros(tokens.shape[:2], np.int32), program.batch_sharding)
        step = program.step.lower(state, tokens, languages, cooldown).compile()
        for _ in range(2):
            state, metrics = step(state, tokens, languages, cooldown)
    text, width = Text(step.as_text()), np.cos(np.arange(1 << 16))
    return {
        "metrics": {name: float(value[0]) for name, value in metrics.items()},
        "sums": {
            name: float(np.asarray(value, np.float64).ravel() @ width[: value.size])
            for name, value in (state.params | state.buffers).items()
        },
        "collectives": text.collectives(),
        "sizes": [
            [i.opcode, i.bytes, i.times] for i in text.instructions if "all-" in i.opcode or "reduce-s" in i.opcode
        ],
        "temporaries": step.memory_analysis().temp_size_in_bytes,
    }


if __name__ == "__main__":
    assert "device_count=8" in os.environ["XLA_FLAGS"]
    print(json.dumps([measure(case) for case in json.loads(sys.argv[1])]))
