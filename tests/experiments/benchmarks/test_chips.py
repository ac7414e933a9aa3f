import jax
import pytest
from jax.sharding import SingleDeviceSharding

from atlas.training.chips import topology
from atlas.training.executable import flops
from experiments.benchmarks import chips
from experiments.benchmarks.attention import ACCELERATOR, Shape
from tests.compilers import needs


def test_flops_are_those_of_the_program():
    """Of lists that are full: four tiles with the same four blocks, most of which the queries do not see yet."""
    shape, T = Shape(2, 1, 128, 1, 64, "bfloat16"), 4 * 128
    traced = chips.trace(chips.blocks, shape, T, SingleDeviceSharding(jax.devices()[0]))
    padded = 8 * 128 / T  # scored keys are padded to whole steps
    scores, *others = (part.flops for part in chips.parts(shape, T, pairs=4 * 4))
    assert flops(traced.jaxpr) == pytest.approx(padded * scores + sum(others))


@pytest.mark.thorough
@needs("libtpu")
@pytest.mark.parametrize("chip", chips.TOPOLOGIES)
def test_training_compiles(chip):
    device = SingleDeviceSharding(topology(chips.TOPOLOGIES[chip])[1][0])
    text = chips.trace(chips.blocks, ACCELERATOR, 4096, device).lower().compile().as_text()
    # Scores; attention; its divergence; gradients of queries, and of keys.
    assert text.count('custom_call_target="tpu_custom_call"') == 5
