"""Synthetic retrieval tasks after RULER (arXiv 2404.06654), at lengths and in words that small byte models can learn.

A document states facts between pieces of filler and ends in questions with their answers, `?K7`:

    needle     one fact `K7` at a random depth, and the question for it
    multikey   four facts with different keys and values, and a question for each, in random order
    tracking   two chains of assignments `A7`, `BA`, `CB` (B is A, C is B), interleaved, and a question for the last
               key of each, in random order

Keys are capitals, values digits, and the filler is one run of lower-case sentences that goes on after each fact: facts
are all there is to remember. Only the first answer of a document is scored, as the later ones could be had by
elimination; they are there to be learnt from. Guessing any digit is right in every tenth document; a model that finds
the values and ignores the keys is right in every fourth of `multikey` and every second of `tracking`.

RULER has 13 tasks of 4K to 128K tokens in English prompts, with needles of seven digits, words or UUIDs in noise or
essays, lets a model generate and searches its text for the answer; its variable tracking asks for the names of a
chain. Ours are asked in the form that they are trained in and scored under teacher forcing: accuracies compare our
models with each other, and none of them with RULER's.

Documents with their separator are exactly as long as a window, or a half, a quarter … of it down to SHORTEST tokens,
and each window holds whole documents of one length.
"""

import hashlib
from collections.abc import Iterator

import numpy as np

TASKS = ("needle", "multikey", "tracking")
SHORTEST = 32

_FILLER = "the sky is blue. the grass is green. the sun is warm. the sea is deep. "
_KEYS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
_VALUES = tuple("0123456789")
_QUESTION = "?"
_NEEDLES, _CHAINS, _CHAIN_LENGTH = 4, 2, 3


def lengths(window: int) -> tuple[int, ...]:
    """Tokens of the documents that fit a window of T tokens, separator included, ascending.

    >>> lengths(128), lengths(48)
    ((32, 64, 128), (48,))
    """
    found = [window]
    while found[-1] % 2 == 0 and found[-1] // 2 >= SHORTEST:
        found.append(found[-1] // 2)
    return tuple(reversed(found))


def documents(task: str, split: str, num_bytes: int, window: int, seed: int) -> Iterator[str]:
    """Documents of a split that fill the fewest windows with `num_bytes` bytes; the same for the same arguments.

    Each text is a byte shorter than its length in tokens: its separator follows.

    >>> next(documents("tracking", "train", 1, 32, 0))
    'U1 T9tPThe seDPaXU is MXd?M1?D9'
    """
    digest = hashlib.blake2b(f"{seed}/{task}/{split}".encode(), digest_size=8).digest()
    random = np.random.default_rng(int.from_bytes(digest))
    sizes = lengths(window)
    for _ in range(-(-num_bytes // window)):
        length = sizes[random.integers(len(sizes))]
        for _ in range(window // length):
            yield _document(task, length - 1, random)


def answers(tokens_NS: np.ndarray, separator: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the scored answers in whole windows of a task are.

    Args:
      tokens_NS: int32 [N, T+1] windows.
      separator: id of the token after each document.

    Returns:
      For each of A documents in order: its row, the position of its answer among the row's T targets, and its length
      in tokens; int64 [A] each.
    """
    inputs_NT = tokens_NS[:, :-1]
    rows, ends = np.nonzero(inputs_NT == separator)
    opens = np.append(True, rows[1:] != rows[:-1])
    starts = np.where(opens, 0, np.append(0, ends[:-1] + 1))
    # The first question of each document, on the line of all rows one after another.
    questions = np.flatnonzero(inputs_NT == ord(_QUESTION))
    first = questions[np.searchsorted(questions, rows * inputs_NT.shape[1] + starts)] % inputs_NT.shape[1]
    # A question's key follows it, and the key's target is the answer.
    return rows, first + 1, ends + 1 - starts


def _document(task: str, size: int, random: np.random.Generator) -> str:
    facts, asked = _chains(random) if task == "tracking" else _needles(1 if task == "needle" else _NEEDLES, random)
    questions = "".join(_QUESTION + asked[i] for i in random.permutation(len(asked)))
    room = size - len(questions) - sum(map(len, facts))
    cuts = np.sort(random.integers(room + 1, size=len(facts)))
    start = int(random.integers(len(_FILLER)))
    filler = (_FILLER * (2 + room // len(_FILLER)))[start : start + room]
    pieces = [filler[i:j] for i, j in zip([0, *cuts], [*cuts, room], strict=True)]
    return "".join(piece + fact for piece, fact in zip(pieces, [*facts, questions], strict=True))


def _needles(count: int, random: np.random.Generator) -> tuple[list[str], list[str]]:
    """Facts in the order of the document, and the facts that are asked for."""
    keys, values = random.choice(_KEYS, count, replace=False), random.choice(_VALUES, count, replace=False)
    facts = [str(key + value) for key, value in zip(keys, values, strict=True)]
    return facts, facts


def _chains(random: np.random.Generator) -> tuple[list[str], list[str]]:
    """As `_needles`; the assignments of a chain keep their order, and chains are interleaved at random."""
    keys = random.choice(_KEYS, (_CHAINS, _CHAIN_LENGTH), replace=False)
    values = random.choice(_VALUES, _CHAINS, replace=False)
    links = [iter(zip(keys[c], [values[c], *keys[c]], strict=False)) for c in range(_CHAINS)]
    order = random.permutation(np.repeat(np.arange(_CHAINS), _CHAIN_LENGTH))
    facts = ["".join(next(links[chain])) for chain in order]
    return facts, [str(keys[c, -1] + values[c]) for c in range(_CHAINS)]
