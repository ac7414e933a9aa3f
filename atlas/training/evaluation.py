"""Evaluation by language, in nats per token and in bits per byte."""

import dataclasses

import numpy as np

from atlas.data import Corpus


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """Validation windows of every language, padded to whole chunks of one language each.

    tokens: int32 [C, B, T+1]. language: int32 [C], the language of a chunk. targets, num_bytes: float64 [K],
    predicted tokens and the bytes of text that they stand for.
    """

    tokens: np.ndarray
    language: np.ndarray
    targets: np.ndarray
    num_bytes: np.ndarray

    def losses(self, nats_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(bits per byte, nats per token) float64 [K] each, from the nats summed over each chunk."""
        nats_K = np.bincount(self.language, weights=nats_C.astype(np.float64), minlength=len(self.targets))
        return nats_K / (np.log(2) * self.num_bytes), nats_K / self.targets


def evaluation_set(corpus: Corpus, windows: int, batch_size: int) -> EvaluationSet:
    """The first `windows` validation windows of each language in chunks of `batch_size`."""
    padding, token_bytes = corpus.tokenizer.padding, corpus.tokenizer.token_bytes
    chunks, languages, targets, num_bytes = [], [], [], []
    for number, language in enumerate(corpus.languages):
        count = min(windows, corpus.num_windows(language, "validation"))
        rows = corpus.windows(language, "validation").rows(np.arange(count))
        whole = -(-count // batch_size) * batch_size
        filled = np.full((whole, rows.shape[1]), padding, np.int32)
        filled[:count] = rows
        real = rows[:, 1:][rows[:, 1:] != padding]
        targets.append(real.size)
        num_bytes.append(token_bytes[real].sum())
        chunks.append(filled.reshape(-1, batch_size, rows.shape[1]))
        languages += [number] * len(chunks[-1])
    return EvaluationSet(
        np.concatenate(chunks), np.array(languages), np.array(targets, float), np.array(num_bytes, float)
    )
