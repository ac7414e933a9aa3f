"""What every method commits has the target's law, exactly; and a method that is slightly wrong does not."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decoding.rounds import _with_penalty
from models.decoding.sampling import Sampling, choose, gumbel, penalise, warp
from models.decoding.verification import block, exact, rejection
from tests.models.decoding import enumeration as enum

EXACT = 1e-12
TARGET = enum.Vocabulary(["a", "b", "ab", "aab"])
VERIFICATIONS = pytest.mark.parametrize("verify", [rejection, block], ids=["rejection", "block"])
P = enum.random_table(1, 4)
POSITIVE = enum.random_table(1, 4, zeros=0)

DRAFTERS = {
    "equal": ["a", "b", "ab", "aab"],
    "permuted": ["aab", "ab", "b", "a"],
    "subset": ["a", "ab"],
    "superset": ["ba", "a", "b", "bb", "ab", "aab"],
    "overlapping": ["b", "ba", "aa", "a"],
    "one shared": ["aa", "b", "ba"],
    "duplicates": ["a", "ab", "a", "bb"],
}
STRING_DRAFTERS = {**DRAFTERS, "characters": ["a", "b"], "disjoint": ["aa", "ba", "bb"]}


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def drafter(name, zeros=0.25):
    """A drafter's vocabulary and laws; a piece that the target knows never has probability 0."""
    vocabulary = enum.Vocabulary(STRING_DRAFTERS[name])
    shared = [i for i, piece in enumerate(vocabulary.pieces) if piece in TARGET.pieces]
    return vocabulary, enum.random_table(2, len(vocabulary.pieces), zeros, never_zero=shared[0] if shared else 0)


# Methods.


@VERIFICATIONS
@pytest.mark.parametrize("drafts, tokens", [(1, 3), (2, 3), (3, 4)])
def test_drafts_of_the_same_vocabulary(verify, drafts, tokens):
    rounds = enum.verified(verify, P, enum.same_vocabulary(enum.random_table(2, 4), drafts))
    assert enum.error(rounds, P, tokens) < EXACT


@VERIFICATIONS
def test_larger_vocabulary(verify):
    p, q = enum.random_table(3, 6), enum.random_table(4, 6)
    assert enum.error(enum.verified(verify, p, enum.same_vocabulary(q, 2)), p, 3) < EXACT


@VERIFICATIONS
def test_nothing_drafted_is_plain_decoding(verify):
    rounds = enum.verified(verify, P, lambda context: [enum.Proposal(1.0, (), np.zeros((0, 4)))])
    assert enum.error(rounds, P, 2) < EXACT


@VERIFICATIONS
def test_draft_length_may_depend_on_the_drawn_tokens(verify):
    """Blocks of 1, 2 and 3 drafts: a draft that was unlikely ends the block and is kept."""
    q = enum.random_table(5, 4)
    propose = enum.same_vocabulary(q, 3, stop=lambda drawn: q(drawn[:-1])[drawn[-1]] < 0.3)
    assert {len(proposal.drafts) for proposal in propose(())} == {1, 2, 3}
    assert enum.error(enum.verified(verify, P, propose), P, 3) < EXACT


@VERIFICATIONS
@pytest.mark.parametrize("name", DRAFTERS)
def test_token_level_intersection(verify, name):
    propose = enum.token_level_intersection(TARGET, *drafter(name), drafts=2, vocab_size=4)
    assert enum.error(enum.verified(verify, P, propose), P, 3) < EXACT


@VERIFICATIONS
def test_token_level_intersection_of_three_drafts(verify):
    propose = enum.token_level_intersection(TARGET, *drafter("overlapping"), drafts=3, vocab_size=4)
    assert enum.error(enum.verified(verify, P, propose), P, 4) < EXACT


@VERIFICATIONS
def test_padded_vocabularies(verify):
    """Both models' logits are wider than their tokenizers, and both give padding a probability."""
    p, q = enum.random_table(6, 6, zeros=0), enum.random_table(7, 7, zeros=0)
    target = enum.Vocabulary([*TARGET.pieces, "<pad>", "<pad>"])
    vocabulary, _ = drafter("overlapping")
    propose = enum.token_level_intersection(target, vocabulary, q, drafts=2, vocab_size=6)
    assert enum.error(enum.verified(verify, p, propose), p, 3) < EXACT


@VERIFICATIONS
@pytest.mark.parametrize("name", STRING_DRAFTERS)
def test_string_level_rejection(verify, name):
    propose = enum.retokenised_block(TARGET, *drafter(name), length=2, vocab_size=4)
    assert enum.error(enum.verified(verify, P, propose), P, 3) < EXACT


