"""Trained models at positions that no training window had: the loss of a document's tokens by their place in it."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from atlas.data import Corpus
from atlas.training.step import Arrays, Skeleton
from models import ModelConfig
from models.config import ATTENTION_KINDS

BEYOND = 4  # times the training window: how far models are read
_DOCUMENTS = 64  # of validation, of each language at most
_CHUNK = 32  # tokens that extend a cache at a time


def edges(window: int) -> list[int]:
    """Positions at which losses are parted: doublings up to BEYOND windows.

    >>> edges(128)
    [0, 32, 64, 128, 256, 512]
    """
    doublings = itertools.takewhile(lambda n: n <= BEYOND * window, (window // 4 * 2**i for i in itertools.count()))
    return [0, *doublings]


def long_documents(corpus: Corpus, language: str, length: int) -> np.ndarray:
    """The first tokens of validation documents that have so many, separator first: int32 [n, length + 1]."""
    held_out = corpus.windows(language, "validation")
    stream = np.concatenate([window[1:] for window in held_out[np.arange(len(held_out))]])
    starts = np.flatnonzero(stream == corpus.tokenizer.separator)
    ends = np.append(starts[1:], len(stream))
    whole = starts[ends - starts > length][:_DOCUMENTS]
    return stream[whole[:, None] + np.arange(length + 1)]


class PositionReader:
    """Reads documents through the cache, compiled once for models of one shape."""

    def __init__(self, config: ModelConfig, corpus: Corpus, languages: list[str]):
        tokenizer, self._edges, self._kind = corpus.tokenizer, edges(corpus.window), config.attention
        skeleton = Skeleton(dataclasses.replace(config, vocab_size=tokenizer.vocab_size))
        found = [long_documents(corpus, language, self._edges[-1]) for language in languages]
        self._tokens_NS = np.concatenate(found)
        sizes = [corpus.token_bytes(language, "validation") for language in languages]
        bytes_NT = [size[tokens[:, 1:]] for size, tokens in zip(sizes, found, strict=True)]
        self._bytes_T = np.concatenate(bytes_NT).sum(0)
        self._losses = jax.jit(functools.partial(_losses, skeleton))

    def read(self, model: dict[str, Arrays]) -> Iterator[tuple[int, int, float]]:
        """Bits per byte between two positions: (from, to, loss), none where no document is so long, or no cache knows
        the attention."""
        if not len(self._tokens_NS) or self._kind not in ATTENTION_KINDS:
            return
        nats_T = np.asarray(self._losses(model, self._tokens_NS), np.float64).sum(0)
        for start, stop in itertools.pairwise(self._edges):
            yield start, stop, float(nats_T[start:stop].sum() / self._bytes_T[start:stop].sum() / np.log(2))


def _losses(skeleton: Skeleton, model: dict[str, Arrays], tokens_NS: jax.Array) -> jax.Array:
    """Nats of every token after the first, [N, S - 1], each predicted through the cache."""
    decoder = skeleton.merge(model["params"], model["buffers"])
    N, T = tokens_NS.shape[0], tokens_NS.shape[1] - 1

    def step(cache, start):
        inputs_NC, targets_NC = (jax.lax.dynamic_slice_in_dim(tokens_NS, at, _CHUNK, 1) for at in (start, start + 1))
        logits_NCV, cache = decoder.extend(inputs_NC, cache)
        log_p_NCV = jax.nn.log_softmax(logits_NCV)
        nats_NC = -jnp.take_along_axis(log_p_NCV, targets_NC[..., None], axis=-1)[..., 0]
        return cache.advance(jnp.full((N,), _CHUNK, jnp.int32)), nats_NC

    _, nats_ZNC = jax.lax.scan(step, decoder.init_cache(N, T), jnp.arange(0, T, _CHUNK))
    return nats_ZNC.swapaxes(0, 1).reshape(N, T)
