"""Artificial languages of known relatedness, against which a measured transfer matrix can be checked.

A language is named by its family's letter and its number: `a1`. All languages speak of one world (concepts
with Zipf frequencies, topics, a tense and a few protagonists a document); each family has a proto-language of
its own (sounds, lexicon, inflection, word order, script), and its members descend from it:

    a1, a2   sisters: they split last; about 85 % of the running words of one exist in the other
    a1, a3   cousins: 1 and 2 form the first branch, 3 and 4 the second, and so on; about half of the words
    a1, b1   strangers: no words in common. Scripts go round Latin, Cyrillic, Greek: a and d share the script

On the way down each branch and then each member undergoes regular sound change and lexical replacement; every
second branch also puts its adjectives on the other side. Texts are drawn independently for every language and
split: nothing is a translation.
"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.random import Generator

DEFAULT_LANGUAGES = ("a1", "a2", "b1", "b2")
_VOWELS, _CONSONANTS = "aeiouy", "ptkbdgfshmnlrvzjcw"
_SCRIPTS = ("aeiouyptkbdgfshmnlrvzjcw", "аеиоуыпткбдгфсхмнлрвзйцш", "αειουηπτκβδγφσχμνλρωζθξψ")
# Concepts by part of speech, and forms of each: nouns inflect for number, verbs for tense and number.
_PARTS = {
    "conjunction": (5, 1),
    "determiner": (6, 1),
    "preposition": (8, 1),
    "noun": (400, 2),
    "verb": (160, 4),
    "adjective": (120, 1),
}
_FUNCTION_WORDS = 5 + 6 + 8
_TOPICS, _GENDERS, _PROTAGONISTS = 12, 3, 3
# Shares of running words that one change affects: by sound change, by lexical replacement.
_BRANCH_CHANGE, _MEMBER_CHANGE = (0.15, 0.15), (0.045, 0.05)
_DOCUMENTS_AT_ONCE = 256
_SLOT_NAMES = ("and", "det", "adj", "noun", "verb", "det2", "adj2", "noun2", "prep", "det3", "noun3", "stop")
_SLOTS = {name: i for i, name in enumerate(_SLOT_NAMES)}
# How often a noun is one of the document's protagonists: as subject, as object, in a phrase of place.
_FAMILIAR = {"": 0.5, "2": 0.25, "3": 0.1}


def documents(language: str, split: str, num_bytes: int, seed: int) -> Iterator[str]:
    """Documents of a split until they hold at least `num_bytes` bytes; the same for the same arguments."""
    pieces, order = _descend(language, seed)
    random = _random(seed, "text", language, split)
    while num_bytes > 0:
        forms, lengths = _compose(seed, random)
        for text in _write(forms[:, order], lengths, pieces):
            yield text
            num_bytes -= len(text.encode())
            if num_bytes <= 0:
                return


def relatedness(languages: Sequence[str], seed: int) -> dict[tuple[str, str], float]:
    """Share of the target's running words whose form exists in the source language, by (target, source)."""
    frequency = _frequencies(seed)
    pieces = {name: _descend(name, seed)[0].astype(str) for name in languages}
    return {
        (target, source): float(frequency @ np.isin(pieces[target][:-1], pieces[source][:-1]))
        for target in languages
        for source in languages
        if source != target
    }


