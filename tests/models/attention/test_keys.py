import jax.numpy as jnp
import numpy as np

from models.attention.keys import in_documents, in_window, kept_keys, visible_keys

SEGMENTS = jnp.array([[0] * 12, [0] * 3 + [1] * 4 + [2] * 5])
STARTS = np.array([[0] * 12, [0] * 3 + [3] * 4 + [7] * 5])
POSITIONS = jnp.arange(12)


def test_visible_is_causal_within_documents():
    visible = visible_keys(in_documents(SEGMENTS), POSITIONS)
    for b, t, s in np.ndindex(2, 12, 12):
        assert visible[b, t, s] == (s <= t and SEGMENTS[b, s] == SEGMENTS[b, t])


def test_a_window_stays_within_its_document():
    reads = in_window(in_documents(jnp.array([[0, 0, 0, 1, 1]])), 2)
    mask = visible_keys(reads, jnp.arange(5))[0].astype(int)
    assert mask.tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


def test_kept_positions():
    reads = in_documents(SEGMENTS)
    keep = kept_keys(reads, POSITIONS, 1, 2) & visible_keys(reads, POSITIONS)
    for b, t in np.ndindex(2, 12):
        assert set(np.flatnonzero(keep[b, t])) == {STARTS[b, t], t, max(t - 1, STARTS[b, t])}
    assert kept_keys(reads, POSITIONS, 0, 0) is None
