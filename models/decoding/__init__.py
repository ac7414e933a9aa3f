"""Decoding: plain, and lossless with drafts by any small model, whatever its vocabulary."""

from models.decoding.comparison import compare, rates
from models.decoding.generate import METHODS, VERIFICATIONS, Written, write
from models.decoding.language_model import LanguageModel, Voice, make_voice
from models.decoding.sampling import Sampling
from models.decoding.text import write_text
from models.decoding.tokenizers import ByteView, load_tokenizer

__all__ = [
    "METHODS",
    "VERIFICATIONS",
    "ByteView",
    "LanguageModel",
    "Sampling",
    "Voice",
    "Written",
    "compare",
    "load_tokenizer",
    "make_voice",
    "rates",
    "write",
    "write_text",
]
