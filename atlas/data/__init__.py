"""Multilingual text as fixed windows of tokens: corpora, tokenizers, mixtures and deterministic batches."""

from atlas.data.batches import Batch, Sampler
from atlas.data.config import DataConfig
from atlas.data.corpus import Corpus, fingerprint, languages_of, load, prepare, prepare_part

__all__ = ["Batch", "Corpus", "DataConfig", "Sampler", "fingerprint", "languages_of", "load", "prepare", "prepare_part"]