def _layout() -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Stem and suffix of each form, and where the forms of each part of speech begin."""
    stems, suffixes, starts, stem, suffix = [], [], {}, 0, 0
    for part, (concepts, inflections) in _PARTS.items():
        starts[part] = len(stems)
        stems += np.repeat(np.arange(stem, stem + concepts), inflections).tolist()
        # Suffix 0 is the bare form; each part of speech has its own others.
        suffixes += [suffix + i if i else 0 for i in range(inflections)] * concepts
        stem, suffix = stem + concepts, suffix + inflections - 1
    return np.array(stems), np.array(suffixes), starts


_STEM, _SUFFIX, _START = _layout()
_NUM_FORMS = len(_STEM)  # the index of the full stop, too


@lru_cache(maxsize=4)
def _topics(seed: int) -> dict[str, np.ndarray]:
    """Zipf frequencies of concepts, cumulative, [topics, concepts] by part of speech; topic k fills (k, k + 1]."""
    random, found = _random(seed, "world"), {}
    for part in ("noun", "verb", "adjective"):
        zipf = 1 / (np.arange(_PARTS[part][0]) + 2.7)
        weight = zipf * np.exp(random.normal(0, 1.2, (_TOPICS, len(zipf))))
        found[part] = np.cumsum(weight / weight.sum(1, keepdims=True), axis=1) + np.arange(_TOPICS)[:, None]
    return found


def _draw(seed: int, part: str, topic: np.ndarray, random: Generator) -> np.ndarray:
    """A concept for each topic, by one search for all."""
    cumulative = _topics(seed)[part]
    concepts = cumulative.shape[1]
    index = np.searchsorted(cumulative.ravel(), topic + random.random(topic.shape), side="right")
    return np.minimum(index - topic * concepts, concepts - 1)


def _compose(seed: int, random: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Sentences as forms [n, slots], -1 where a slot is empty, and how many each document has."""
    lengths = random.integers(4, 15, _DOCUMENTS_AT_ONCE)
    document = np.repeat(np.arange(_DOCUMENTS_AT_ONCE), lengths)
    topics = random.integers(_TOPICS, size=_DOCUMENTS_AT_ONCE)
    tense = random.integers(2, size=_DOCUMENTS_AT_ONCE)[document]
    protagonists = _draw(seed, "noun", np.repeat(topics[:, None], _PROTAGONISTS, 1), random)[document]
    topic, n = topics[document], len(document)
    forms = np.full((n, len(_SLOTS)), -1)
    plural = {i: _add_noun(forms, i, seed, topic, protagonists, random) for i in _FAMILIAR}
    verb = _draw(seed, "verb", topic, random)
    forms[:, _SLOTS["verb"]] = _START["verb"] + 4 * verb + 2 * tense + plural[""]
    forms[:, _SLOTS["prep"]] = _START["preposition"] + random.integers(_PARTS["preposition"][0], size=n)
    forms[:, _SLOTS["and"]] = _START["conjunction"] + random.integers(_PARTS["conjunction"][0], size=n)
    forms[:, _SLOTS["stop"]] = _NUM_FORMS
    for absent, slots in ((0.8, ["and"]), (0.3, ["det2", "adj2", "noun2"]), (0.5, ["prep", "det3", "noun3"])):
        forms[np.ix_(random.random(n) < absent, [_SLOTS[slot] for slot in slots])] = -1
    return forms, lengths


def _add_noun(
    forms: np.ndarray, i: str, seed: int, topic: np.ndarray, protagonists: np.ndarray, random: Generator
) -> np.ndarray:
    """Fills the slots of the i-th noun, its determiner and its adjective; returns which nouns are plural."""
    n = len(topic)
    known = protagonists[np.arange(n), random.integers(_PROTAGONISTS, size=n)]
    noun = np.where(random.random(n) < _FAMILIAR[i], known, _draw(seed, "noun", topic, random))
    plural, definite, described = (random.random(n) < share for share in (0.3, 0.5, 0.35))
    forms[:, _SLOTS["noun" + i]] = _START["noun"] + 2 * noun + plural
    # Determiners agree with the gender of their noun, which is a property of the concept.
    forms[:, _SLOTS["det" + i]] = _START["determiner"] + 2 * (noun % _GENDERS) + definite
    if "adj" + i in _SLOTS:
        adjective = _START["adjective"] + _draw(seed, "adjective", topic, random)
        forms[:, _SLOTS["adj" + i]] = np.where(described, adjective, -1)
    return plural


def _write(forms: np.ndarray, lengths: np.ndarray, pieces: np.ndarray) -> Iterator[str]:
    words = pieces[forms[forms >= 0]]
    ends = np.cumsum((forms >= 0).sum(1))[np.cumsum(lengths) - 1]
    for start, end in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        yield "".join(words[start:end])[1:]


@lru_cache(maxsize=4)
def _frequencies(seed: int) -> np.ndarray:
    """Share of each form among running words, full stops apart, [forms]."""
    random = _random(seed, "frequencies")
    forms = np.concatenate([_compose(seed, random)[0].ravel() for _ in range(8)])
    counts = np.bincount(forms[(forms >= 0) & (forms < _NUM_FORMS)], minlength=_NUM_FORMS)
    return counts / counts.sum()


