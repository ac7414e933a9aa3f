"""Decoding: plain, and lossless with drafts by any small model, whatever its vocabulary.

target, drafter = load("DIRECTORY"), load("SMALL_DIRECTORY")
print(generate(target, ["Once upon a time"], drafter=drafter).texts[0])
"""

from models.decoding.comparison import compare, rates
from models.decoding.directory import export, load
from models.decoding.language_model import LanguageModel, Voice, make_voice
from models.decoding.sampling import Sampling
from models.decoding.text import Generated, generate, stream
from models.decoding.tokenizers import ByteView, load_tokenizer
from models.decoding.writing import METHODS, VERIFICATIONS, Written, write

__all__ = [
    "METHODS",
    "VERIFICATIONS",
    "ByteView",
    "Generated",
    "LanguageModel",
    "Sampling",
    "Voice",
    "Written",
    "compare",
    "export",
    "generate",
    "load",
    "load_tokenizer",
    "make_voice",
    "rates",
    "stream",
    "write",
]
