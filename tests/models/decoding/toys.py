"""Tiny models over toy vocabularies whose tokens nest, and the exact laws of what they write."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import ModelConfig
from models.decoding import ByteView, LanguageModel, Voice
from tests.models.making import make_decoder

TARGET = (b"a", b"b", b"ab", b"aab", b"c")
DRAFT = (b"a", b"b", b"c", b"abc")


def tokenizer(words, *, end=True):
    """Longest match first; ids are places in `words`, and the end of text comes behind them."""
    order = sorted(range(len(words)), key=lambda i: -len(words[i]))

    @functools.cache
    def spelling(text):
        ids, at = [], 0
        while at < len(text):
            found = [i for i in order if text.startswith(words[i], at)]
            if not found:  # what the vocabulary cannot spell
                at += 1
                continue
            ids.append(found[0])
            at += len(words[found[0]])
        return ids

    def encode(text, left):
        return list(spelling(text))

    roles = {"bos": (), "eos": (len(words),) if end else (), "pad": (), "unk": ()}
    return ByteView((*words, *([None] if end else [])), encode, roles=roles)


@functools.cache
def voice(words, seed, *, end=True, rows=6, dtype="float64", peak=1.0, **fields):
    """A random model; what is left of `rows` of its vocabulary belongs to no token, `peak` sharpens its laws."""
    own = tokenizer(words, end=end)
    model, decoder = _decoder(rows or own.vocab_size, seed, dtype, tuple(fields.items()))
    decoder.embedding[...] = decoder.embedding[...] * peak
    return Voice(model, tuple(jax.tree.leaves(nnx.state(decoder.unstack()))), own)


_MODELS = {}


def _decoder(vocab_size, seed, dtype, fields):
    """A decoder, and the one `LanguageModel` of all that have its shape: programs are compiled once a model."""
    config = ModelConfig(
        d_model=8,
        heads=2,
        kv_heads=1,
        head_width=4,
        d_ff=16,
        vocab_size=vocab_size,
        dtype=dtype,
        indexer_heads=1,
        indexer_width=4,
        k_base=4,
        k_min=2,
        k_max=8,
        **{"layers": 1} | dict(fields),
    )
    decoder = make_decoder(config, seed)
    key = (vocab_size, dtype, fields)
    if key not in _MODELS:
        graphdef, state = nnx.split(decoder.unstack())
        _MODELS[key] = LanguageModel(graphdef, jax.tree.structure(state), vocab_size)
    return _MODELS[key], decoder


def exact_law(target, prompt, n, min_p=0.0, repetition_penalty=1.0):
    """Probabilities [V]*n of the next n tokens at temperature 1."""
    V = target.model.vocab_size
    strings = np.array(list(itertools.product(range(V), repeat=n)), np.int32)
    rows = np.concatenate([np.tile(prompt, (len(strings), 1)), strings], axis=1)
    cache = target.model.init_cache(target.params, len(rows), rows.shape[1])
    logits, _ = jax.jit(target.model.extend)(target.params, jnp.asarray(rows), cache)
    logits, law = np.asarray(logits[:, len(prompt) - 1 : -1], float), np.ones(len(strings))
    for row, string in enumerate(strings):
        for i, token in enumerate(string):
            own, seen = logits[row, i].copy(), [*prompt, *string[:i]]
            own[seen] = np.where(own > 0, own / repetition_penalty, own * repetition_penalty)[seen]
            weight = np.exp(own - own.max())
            weight[weight < min_p] = 0
            law[row] *= weight[token] / weight.sum()
    return law.reshape((V,) * n)
