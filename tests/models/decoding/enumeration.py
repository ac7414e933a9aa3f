"""Exact laws of speculative decoding, by enumeration of every draft and every verdict.

A target is a function from a context (a tuple of target tokens) to a law [V]. A method is a function from a
context to its proposals: what may be drafted, with what probability, and the laws that verification is told. A
round maps a context to the law of what one verification commits: for every run of accepted drafts, the masses
[V] of the token after it. All laws are float64.
"""

import functools
import itertools
from collections import defaultdict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from models.decoding.sampling import warp
from models.decoding.slrs import block_law
from models.decoding.verification import exact, project, scatter


class Proposal(NamedTuple):
    """Drafts of target tokens, their probability, the laws q they are verified with, and the length that counts."""

    probability: float
    drafts: tuple[int, ...]
    q: np.ndarray


def random_table(seed, width, zeros=0.25, never_zero=0):
    """Random laws that depend on the whole context; tokens but one have probability 0 at the given rate."""

    @functools.cache
    def law(context):
        rng = np.random.default_rng([seed, *repr(context).encode()])
        weight = rng.dirichlet(np.ones(width)) * (rng.random(width) >= zeros)
        weight[never_zero] += 0.05
        return weight / weight.sum()

    return law


class Vocabulary:
    """Pieces of text; the tokenizer takes the longest piece that matches."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, tokens):
        return "".join(self.pieces[token] for token in tokens)

    def encode(self, text):
        tokens = []
        while text:
            piece = max((piece for piece in self.pieces if text.startswith(piece)), key=len)
            tokens.append(self.pieces.index(piece))
            text = text[len(piece) :]
        return tuple(tokens)


def shared(target, drafter):
    """Ids of the shared pieces in both vocabularies; a piece that the drafter has twice comes twice."""
    pairs = [(target.pieces.index(piece), i) for i, piece in enumerate(drafter.pieces) if piece in target.pieces]
    return np.array(pairs, int).reshape(-1, 2).T


# Proposals.


def drafted(law, drafts, stop=lambda drawn: False):
    """Every sequence of up to `drafts` tokens of one vocabulary, drawn from law(drawn so far)."""

    def extend(probability, drawn, rows):
        if len(drawn) == drafts or (drawn and stop(drawn)):
            return [Proposal(probability, drawn, np.array(rows))]
        row = law(drawn)
        return [
            end for t in np.flatnonzero(row) for end in extend(probability * row[t], (*drawn, int(t)), [*rows, row])
        ]

    return extend(1.0, (), [])


def same_vocabulary(q, drafts, stop=lambda drawn: False):
    return lambda context: drafted(lambda drawn: q(context + drawn), drafts, stop)


@jax.jit
def _project(q_W, draft_ids_X):
    return warp(project(jnp.log(q_W), draft_ids_X), 1.0, 0, 1.0)


def token_level_intersection(target, drafter, q, drafts, vocab_size):
    """The drafter reads the text and its own drafts; it draws from the intersection."""
    target_ids, draft_ids = shared(target, drafter)
    spread = jax.jit(functools.partial(scatter, vocab_size=vocab_size))

    def propose(context):
        text = target.decode(context)

        @functools.cache
        def law(drawn):
            return np.asarray(_project(q((text, *(int(draft_ids[x]) for x in drawn))), draft_ids))

        def on_target(proposal):
            tokens = tuple(int(target_ids[x]) for x in proposal.drafts)
            return Proposal(proposal.probability, tokens, np.asarray(spread(proposal.q, target_ids)))

        return [on_target(proposal) for proposal in drafted(law, drafts)]

    return propose


def retokenised_block(target, drafter, q, length, vocab_size):
    """String-level rejection sampling with a look-ahead of `length` drafter tokens."""

    def propose(context):
        law = string_block_law(target, drafter, q, length, context)
        return [Proposal(weight, block, law.proposal(block, vocab_size)) for block, weight in law.probability.items()]

    return propose


def string_block_law(target, drafter, q, length, context):
    text = target.decode(context)
    return block_law(
        lambda prefixes: np.array([q((text, *prefix)) for prefix in prefixes.tolist()]),
        lambda drawn: target.encode(drafter.decode(drawn)),
        length,
        stop_tokens=(),
        cost_limit=10_000,
    )


def retokenised_drafts(target, drafter, q, length, most):
    """String-level exact match: the retokenised text of sampled drafts, cut to `most` target tokens."""

    def propose(context):
        text = target.decode(context)
        candidates = defaultdict(float)
        for proposal in drafted(lambda drawn: q((text, *drawn)), length):
            candidates[target.encode(drafter.decode(proposal.drafts))[:most]] += proposal.probability
        return [Proposal(weight, tokens, np.zeros((0,))) for tokens, weight in candidates.items()]

    return propose


# Rounds.


@functools.partial(jax.jit, static_argnames="verify")
def _outcome_laws(verify, p_BCV, q_BTV, drafts_BT, n_draft_B):
    outcome = verify(p_BCV, q_BTV, drafts_BT, n_draft_B)
    every_n = jnp.arange(p_BCV.shape[1])
    next_CBV = jax.vmap(lambda n: outcome.next_law(jnp.full(n_draft_B.shape, n)))(every_n)
    return outcome.count, next_CBV


def verified(verify, target_law, propose):
    """Rounds of proposals that a function returning an `Outcome` verifies.

    Beyond the drafts that count, every second row holds NaN and a token that does not exist, and the others hold
    drafts that would be accepted.
    """

    @functools.cache
    def round_law(context):
        proposals = propose(context)
        V, T = len(target_law(context)), max(1, *(len(proposal.drafts) for proposal in proposals))
        rows = 1 << (len(proposals) - 1).bit_length()
        p, q = np.ones((rows, T + 1, V)), np.ones((rows, T, V))
        drafts, n_draft = np.zeros((rows, T), int), np.zeros(rows, int)
        p[::2], q[::2], drafts[::2] = np.nan, np.nan, V + 7
        for row, proposal in enumerate(proposals):
            n_draft[row] = m = len(proposal.drafts)
            p[row, : m + 1] = [target_law(context + proposal.drafts[:i]) for i in range(m + 1)]
            if m:
                drafts[row, :m], q[row, :m] = proposal.drafts, proposal.q[:m]
        count, following = map(np.asarray, _outcome_laws(verify, p, q, drafts, n_draft))
        law = defaultdict(float)
        for row, proposal in enumerate(proposals):
            for n in np.flatnonzero(count[row]):
                law[proposal.drafts[:n]] += proposal.probability * count[row, n] * following[n, row]
        return law

    return round_law


def matched(target_law, propose):
    """Rounds of proposals that are compared with samples of the target, by `exact`."""
    compare = jax.jit(exact)

    @functools.cache
    def round_law(context):
        law = defaultdict(lambda: np.zeros(len(target_law(context))))
        for proposal in propose(context):
            m = len(proposal.drafts)
            p = [target_law(context + proposal.drafts[:i]) for i in range(m + 1)]
            samples = np.array(list(itertools.product(range(len(p[0])), repeat=m + 1)))
            weight = proposal.probability * np.prod([p[i][samples[:, i]] for i in range(m + 1)], axis=0)
            # One column of padding, so that the lengths that occur share few shapes.
            drafts = np.tile((*proposal.drafts, -1), (len(samples), 1))
            padded = np.pad(samples, ((0, 0), (0, 1)), constant_values=-1)
            accepted, following = compare(padded, drafts, np.full(len(samples), m))
            for n in range(m + 1):
                chosen = np.asarray(accepted) == n
                np.add.at(law[proposal.drafts[:n]], np.asarray(following)[chosen], weight[chosen])
        return law

    return round_law


def plain(target_law):
    """Rounds of plain decoding: the definition of lossless."""
    return lambda context: {(): target_law(context)}


def committed_law(round_law, n, vocab_size, context=()):
    """The joint law [V] * n of the next n committed tokens."""
    law = np.zeros((vocab_size,) * n)
    for accepted, mass_V in round_law(context).items():
        rest = n - len(accepted) - 1
        if rest < 0:
            law[accepted[:n]] += mass_V.sum()
        elif rest == 0:
            law[accepted] += mass_V
        else:
            for token in np.flatnonzero(mass_V):
                committed = (*accepted, int(token))
                law[committed] += mass_V[token] * committed_law(round_law, rest, vocab_size, context + committed)
    return law


def error(round_law, target_law, n, context=()):
    """Largest difference between the law of the next n committed tokens and the target's."""
    vocab_size = len(target_law(context))
    expected = committed_law(plain(target_law), n, vocab_size, context)
    return np.max(np.abs(committed_law(round_law, n, vocab_size, context) - expected))
