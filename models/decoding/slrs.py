"""String-level rejection sampling: a drafter's block of text as a proposal over target tokens.

The drafter draws a block of so many tokens, or fewer if one of them ends the text. The target's tokenizer turns the
whole block into target tokens t_1..t_m, and `block_law` computes their exact law by enumerating every block that the
drafter can draw. ψ(t), the probability that the retokenised block starts with t, is the marginal of its first token
(Timor et al., arXiv 2502.05202, Algorithm 3). It is not the probability that the drafter writes the string t:
that one counts a block for every token its text begins with, sums to more than 1, and biases the output.

The law of the tokens after the first comes for free, so the whole block is a proposal for
`models.decoding.verification`, by `rejection` or `block`, with `BlockLaw.proposal` as q and n_draft = m. The
algorithm of the paper is its case n_draft = 1.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class BlockLaw:
    """The law of the target tokens of a drafter's block: the probability of every retokenised block."""

    probability: Mapping[tuple[int, ...], float]

    def proposal(self, block: tuple[int, ...], vocab_size: int) -> np.ndarray:
        """The laws that a block's tokens were drawn from, float64 [m, V].

        Row i is that of the token after the block's first i, given that these and more are drawn; row 0 is ψ.
        """
        weight_mV = np.zeros((len(block), vocab_size))
        for drawn, probability in self.probability.items():
            for i, token in enumerate(drawn[: len(block)]):
                weight_mV[i, token] += probability
                if token != block[i]:
                    break
        return weight_mV / weight_mV.sum(axis=1, keepdims=True)

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        """A block of target tokens, drawn from the law."""
        weight_N = np.array(list(self.probability.values()))
        return list(self.probability)[rng.choice(len(weight_N), p=weight_N / weight_N.sum())]


def block_law(
    draft_law: Callable[[np.ndarray], np.ndarray],
    retokenise: Callable[[tuple[int, ...]], Sequence[int]],
    length: int,
    stop_tokens: Collection[int],
    cost_limit: int,
) -> BlockLaw:
    """The exact law of a retokenised block, by enumeration of all that the drafter can draw.

    Prefixes are shared: the drafter is asked once for every drawn prefix that goes on, all prefixes of a length in
    one call. Their number grows exponentially with the look-ahead, so a drafter of few tokens is needed, or one
    cut by top-k: what it may draw with probability 0 is not followed.

    Args:
      draft_law: laws of the next drafter token, [n, W], after each of n drawn prefixes, int [n, length].
      retokenise: the target tokens of a block of drafter tokens, a function of the block alone. May be none.
      length, stop_tokens: a block ends after so many drafter tokens, or with the first stop token, which belongs to it.
      cost_limit: the most drafter sequences to follow.

    Raises:
      ValueError: the enumeration exceeds the limit; the count is named.
    """
    prefixes_NT, weight_N = np.zeros((1, 0), int), np.ones(1)
    probability: dict[tuple[int, ...], float] = defaultdict(float)
    sequences = 0
    for drawn in range(1, length + 1):
        law_NW = np.asarray(draft_law(prefixes_NT), np.float64)
        parent, token = np.nonzero(law_NW)
        sequences += len(parent)
        if sequences > cost_limit:
            raise ValueError(
                f"slrs: psi needs {sequences:,} drafter sequences up to a length of {drawn}, the limit is "
                f"{cost_limit:,}; look less far ahead, or cut the drafter with top_k"
            )
        prefixes_NT = np.concatenate([prefixes_NT[parent], token[:, None]], axis=1)
        weight_N = weight_N[parent] * law_NW[parent, token]
        ends_N = np.isin(token, list(stop_tokens)) | (drawn == length)
        for block, weight in zip(prefixes_NT[ends_N].tolist(), weight_N[ends_N].tolist(), strict=True):
            probability[tuple(retokenise(tuple(block)))] += weight
        prefixes_NT, weight_N = prefixes_NT[~ends_N], weight_N[~ends_N]
        if not len(prefixes_NT):
            break
    return BlockLaw(dict(probability))
