"""The linear system of the joint fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas.scaling.joint import system
from atlas.scaling.joint.system import PHI, TAU


@pytest.mark.parametrize("sources", [0, 3])
def test_slopes_are_the_derivatives_of_the_law(sources):
    """Of every parameter, in and beyond the first epoch, with repetition of the target's or of the sources."""
    random = np.random.default_rng(0)
    n, s = 6, 3
    with jax.enable_x64(True):
        theta = jnp.array(random.normal(scale=0.3, size=(2, TAU + s)))
        direct = jnp.array(random.normal(scale=0.3, size=PHI + 1 + sources))
        N, D = random.lognormal(size=n), random.lognormal(size=(n, s))
        U = np.where(np.arange(n * s).reshape(n, s) % 2, np.inf, 0.3 * D)
        target = np.arange(n) % 2
        value, slope = system.slopes(theta, direct, N, D, U, target)
        by_row = jax.vmap(jax.value_and_grad(system.log_loss, (0, 1)), (0, None, 0, 0, 0))
        expected, parts = by_row(theta[target], direct, N, D, U)
    np.testing.assert_allclose(value, expected, rtol=1e-14)
    np.testing.assert_allclose(slope, np.concatenate(parts, -1), rtol=1e-12, atol=1e-15)