@lru_cache(maxsize=256)
def _descend(name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Forms of a language in its script, each after a space, and the full stop; and its order of slots."""
    family, branch = name[0], (int(name[1:]) - 1) // 2
    random = _random(seed, "family", family)
    sounds = _Sounds(random)
    words = sounds.words(_FUNCTION_WORDS, 1, 2) + sounds.words(_STEM[-1] + 1 - _FUNCTION_WORDS, 2, 3)
    suffixes = ["", *(sounds.syllable() for _ in range(_SUFFIX.max()))]
    order = _word_order(random, flip_adjectives=branch % 2 == 1)
    # Members of a branch share its random choices, and then make their own.
    steps = [(_random(seed, family, branch), _BRANCH_CHANGE), (_random(seed, name), _MEMBER_CHANGE)]
    for random, (sound_share, lexical_share) in steps:
        _replace_words(words, sounds, random, lexical_share, seed)
        words, suffixes = _change_sound(words, suffixes, random, sound_share, seed)
    script = str.maketrans(_SCRIPTS[0], _SCRIPTS[(ord(family) - ord("a")) % len(_SCRIPTS)])
    forms = [f" {form}".translate(script) for form in _inflect(words, suffixes)]
    return np.array([*forms, "."], object), order


class _Sounds:
    """Phonotactics of a family: consonants and vowels with Zipf frequencies, in open or closed syllables."""

    def __init__(self, random: Generator):
        self._random = random
        self._consonants = random.permutation(list(_CONSONANTS))[:13]
        self._vowels = random.permutation(list(_VOWELS))[:5]
        self._closed = random.uniform(0.15, 0.4)

    def syllable(self, random: Generator | None = None) -> str:
        random = random or self._random
        coda = self._pick(self._consonants[:6], random) if random.random() < self._closed else ""
        return self._pick(self._consonants, random) + self._pick(self._vowels, random) + coda

    def words(self, n: int, shortest: int, longest: int) -> list[str]:
        """Different words of so many syllables."""
        found: dict[str, None] = {}
        while len(found) < n:
            syllables = self._random.integers(shortest, longest + 1)
            found["".join(self.syllable() for _ in range(syllables))] = None
        return list(found)

    def _pick(self, sounds: np.ndarray, random: Generator) -> str:
        # Log-uniform ranks: frequency falls as 1/rank.
        return sounds[int((len(sounds) + 1) ** random.random()) - 1]


def _inflect(words: Sequence[str], suffixes: Sequence[str]) -> list[str]:
    return [words[stem] + suffixes[suffix] for stem, suffix in zip(_STEM, _SUFFIX, strict=True)]


def _replace_words(words: list[str], sounds: _Sounds, random: Generator, share: float, seed: int) -> None:
    """Gives concepts new words, in place, up to `share` of the running words; function words stay."""
    frequency = np.bincount(_STEM, _frequencies(seed))
    for stem in random.permutation(np.arange(_FUNCTION_WORDS, len(words))):
        if frequency[stem] <= share:
            words[stem] = "".join(sounds.syllable(random) for _ in range(random.integers(2, 4)))
            share -= frequency[stem]


def _change_sound(
    words: list[str], suffixes: list[str], random: Generator, share: float, seed: int
) -> tuple[list[str], list[str]]:
    """Turns a consonant into another everywhere: the one that affects nearest to `share` of running words."""
    forms = np.array(_inflect(words, suffixes))
    affected = np.array([_frequencies(seed) @ (np.char.find(forms, sound) >= 0) for sound in _CONSONANTS])
    old = _CONSONANTS[np.argmin(np.abs(affected - share))]
    new = random.choice([sound for sound in _CONSONANTS if sound != old])
    return [word.replace(old, new) for word in words], [suffix.replace(old, new) for suffix in suffixes]


def _word_order(random: Generator, flip_adjectives: bool) -> np.ndarray:
    """A permutation of the slots: order of the clause, of adjective and noun, of preposition and noun."""
    adjective_first = bool(random.integers(2)) != flip_adjectives
    subject = ["det", "adj", "noun"] if adjective_first else ["det", "noun", "adj"]
    object_ = [slot + "2" for slot in subject]
    place = [["prep", "det3", "noun3"], ["det3", "noun3", "prep"]][random.integers(2)]
    clauses = [[subject, ["verb"], object_], [subject, object_, ["verb"]], [["verb"], subject, object_]]
    clause = itertools.chain(*clauses[random.integers(3)])
    return np.array([_SLOTS[slot] for slot in ["and", *clause, *place, "stop"]])


def _random(seed: int, *names: object) -> Generator:
    digest = hashlib.blake2b("/".join(map(str, (seed, *names))).encode(), digest_size=16).digest()
    return Generator(np.random.PCG64(int.from_bytes(digest, "little")))
