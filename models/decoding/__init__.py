"""Decoding: plain, and lossless with drafts by any small model, whatever its vocabulary."""

from models.decoding.comparison import compare, tokens_per_second
from models.decoding.generate import METHODS, VERIFICATIONS, Written, write
from models.decoding.language_model import LanguageModel, Voice, make_voice
from models.decoding.settings import Sampling
from models.decoding.text import write_text
from models.decoding.tokenizers import ByteTokenizer, Utf8Stream, load_tokenizer
from models.decoding.vocabulary import VocabularyMap

__all__ = [
    "METHODS",
    "VERIFICATIONS",
    "ByteTokenizer",
    "LanguageModel",
    "Sampling",
    "Utf8Stream",
    "VocabularyMap",
    "Voice",
    "Written",
    "compare",
    "load_tokenizer",
    "make_voice",
    "tokens_per_second",
    "write",
    "write_text",
]
