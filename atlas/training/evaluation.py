"""Evaluation by language, in nats per token and in bits per byte; retrieval tasks, in exact matches."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from atlas.data import Corpus, tasks
from models import Decoder, document_segments


@dataclasses.dataclass(frozen=True)
class EvaluationSet:
    """Validation windows of every language, padded to whole chunks of one language each.

    tokens: int32 [C, B, T+1]. scored: bool [C, B, T], the targets that a loss is the mean of: all of a language, and of
    a task the answers, since its filler says nothing of it. language: int32 [C], the language of a chunk. targets,
    num_bytes: float64 [K], scored tokens and the bytes of text that they stand for.
    """

    tokens: np.ndarray
    scored: np.ndarray
    language: np.ndarray
    targets: np.ndarray
    num_bytes: np.ndarray

    def losses(self, nats_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(bits per byte, nats per token) float64 [K] each, from the nats summed over each chunk."""
        nats_K = np.bincount(self.language, weights=nats_C.astype(np.float64), minlength=len(self.targets))
        return nats_K / (np.log(2) * self.num_bytes), nats_K / self.targets


def evaluation_set(corpus: Corpus, windows: int, batch_size: int, tasks_of: Sequence[str] = ()) -> EvaluationSet:
    """The first `windows` validation windows of each language in chunks of `batch_size`; `tasks_of` are its tasks."""
    padding, separator = corpus.tokenizer.padding, corpus.tokenizer.separator
    chunks, marks, languages, targets, num_bytes = [], [], [], [], []
    for number, language in enumerate(corpus.languages):
        held_out = corpus.windows(language, "validation")
        count = min(windows, len(held_out))
        rows = held_out[np.arange(count)]
        whole = -(-count // batch_size) * batch_size
        filled = np.full((whole, rows.shape[1]), padding, np.int32)
        filled[:count] = rows
        scored = filled[:, 1:] != padding
        if language in tasks_of:
            scored = np.zeros_like(scored)
            scored[tasks.answers(filled, separator)[:2]] = True
        real = filled[:, 1:][scored]
        targets.append(real.size)
        num_bytes.append(corpus.token_bytes(language, "validation")[real].sum())
        chunks.append(filled.reshape(-1, batch_size, rows.shape[1]))
        marks.append(scored.reshape(-1, batch_size, rows.shape[1] - 1))
        languages += [number] * len(chunks[-1])
    each = np.concatenate(chunks), np.concatenate(marks), np.array(languages)
    return EvaluationSet(*each, np.array(targets, float), np.array(num_bytes, float))


def read(model: Decoder, tokens_CBS: jax.Array, separator: int, padding: int) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What a model does with C chunks of windows under teacher forcing.

    Args:
      model: in evaluation nothing of it moves.
      tokens_CBS: int32 [C, B, T+1]; a separator opens a document, and attention stays within one.
      separator, padding: the tokenizer's ids.

    Returns:
      Which targets are the model's first choice, bool [C, B, T], and the decoder's metrics with measure=True, each a
      float32 mean over chunks (of `largest_activation`: the mean over chunks of a chunk's largest).
    """

    def chunk(tokens_BS: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        inputs_BT = tokens_BS[:, :-1]
        segments_BT = document_segments(inputs_BT, separator, padding)
        logits_BTV, metrics = model(inputs_BT, segments_BT, measure=True)
        return jnp.argmax(logits_BTV, axis=-1) == tokens_BS[:, 1:], metrics

    correct_CBT, metrics_C = jax.lax.map(chunk, tokens_CBS)
    return correct_CBT, jax.tree.map(jnp.mean, metrics_C)


def exact_matches(tokens_NS: np.ndarray, correct_NT: np.ndarray, separator: int) -> dict[int, tuple[int, int]]:
    """(answers that match, documents) of a task by document length in tokens, from whole windows and `read`'s marks.

    A document matches if each token of its scored answer is the model's first choice after all tokens before it.
    """
    rows, positions, lengths = tasks.answers(tokens_NS, separator)
    matches = correct_NT[rows, positions]
    return {int(n): (int(matches[lengths == n].sum()), int((lengths == n).sum())) for n in np.unique(lengths)}
