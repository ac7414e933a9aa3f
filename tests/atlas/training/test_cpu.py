import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from atlas.data import DataConfig
from atlas.training import RunConfig, TrainConfig
from atlas.training.config import MeshConfig, shape_of
from atlas.training.mesh import make_mesh
from atlas.training.program import program_of
from atlas.training.step import NO_COOLDOWN
from configs.design import decoder

WINDOW, ROWS = 128, 16


def trained(parts: int) -> tuple[list[float], dict[str, jax.Array], int]:
    """Losses of two steps, the parameters after them, and bytes of temporary memory."""
    base = RunConfig(model=decoder((16, 1), WINDOW, "gated"), data=DataConfig(window=WINDOW))
    config = dataclasses.replace(base, train=TrainConfig(batch_size=ROWS, microbatches=parts))
    program = program_of(shape_of(config), (256, 257, 288), 1, 1, make_mesh(MeshConfig()))
    tokens = np.random.default_rng(0).integers(
        0, 258, (2, 1, ROWS, WINDOW + 1), np.int32
    )  # separators and padding, too
    state, languages, losses = program.init(jnp.zeros(1, jnp.int32)), np.zeros((1, ROWS), np.int32), []
    step = program.step.lower(state, tokens[0], languages, NO_COOLDOWN).compile()
    for batch in tokens:
        state, metrics = step(state, batch, languages, NO_COOLDOWN)
        losses.append(float(metrics["loss"][0]))
    return losses, state.params, step.memory_analysis().temp_size_in_bytes


def test_a_batch_in_parts_that_caches_hold_trains_like_one():
    (losses, params, memory), (expected, of_one, whole) = trained(0), trained(1)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    for name, value in params.items():
        np.testing.assert_allclose(value, of_one[name], rtol=0, atol=1e-6, err_msg=name)
    assert memory < 0.5 * whole
