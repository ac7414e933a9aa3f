import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention.indexer import index_scores
from models.attention.keys import Reads, in_documents, visible_keys
from models.attention.selection import adaptive_k, list_length, listed_keys, select_blocks, select_tokens
from tests.models.attention.inputs import make_inputs, make_segments, make_selection

B = 2


@pytest.mark.parametrize("rule", ["paper", "inverse"])
def test_adaptive_k_against_numpy(rule):
    variance = np.random.default_rng(0).gamma(1.0, 0.01, (3, 50)).astype(np.float32)
    running = np.float32(0.011)
    ratio = {"paper": variance / running, "inverse": running / variance}[rule]
    expected = np.floor(np.clip(np.float32(20) * ratio, 4, 32)).astype(int)
    selection = make_selection(k_rule=rule, k_base=20, k_min=4, k_max=32)
    actual = adaptive_k(jnp.asarray(variance), jnp.asarray(running), selection)
    np.testing.assert_array_equal(actual, expected)
    assert {4, 32} <= set(expected.ravel()) and len(np.unique(expected)) > 10
    # Without an earlier step, and without a variance.
    assert adaptive_k(jnp.array([0.0, 0.5, 9.0]), jnp.array(0.0), selection).tolist() == [20, 20, 20]
    assert adaptive_k(jnp.zeros(1), jnp.array(0.1), selection).tolist() == [4 if rule == "paper" else 32]


def reads_of(index, segments, running=0.01):
    return in_documents(segments)._replace(index=index, running_variance=jnp.asarray(running, index.key.dtype))


def k_by_hand(scores, rule, running):
    """With the k_base, k_min and k_max of the selection `rule`."""
    if rule.k_rule == "fixed":
        return rule.k_base
    variance = np.var(scores, dtype=np.float32)
    return int(adaptive_k(jnp.asarray([variance]), jnp.float32(running), rule)[0])


@pytest.mark.parametrize("fields", [{"k_rule": "fixed"}, {}, {"keep_first": 1, "keep_local": 2, "k_rule": "inverse"}])
def test_selected_tokens_are_the_kept_and_the_highest_scored(fields):
    T, selection, segments = 12, make_selection(**fields), make_segments("documents", B, 12)
    index = make_inputs(T=T)[3]
    scores, reads = np.asarray(index_scores(index, selection.scale)), reads_of(index, segments)
    selected, _, variance = select_tokens(jnp.asarray(scores), reads, selection)
    assert (variance is None) == (selection.k_rule == "fixed")
    for b, t in np.ndindex(B, T):
        seen = np.arange(reads.first[b, t], t + 1)
        kept = [*seen[: selection.keep_first], *(s for s in seen if t - s < selection.keep_local)]
        rest = np.setdiff1d(seen, kept)
        best = rest[np.argsort(-scores[b, t, rest], kind="stable")]
        k = k_by_hand(scores[b, t, seen], selection, 0.01)
        assert set(np.flatnonzero(selected[b, t])) == {*kept, *best[: max(k - len(set(kept)), 0)]}


@functools.partial(jax.jit, static_argnames="selection")
def lists_of(index, segments, selection):
    return select_blocks(reads_of(index, segments), selection)[0]


def listed_by_hand(index, segments, selection, running=0.01):
    """The selected blocks of every tile as sets, by a stable sort."""
    W, scores = selection.block, np.asarray(index_scores(index, selection.scale))
    for b, first in np.ndindex(segments.shape):
        if first % W:
            continue
        same = [s for s in range(first + 1) if np.all(np.asarray(segments)[b, s : first + 1] == segments[b, first])]
        k = k_by_hand(scores[b, first, same], selection, running)
        latest = [s for s in same if first - s < selection.keep_local]
        kept = {s // W for s in [*same[: selection.keep_first], *latest, first]}
        rest = sorted({s // W for s in same} - kept)
        best = [max(scores[b, first, s] for s in same if s // W == m) for m in rest]
        order = [rest[i] for i in np.argsort(-np.array(best), kind="stable")]
        yield b, first // W, kept | set(order[: max(-(-k // W) - len(kept), 0)])


@pytest.mark.parametrize(
    ("T", "segments", "fields"),
    [
        (24, "one", {"k_rule": "fixed", "block": 4}),
        (37, "documents", {"block": 4}),
        (33, "padded", {"k_rule": "inverse", "keep_first": 3, "keep_local": 10, "block": 8}),
        (21, "documents", {"k_rule": "fixed", "keep_first": 7, "k_base": 1, "block": 5}),
        (5, "one", {"k_rule": "fixed", "block": 8}),
        (16, "one", {"keep_local": 3, "block": 1}),
    ],
)
def test_lists_by_hand(T, segments, fields):
    selection = make_selection(**{"k_base": 9, "k_min": 3, "k_max": 16} | fields)
    segments, index = make_segments(segments, B, T), make_inputs(seed=T, T=T)[3]
    lists = lists_of(index, segments, selection)
    assert lists.dtype == jnp.int32
    assert lists.shape == (B, -(-T // selection.block), list_length(selection, T))
    for b, tile, expected in listed_by_hand(index, segments, selection):
        row = lists[b, tile].tolist()
        assert row == sorted(expected) + [-1] * (len(row) - len(expected))


def test_of_equal_blocks_the_lower_wins():
    index = make_inputs(T=24)[3]
    index = jax.tree.map(jnp.zeros_like, index)._replace(gate=index.gate)
    lists = lists_of(index, make_segments("one", B, 24), make_selection(k_rule="fixed", k_base=9, block=4))
    assert lists[0].tolist() == [[0, -1, -1], [0, 1, -1], [0, 1, 2], [0, 1, 3], [0, 1, 4], [0, 1, 5]]


@pytest.mark.parametrize("keep_first", [1, 2, 6])
def test_no_list_outgrows_its_length(keep_first):
    """Whatever must be kept finds room, wherever the document starts."""
    selection = make_selection(k_rule="fixed", k_base=1, keep_first=keep_first, keep_local=6, block=4)
    index = make_inputs(T=48, B=4)[3]
    segments = jnp.asarray(np.arange(48) >= np.arange(1, 5)[:, None], jnp.int32)
    lists = lists_of(index, segments, selection)
    assert np.max(np.sum(np.asarray(lists) >= 0, axis=-1)) == list_length(selection, 48)


def test_listed_keys_are_the_visible_ones_of_the_listed_blocks():
    lists = jnp.array([[[0, -1], [0, 1], [1, 2]]])
    reads = in_documents(jnp.array([[0, 0, 0, 0, 1, 1, 1, 1]]))
    listed = listed_keys(lists, reads, 8, 3)
    for t, s in np.ndindex(8, 8):
        assert listed[0, t, s] == (s // 3 in lists[0, t // 3].tolist() and 4 * (t > 3) <= s <= t)


def test_selecting_reads_nothing_but_the_past():
    """A key that is not visible may score anything."""
    reads = Reads(jnp.array([[2]]), jnp.array([[1]]), None, jnp.zeros(()))
    scores = jnp.array([[[1.0, 0.3, 0.2, 1.0]]])
    selected, *_ = select_tokens(scores, reads, make_selection(k_rule="fixed", k_base=1))
    assert selected.tolist() == [[[False, True, False, False]]]
    assert not jnp.any(selected & ~visible_keys(reads, jnp.arange(4)))
