"""Batches as a pure function of (seed, step), by random access.

Two exact constructions carry it. *Which language* the n-th sample has: a binary tree over the languages, in
which a node with share p sends ⌊n·p + 1/2⌋ of its first n samples to the left; counts are therefore known at
any n without a history. *Which window* the k-th sample of a language is: epoch k // U, position k % U,
through a keyed permutation of the U windows.
"""

import functools
import hashlib
import heapq
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from atlas.data.corpus import Corpus

# Shares are fractions of 2^31, so that the split of up to 2^32 samples is exact in 64-bit integers.
_SHARE_BITS = 31
_ROUNDS = 6
# Samples planned at once: planning is vectorised, so its cost a batch falls with the size of the plan.
_PLAN_SAMPLES = 4096


class Batch(NamedTuple):
    """tokens: int32 [B, T+1]; language: int32 [B], positions in the corpus' `languages`."""

    tokens: np.ndarray
    language: np.ndarray


class Sampler:
    """Training batches of a mixture.

    `sampler.batch(step)` depends on the arguments given here and on the step alone, so the data state of a
    checkpoint is its step, and hosts that ask for their own `rows` see together exactly the batch of a single
    host.
    """

    def __init__(self, corpus: Corpus, weights: Mapping[str, float], batch_size: int, seed: int):
        """
        Args:
          corpus: where windows come from.
          weights: shares of the windows by language, positive, summing to 1, as from `mixtures.parse`.
          batch_size: windows a batch, B.
          seed: of the order of the windows within each language's epochs.
        """
        self._width, self._batch_size = corpus.window + 1, batch_size
        self._order = LanguageOrder(list(weights.values()))
        self._windows = [corpus.windows(language, "train") for language in weights]
        self._num_windows = np.array([len(windows) for windows in self._windows], np.int64)
        # Keyed by name, so that a language's order does not depend on which others are in the mixture.
        self._keys = np.array([_key(seed, language) for language in weights], np.uint64)
        self._positions = np.array([corpus.languages.index(language) for language in weights], np.int32)
        self._steps_a_plan = max(1, _PLAN_SAMPLES // batch_size)
        self._plan = functools.lru_cache(maxsize=1)(self._make_plan)

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The batch of a step, or those of its rows that this host needs."""
        block, offset = divmod(step, self._steps_a_plan)
        mine = slice(offset * self._batch_size, (offset + 1) * self._batch_size)
        language, window = (samples[mine][rows] for samples in self._plan(block))
        tokens = np.empty((len(language), self._width), np.int32)
        for i in np.unique(language):
            its = language == i
            tokens[its] = self._windows[i][window[its]]
        return Batch(tokens, self._positions[language])

    def _make_plan(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        samples = self._steps_a_plan * self._batch_size
        language, rank = self._order.at(np.arange(block * samples, (block + 1) * samples))
        epoch, position = np.divmod(rank, self._num_windows[language])
        key = _mix(self._keys[language] + epoch.astype(np.uint64))
        return language, permute(position, self._num_windows[language], key)


class LanguageOrder:
    """An endless sequence of languages that holds its proportions at every length.

    The tree is Huffman's: the two lightest nodes are joined first, so the weights on a path to the root grow
    at least as Fibonacci's numbers do. Each level errs by at most 1/2 around its exact share and passes that
    on in proportion, so

        |count(n) − n·w| ≤ (1 + 1 + 1/2 + 1/3 + 1/5 + …) / 2 < 1.68   for any weights, any number and any n;

    typically it stays near 1, and with two languages it is 1/2.
    """

    def __init__(self, weights: Sequence[float]):
        """Weights [K], positive, summing to 1."""
        K = len(weights)
        self.num_languages = K
        # Leaves are nodes 0..K-1. A leaf sends every sample to itself, so that walks may end at different
        # depths.
        self._share = np.full(2 * K - 1, 1 << _SHARE_BITS, np.int64)
        self._child = np.tile(np.arange(2 * K - 1), (2, 1)).T
        self._depth = 0
        heap = [(weight, node, 0) for node, weight in enumerate(weights)]
        heapq.heapify(heap)
        for node in range(K, 2 * K - 1):
            left, left_node, left_depth = heapq.heappop(heap)
            right, right_node, right_depth = heapq.heappop(heap)
            self._child[node] = left_node, right_node
            self._share[node] = round(left / (left + right) * (1 << _SHARE_BITS))
            self._depth = max(left_depth, right_depth) + 1
            heapq.heappush(heap, (left + right, node, self._depth))

    def at(self, sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Language of each sample, and how many samples of that language precede it; both int64 [n]."""
        node = np.full(sample.shape, 2 * self.num_languages - 2)
        rank = sample.astype(np.int64)
        for _ in range(self._depth):
            before = self._to_left(node, rank)
            goes_right = (self._to_left(node, rank + 1) == before).astype(np.int64)
            rank = np.where(goes_right, rank - before, before)
            node = self._child[node, goes_right]
        return node, rank

    def _to_left(self, node: np.ndarray | int, samples: np.ndarray) -> np.ndarray:
        return (samples * self._share[node] + (1 << _SHARE_BITS - 1)) >> _SHARE_BITS


def permute(position: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Where each position lands in a keyed permutation of 0..size-1.

    A Feistel network over the smallest even number of bits that holds `size`, walked until it lands inside
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Computed for a whole plan at once it
    takes about 1 µs a sample, a tenth of `grain.MapDataset.shuffle`'s index by index, and it needs no table
    where a language has 10^9 windows.

    Args:
      position: int64 [n], below size.
      size: int64 [n], elements of each permutation.
      key: uint64 [n], one permutation a value.
    """
    half = np.ceil(np.log2(np.maximum(size, 2)) / 2).astype(np.uint64)
    mask = (np.uint64(1) << half) - np.uint64(1)
    value = _feistel(position.astype(np.uint64), half, mask, key)
    while len(outside := np.flatnonzero(value >= size.astype(np.uint64))):
        value[outside] = _feistel(value[outside], half[outside], mask[outside], key[outside])
    return value.astype(np.int64)


def _feistel(value: np.ndarray, half: np.ndarray, mask: np.ndarray, key: np.ndarray) -> np.ndarray:
    left, right = value >> half, value & mask
    for r in range(_ROUNDS):
        left, right = right, left ^ (_mix(right + key + np.uint64(r << 32)) & mask)
    return (left << half) | right


def _mix(value: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele et al. 2014): each input bit changes about half of the output's."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")
