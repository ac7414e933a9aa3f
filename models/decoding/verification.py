"""Verification of drafts: how many are accepted, and what follows them.

A drafter proposes K tokens x_1..x_K for every row; the target scores C = K + 1 positions in one pass, the last
one after all drafts. V is the target's vocabulary, W the drafter's, X their intersection. A drafter with another
vocabulary takes part through a proposal over target tokens,

- token-level intersection: `project` its logits, draw from their law, `scatter` that law to V;
- string-level rejection: the law of its retokenised block (`models.decoding.slrs`).

`rejection` and `block` return the exact law of what is committed, an `Outcome`, from which `draw` draws. They
are lossless if and only if q is the very law that the drafts were drawn from, and if a decision to draft no
further looked at drawn tokens alone. `exact` compares the drafts with tokens already drawn from the target:
greedy decoding, string-level exact match, prompt lookup and drafter-invariant (coupled) sampling, for which any
draft will do.

Sources: Leviathan et al. (arXiv 2211.17192), Sun et al. (arXiv 2403.10444), Timor et al. (arXiv 2502.05202).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.decoding.sampling import choose


class Outcome(NamedTuple):
    """The law of one verification, given the drafts.

    count [B, C]: the probability that exactly n = 0..K drafts are accepted. The other fields make the law of
    the token that follows them (`next_law`): p [B, C, V] and q [B, K, V] as given to the verification,
    scale [B, C], and n_draft [B].
    """

    count: jax.Array
    p: jax.Array
    q: jax.Array
    scale: jax.Array
    n_draft: jax.Array

    def next_law(self, n_B: jax.Array) -> jax.Array:
        """The law [B, V] of the token after n_B accepted drafts: max(scale · p - q, 0), normalised.

        After the last draft there is no q to subtract. Where nothing is left, p = q and no draft is rejected
        but by rounding; the law is then p.
        """
        p_BV = _row(self.p, n_B)
        q_BV = _row(self.q, jnp.minimum(n_B, self.q.shape[1] - 1))
        q_BV = jnp.where((n_B < self.n_draft)[:, None], q_BV, 0)
        rest_BV = jnp.maximum(_row(self.scale, n_B)[:, None] * p_BV - q_BV, 0)
        total_B1 = jnp.sum(rest_BV, axis=-1, keepdims=True)
        return jnp.where(total_B1 > 0, rest_BV / jnp.where(total_B1 > 0, total_B1, 1), p_BV)


def draw(keys_B: jax.Array, outcome: Outcome) -> tuple[jax.Array, jax.Array]:
    """Draws the number of accepted drafts and the token after them, both int32 [B].

    Args:
      keys_B: typed PRNG keys [B]. A row's draw depends on its own key and its own outcome only.
    """

    def noise(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        count_key, next_key = jax.random.split(key)
        shape_C, shape_V = outcome.count.shape[1:], outcome.p.shape[2:]
        return (
            jax.random.gumbel(count_key, shape_C, outcome.count.dtype, mode="high"),
            jax.random.gumbel(next_key, shape_V, outcome.p.dtype, mode="high"),
        )

    count_noise_BC, next_noise_BV = jax.vmap(noise)(keys_B)
    n_B = choose(outcome.count, count_noise_BC)
    return n_B, choose(outcome.next_law(n_B), next_noise_BV)


def rejection(p_BCV: jax.Array, q_BKV: jax.Array, drafts_BK: jax.Array, n_draft_B: jax.Array) -> Outcome:
    """Speculative sampling: each draft is accepted with probability min(1, p/q), until one is not.

    Args:
      p_BCV: the target's laws; row i is that of the token after i drafts.
      q_BKV: the laws that the drafts were drawn from, on target tokens.
      drafts_BK: int32 target tokens; K is at least 1.
      n_draft_B: int32, how many drafts of a row count, 0 to K. Whatever is beyond is ignored.
    """
    accept_BK = _ratio(_at(p_BCV[:, :-1], drafts_BK), _at(q_BKV, drafts_BK))
    accept_BK = jnp.where(_drafted(drafts_BK, n_draft_B), accept_BK, 0)
    reach_BC = jnp.cumprod(jnp.pad(accept_BK, ((0, 0), (1, 0)), constant_values=1), axis=1)
    count_BC = reach_BC * (1 - jnp.pad(accept_BK, ((0, 0), (0, 1))))
    return Outcome(count_BC, p_BCV, q_BKV, jnp.ones_like(count_BC), n_draft_B)


def block(p_BCV: jax.Array, q_BKV: jax.Array, drafts_BK: jax.Array, n_draft_B: jax.Array) -> Outcome:
    """Block verification (arXiv 2403.10444, Algorithm 2): accepts the longest prefix that the block supports.

    The target's mass that reaches a draft, relative to the drafter's, is w_0 = 1, w_i = min(1, w_(i-1) p/q).
    With s_i = Σ_v max(w_i p(v) - q(v), 0) after i drafts, prefix i is accepted with probability
    s_i / (s_i + 1 - w_i), the whole block with w_n, the longest accepted prefix wins, and the residual is
    max(w_i p - q, 0). It accepts at least as many drafts as `rejection` in expectation. The paper's proof,
    read node by node, also holds for blocks whose length depends on the drawn tokens.

    Arguments are those of `rejection`.
    """

    def reach(w_B: jax.Array, draft: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        w_B = _ratio(w_B * draft[0], draft[1])
        return w_B, w_B

    laws_KB = (_at(p_BCV[:, :-1], drafts_BK).T, _at(q_BKV, drafts_BK).T)
    _, w_KB = jax.lax.scan(reach, jnp.ones_like(laws_KB[0][0]), laws_KB)
    w_BC = jnp.pad(w_KB.T, ((0, 0), (1, 0)), constant_values=1)
    rest_BK = jnp.sum(jnp.maximum(w_BC[:, :-1, None] * p_BCV[:, :-1] - q_BKV, 0), axis=-1)
    accept_BK = _ratio(rest_BK, rest_BK + (1 - w_BC[:, :-1]))
    # Nothing is accepted before the first draft: prefix 0 takes what the longer ones leave.
    accept_BC = jnp.pad(accept_BK[:, 1:], ((0, 0), (1, 1)), constant_values=1)
    position_C = jnp.arange(p_BCV.shape[1])
    accept_BC = jnp.where(position_C < n_draft_B[:, None], accept_BC, 0)
    accept_BC = jnp.where(position_C == n_draft_B[:, None], w_BC, accept_BC)
    refuse_BC = jnp.pad(1 - accept_BC[:, 1:], ((0, 0), (0, 1)), constant_values=1)
    longer_BC = jnp.cumprod(refuse_BC[:, ::-1], axis=1)[:, ::-1]
    return Outcome(accept_BC * longer_BC, p_BCV, q_BKV, w_BC, n_draft_B)


def exact(samples_BC: jax.Array, drafts_BK: jax.Array, n_draft_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Accepts drafts while they equal the target's own samples; the first sample that differs follows them.

    Lossless for every draft: the committed tokens are samples of the target, and the drafts decide only how
    many of them are committed.

    Args:
      samples_BC: int32 [B, K+1], token i drawn from the target's law after i drafts.
      drafts_BK, n_draft_B: as in `rejection`.

    Returns:
      The number of accepted drafts and the next token, both int32 [B].

    >>> exact(jnp.array([[5, 6, 7]]), jnp.array([[5, 9]]), jnp.array([2]))
    (Array([1], dtype=int32), Array([6], dtype=int32))
    """
    match_BK = (samples_BC[:, :-1] == drafts_BK) & _drafted(drafts_BK, n_draft_B)
    n_B = jnp.sum(jnp.cumprod(match_BK, axis=1, dtype=jnp.int32), axis=1, dtype=jnp.int32)
    return n_B, _row(samples_BC, n_B)


