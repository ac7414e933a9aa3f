import numpy as np
import pytest

from atlas.scaling.planning.allocation import compute_optimal
from checked import UserError

LAW = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37, "lambda": 0.1}


@pytest.mark.parametrize("unique", [np.inf, 3e9, 3e7])
def test_compute_optimal_is_the_minimum(unique):
    best = compute_optimal(LAW, 1e20, unique)
    sizes = np.geomspace(1e6, 1e13, 200_001)
    tokens = 1e20 / 6 / sizes
    repeats = np.maximum(tokens / unique - 1, 0) if np.isfinite(unique) else 0 * tokens
    worth = np.minimum(tokens, unique)
    if np.isfinite(unique):
        worth = worth + unique * (1 - np.exp(-0.1 * repeats)) / 0.1
    loss = LAW["E"] + LAW["A"] / sizes ** LAW["alpha"] + LAW["B"] / worth ** LAW["beta"]
    assert best["loss"] <= loss.min() + 1e-12
    assert best["params"] == pytest.approx(sizes[loss.argmin()], rel=2e-3)
    assert 6 * best["params"] * best["tokens"] == pytest.approx(1e20)


def test_bad_allocations():
    with pytest.raises(UserError, match="positive"):
        compute_optimal(LAW, 0.0)
    with pytest.raises(UserError, match="lacks the parameter"):
        compute_optimal({"E": 1.0}, 1e20)
