import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention.topk import select_mask

S = 23


def expected_mask(scores, k, visible, keep=None):
    """Highest scores first, of equal ones the lower position, by a stable sort of every row."""
    mask = np.zeros(visible.shape, bool)
    for row in np.ndindex(visible.shape[:-1]):
        kept = np.flatnonzero(visible[row] & keep[row]) if keep is not None else np.array([], int)
        rest = np.setdiff1d(np.flatnonzero(visible[row]), kept)
        order = rest[np.argsort(-scores[row][rest], kind="stable")]
        mask[row][np.concatenate([kept, order[: max(k[row] - len(kept), 0)]])] = True
    return mask


def make_case(seed, levels):
    rng = np.random.default_rng(seed)
    scores = rng.random((2, S, S)).astype(np.float32) * 4
    if levels:
        scores = np.floor(scores * levels / 4).astype(np.float32) / levels
    visible = np.tril(np.ones((S, S), bool)) & (rng.random((2, S, S)) < 0.9)
    return scores, rng.integers(1, S + 3, (2, S)), visible, rng


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("levels", [0, 1, 2, 5], ids="levels={}".format)
def test_selection_is_a_stable_sort(seed, levels):
    scores, k, visible, _ = make_case(seed, levels)
    actual = jax.jit(select_mask)(scores, k, visible)
    np.testing.assert_array_equal(actual, expected_mask(scores, k, visible))


@pytest.mark.parametrize("levels", [0, 2])
def test_kept_positions_count_towards_k(levels):
    scores, k, visible, rng = make_case(5, levels)
    keep = rng.random(visible.shape) < 0.2
    actual = select_mask(scores, k, visible, keep)
    np.testing.assert_array_equal(actual, expected_mask(scores, k, visible, keep))


def test_extreme_scores_keep_their_order():
    tiny = np.finfo(np.float32).tiny
    row = np.array([0.0, 1e-30, tiny, 3.9999998, 4.0, 1e-45], np.float32)
    for k in range(1, 7):
        mask = np.asarray(select_mask(row[None, None], np.array([[k]]), np.ones((1, 1, 6), bool)))[0, 0]
        assert set(np.flatnonzero(mask)) == set(np.argsort(-row, kind="stable")[:k])


def test_a_row_that_sees_nothing_selects_nothing():
    mask = select_mask(np.ones((1, 1, 4), np.float32), np.array([[2]]), np.zeros((1, 1, 4), bool))
    assert not mask.any()


def test_float64_scores_are_not_rounded():
    with jax.enable_x64(True):
        scores = jnp.array([[[1.0, 1.0 + 1e-12, 1.0 - 1e-12]]])
        mask = select_mask(scores, jnp.array([[1]]), jnp.ones((1, 1, 3), bool))
    assert mask.tolist() == [[[False, True, False]]]


def test_vmap_selects_the_same():
    cases = [make_case(seed, levels)[:3] for seed, levels in [(0, 0), (1, 2)]]
    stacked = [np.stack(arrays) for arrays in zip(*cases, strict=True)]
    for actual, case in zip(jax.vmap(select_mask)(*stacked), cases, strict=True):
        np.testing.assert_array_equal(actual, expected_mask(*case))