def project(logits_BW: jax.Array, draft_ids_X: jax.Array) -> jax.Array:
    """A drafter's logits [..., W] on the intersection of the vocabularies only, [..., X] (token-level intersection).

    The softmax of the result is q' = q / Σ q over the intersection; to `warp` the result cuts within it, so
    that top-k and top-p always leave a token. Columns that no tokenizer knows (padding) drop out.

    Args:
      draft_ids_X: int32 [X], the drafter's ids of the shared tokens; X is at least 1.
    """
    if not draft_ids_X.shape[0]:
        raise ValueError("tli: the vocabularies share no token, empty intersection; use slem, lookup or plain decoding")
    return logits_BW[..., draft_ids_X]


def scatter(law_BX: jax.Array, target_ids_X: jax.Array, vocab_size: int) -> jax.Array:
    """A law on the intersection [..., X] as one on the target's vocabulary [..., V], 0 elsewhere.

    Drafter tokens with the same target token add up: this is the law of target_ids_X[x] for x drawn from law_BX.

    >>> scatter(jnp.array([0.5, 0.25, 0.25]), jnp.array([3, 0, 3]), 5).tolist()
    [0.25, 0.0, 0.0, 0.75, 0.0]
    """
    empty_BV = jnp.zeros((*law_BX.shape[:-1], vocab_size), law_BX.dtype)
    return empty_BV.at[..., target_ids_X].add(law_BX)


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
    """min(1, part / whole): exactly 1 where part = whole > 0, and 0 where part = 0, even over 0."""
    less = part < whole
    return jnp.where(less, part / jnp.where(less, whole, 1), (part > 0).astype(part.dtype))


def _row(x_BC: jax.Array, n_B: jax.Array) -> jax.Array:
    """x[b, n[b]] of every row."""
    return jax.vmap(lambda x_C, n: x_C[n])(x_BC, n_B)


def _at(law_BKV: jax.Array, tokens_BK: jax.Array) -> jax.Array:
    return jnp.take_along_axis(law_BKV, tokens_BK[..., None], axis=-1)[..., 0]


def _drafted(drafts_BK: jax.Array, n_draft_B: jax.Array) -> jax.Array:
    return jnp.arange(drafts_BK.shape[1]) < n_draft_B[:, None]