@VERIFICATIONS
def test_string_level_rejection_of_the_first_token_only(verify):
    """The algorithm of the paper: one token is drafted for every block."""
    blocks = enum.retokenised_block(TARGET, *drafter("characters"), length=4, vocab_size=4)

    def propose(context):
        return [enum.Proposal(pr, drafts[:1], q[:1]) for pr, drafts, q in blocks(context)]

    assert {len(proposal.drafts) for proposal in blocks(())} == {2, 3, 4}
    assert enum.error(enum.verified(verify, P, propose), P, 3) < EXACT


@pytest.mark.parametrize("name", STRING_DRAFTERS)
def test_string_level_exact_match(name):
    propose = enum.retokenised_drafts(TARGET, *drafter(name), length=2, most=3)
    assert enum.error(enum.matched(P, propose), P, 3) < EXACT


def test_prompt_lookup():
    """Candidates continue the last occurrence of the last token, up to two."""

    def propose(context):
        earlier = [i for i, token in enumerate(context[:-1]) if token == context[-1]]
        return [enum.Proposal(1.0, context[earlier[-1] + 1 :][:2] if earlier else (), np.zeros(0))]

    prompt = (0, 1, 2, 0)
    assert propose(prompt)[0].drafts == (1, 2)
    assert enum.error(enum.matched(P, propose), P, 3, prompt) < EXACT


SETTINGS = {"top-k": (0.7, 3, 1.0), "top-p": (1.5, 0, 0.8), "greedy": (0.0, 0, 1.0), "min-p": (1.2, 0, 1.0, 0.3)}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_warped_laws(settings):
    """Lossless with respect to the warped target, whatever warps the drafter."""
    p, q = warped(P, *settings), warped(enum.random_table(8, 4), 0.9, 3, 0.9)
    propose = enum.same_vocabulary(q, 2)
    for rounds in (enum.verified(rejection, p, propose), enum.verified(block, p, propose), enum.matched(p, propose)):
        assert enum.error(rounds, p, 3) < EXACT


def penalised(context):
    """The law after a text that began with token 2, with a penalty on all that it has."""
    logits, seen = jnp.log(POSITIVE(context)), np.isin(np.arange(4), [2, *context])
    return np.asarray(jax.nn.softmax(penalise(logits, seen, 1.7)))


def test_penalised_laws():
    """A law that depends on all of the text; and the round's, for a whole block of drafts, is that of every place."""
    propose = enum.same_vocabulary(enum.random_table(8, 4), 2)
    for rounds in (
        enum.verified(rejection, penalised, propose),
        enum.verified(block, penalised, propose),
        enum.matched(penalised, propose),
    ):
        assert enum.error(rounds, penalised, 3) < EXACT
    settings = Sampling(1.0, repetition_penalty=1.7).settings(1, ())
    for context in ((), (1,), (0, 2)):
        for drafts in itertools.product(range(4), repeat=2):
            logits = jnp.log(np.array([POSITIVE(context + drafts[:i]) for i in range(3)]))
            seen, last = np.isin(np.arange(4), [2, *context]), (2, *context)[-1]
            found = settings.law(_with_penalty(logits[None], np.array([[last, *drafts]]), seen[None], settings))[0]
            np.testing.assert_allclose(found, [penalised(context + drafts[:i]) for i in range(3)], rtol=1e-12)


def warped(law, *settings):
    compiled = jax.jit(warp)
    return functools.cache(lambda context: np.asarray(compiled(jnp.log(law(context)), *settings)))


def test_greedy_output_is_the_argmax():
    """Greedy laws of target and drafter: one text has probability 1, by every verification."""
    p, q = warped(P, 0.0, 0, 1.0), warped(enum.random_table(9, 4), 0.0, 0, 1.0)
    text = ()
    for _ in range(4):
        text += (int(np.argmax(P(text))),)
    propose = enum.same_vocabulary(q, 3)
    for rounds in (enum.verified(rejection, p, propose), enum.verified(block, p, propose), enum.matched(p, propose)):
        assert enum.committed_law(rounds, 4, 4)[text] == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_coupled_output_is_a_function_of_seed_and_target(seed):
    """Every draft of every length gives the text of plain decoding: argmax(log p + noise of the position)."""
    length, rng = 24, np.random.default_rng(seed)
    noise = np.asarray(gumbel(jax.random.key(seed)[None], jnp.arange(length + 4)[None], 4))[0]

    def sample(context):
        return int(choose(P(context), noise[len(context)]))

    plain, text, accepted = (), (), 0
    while len(plain) < length:
        plain += (sample(plain),)
    while len(text) < length:
        drafts = tuple(int(t) for t in rng.integers(0, 4, rng.integers(1, 4)))
        if rng.random() < 0.5:
            drafts = (plain[len(text) :] + drafts)[: len(drafts)]
        samples = [sample(text + drafts[:i]) for i in range(len(drafts) + 1)]
        (n,), (token,) = exact(jnp.array([samples]), jnp.array([drafts]), jnp.array([len(drafts)]))
        text += (*drafts[: int(n)], int(token))
        accepted += int(n)
    assert text[:length] == plain and accepted > 3


# Adversarial drafters.


ADVERSARIES = {
    "uniform": lambda context: np.full(4, 0.25),
    "constant": lambda context: np.eye(4)[3],
    "always wrong": lambda context: np.eye(4)[np.argmin(P(context))],
    "nearly identical": lambda context: P(context) * (1 + 1e-15),
}


@VERIFICATIONS
@pytest.mark.parametrize("name", ADVERSARIES)
def test_adversarial_drafters(verify, name):
    rounds = enum.verified(verify, P, enum.same_vocabulary(ADVERSARIES[name], 2))
    assert enum.error(rounds, P, 3) < EXACT
    matched = enum.matched(P, enum.same_vocabulary(ADVERSARIES[name], 2))
    assert enum.error(matched, P, 3) < EXACT


@VERIFICATIONS
def test_identical_drafter_is_always_accepted(verify):
    _, drafts, q = zip(*enum.same_vocabulary(P, 3)(()), strict=True)
    p = np.concatenate([np.array(q), np.array([P(drawn) for drawn in drafts])[:, None]], axis=1)
    outcome = jax.jit(verify)(p, np.array(q), np.array(drafts), np.full(len(drafts), 3))
    np.testing.assert_array_equal(outcome.count, np.tile([0, 0, 0, 1], (len(drafts), 1)))
    for n in range(4):
        np.testing.assert_allclose(outcome.next_law(jnp.full(len(drafts), n)), p[:, n], rtol=1e-15)


# Mutants: each is a mistake of a public implementation, or of one written from a figure; without it, all is exact.


def verified_with(rewrite, propose):
    """The same drafts, verified with other laws."""
    return lambda context: [enum.Proposal(pr, drafts, rewrite(q)) for pr, drafts, q in propose(context)]


def wrong_q(mistaken):
    """Drafts of one temperature, verified with the laws of another."""
    power = 2 if mistaken else 1
    propose = enum.same_vocabulary(enum.random_table(2, 4, zeros=0), 2)
    return POSITIVE, verified_with(lambda q: q**power / np.sum(q**power, axis=-1, keepdims=True), propose)


def permuted_q(mistaken):
    """The columns of the intersection in another order than its ids."""
    vocabulary, q = drafter("overlapping", zeros=0)
    ids = np.sort(enum.shared(TARGET, vocabulary)[0])

    def permute(q_KV):
        permuted = q_KV.copy()
        permuted[:, ids] = q_KV[:, ids[::-1] if mistaken else ids]
        return permuted

    return POSITIVE, verified_with(permute, enum.token_level_intersection(TARGET, vocabulary, q, 2, 4))


def masked_target(mistaken):
    """The target's laws cut to the intersection, as the drafter's are."""
    vocabulary, q = drafter("overlapping", zeros=0)
    mask = np.isin(np.arange(4), enum.shared(TARGET, vocabulary)[0]) | (not mistaken)

    def masked(context):
        return POSITIVE(context) * mask / np.sum(POSITIVE(context) * mask)

    return masked, enum.token_level_intersection(TARGET, vocabulary, q, 2, 4)


def psi_of_the_string(mistaken):
    """The probability that the drafter writes t, instead of that of a block that starts with t."""
    vocabulary, q = drafter("characters", zeros=0)

    def string_psi(context):
        text = TARGET.decode(context)

        def written(piece):
            drawn = [vocabulary.pieces.index(character) for character in piece]
            return np.prod([q((text, *drawn[:i]))[token] for i, token in enumerate(drawn)])

        return np.array([written(piece) for piece in TARGET.pieces])

    blocks = enum.retokenised_block(TARGET, vocabulary, q, 3, 4)

    def propose(context):
        psi = string_psi(context)[None]
        return [enum.Proposal(pr, drafts[:1], psi if mistaken else q[:1]) for pr, drafts, q in blocks(context)]

    return POSITIVE, propose


def dropped_draft(mistaken):
    """A draft that was unlikely ends the block and is not verified."""
    q = enum.random_table(5, 4, zeros=0)

    def unlikely(drawn):
        return q(drawn[:-1])[drawn[-1]] < 0.3

    def propose(context):
        proposals = enum.same_vocabulary(q, 2, stop=lambda drawn: unlikely(context + drawn))(context)
        dropped = [mistaken and unlikely(context + proposal.drafts) for proposal in proposals]
        return [enum.Proposal(pr, x[: len(x) - n], q) for (pr, x, q), n in zip(proposals, dropped, strict=True)]

    return POSITIVE, propose


@VERIFICATIONS
@pytest.mark.parametrize("mutant", [wrong_q, permuted_q, masked_target, psi_of_the_string, dropped_draft])
def test_mutants_are_caught(verify, mutant):
    errors = [enum.error(enum.verified(verify, *mutant(mistaken)), POSITIVE, 3) for mistaken in (False, True)]
    assert errors[0] < EXACT and errors[1] > 0.01
