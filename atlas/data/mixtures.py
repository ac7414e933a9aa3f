"""Mixtures: which share of the training windows each language gets.

A mixture is written as one line, so that it fits a config, a file name and a table's cell:

    en                                     one language
    en:0.7,fr:0.3                          free weights, summing to 1
    uniform(en,fr,de)                      equal shares
    unimax(en,fr,de;epochs=4)              as equal as an epoch cap allows
    temperature(en,fr,de;temperature=3.3)  shares ∝ size^(1/temperature)

`*` between parentheses stands for all languages of the corpus.
"""

import contextlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from checked import UserError, unknown

_SUM_TOLERANCE = 1e-6
# Options by kind. Four epochs cost next to nothing against fresh text (Muennighoff et al. 2023); mT5's
# exponent is 0.3.
_KINDS = {"uniform": {}, "unimax": {"epochs": 4.0}, "temperature": {"temperature": 1 / 0.3}}


def uniform(languages: Sequence[str]) -> dict[str, float]:
    """Equal weights.

    >>> uniform(["en", "fr"])
    {'en': 0.5, 'fr': 0.5}
    """
    return {language: 1 / len(languages) for language in languages}


def unimax(counts: Mapping[str, float], budget: float, epochs: float) -> dict[str, float]:
    """What each language gets of `budget`, as equal as possible with none seen more than `epochs` times.

    Algorithm 1 of UniMax (Chung et al. 2023, arXiv 2304.09151), before its last line, which normalises.

    Args:
      counts: size by language, in any unit.
      budget: what training consumes in total, in the same unit.
      epochs: cap on repetitions of a language.

    Returns:
      Amount by language, in the order of `counts`; sums to `budget` unless every language is capped.

    >>> unimax({"a": 1, "b": 10, "c": 100}, budget=60, epochs=4)
    {'a': 4, 'b': 28.0, 'c': 28.0}
    """
    amounts, left = {}, budget
    for i, language in enumerate(sorted(counts, key=counts.__getitem__)):
        amounts[language] = min(left / (len(counts) - i), counts[language] * epochs)
        left -= amounts[language]
    return {language: amounts[language] for language in counts}


def temperature(counts: Mapping[str, float], temperature: float) -> dict[str, float]:
    """Weights ∝ count^(1/temperature): 1 is proportional, infinity uniform (Arivazhagan et al. 2019).

    >>> temperature({"a": 1, "b": 16}, 2.0)
    {'a': 0.2, 'b': 0.8}
    """
    largest = max(counts.values())
    return normalize({language: (count / largest) ** (1 / temperature) for language, count in counts.items()})


def dirichlet(languages: Sequence[str], seed: int) -> str:
    """A spec of weights drawn evenly from all mixtures (Dirichlet), rounded to 4 digits that sum to 1 exactly.

    >>> dirichlet(["en", "fr"], seed=0)
    'en:0.4001,fr:0.5999'
    """
    shares = np.random.default_rng(seed).dirichlet(np.ones(len(languages)))
    # Differences of rounded cumulative sums: every weight is rounded and none of the whole is lost.
    parts = np.diff(np.round(np.cumsum(shares) * 10_000).astype(int), prepend=0)
    return ",".join(f"{language}:{part / 10_000:.4f}" for language, part in zip(languages, parts, strict=True) if part)


def normalize(amounts: Mapping[str, float]) -> dict[str, float]:
    """The same proportions summing to 1."""
    total = sum(amounts.values())
    return {language: amount / total for language, amount in amounts.items()}


def parse(
    spec: str, unique_tokens: Mapping[str, int], num_bytes: Mapping[str, int], budget_tokens: int
) -> dict[str, float]:
    """The weights that a mixture's line means for a corpus.

    Args:
      spec: see the module's docstring.
      unique_tokens, num_bytes: unique training tokens U and bytes of training text by language, all of the corpus'.
      budget_tokens: training tokens D of the run, over all languages; UniMax caps by it.

    Returns:
      Positive weights by language, summing to 1.

    Raises:
      UserError: for an unknown or repeated language, an empty mixture, a weight below 0, weights that do not
      sum to 1.
    """
    if call := re.fullmatch(r"(\w+)\((.*)\)", "".join(spec.split())):
        weights = _parse_call(spec, call[1], call[2], unique_tokens, num_bytes, budget_tokens)
    else:
        weights = _parse_weights(spec, tuple(unique_tokens))
    return {language: float(weight) for language, weight in weights.items() if weight > 0}


def _parse_weights(spec: str, known: Sequence[str]) -> dict[str, float]:
    parts = [part.partition(":") for part in "".join(spec.split()).split(",") if part]
    languages = _languages(spec, [name for name, _, _ in parts], known)
    if len(parts) == 1 and not parts[0][1]:
        return {languages[0]: 1.0}
    weights = {name: _number(spec, name, ":", value) for name, _, value in parts}
    total = sum(weights.values())
    if abs(total - 1) > _SUM_TOLERANCE:
        raise UserError(f"mixture {spec!r}: the weights sum to {total:g}; make them sum to 1")
    return normalize(weights)


def _parse_call(
    spec: str, kind: str, inside: str, unique_tokens: Mapping[str, int], num_bytes: Mapping[str, int], budget: int
) -> dict[str, float]:
    if kind not in _KINDS:
        raise unknown("kind of mixture", kind, _KINDS)
    names, *pairs = inside.split(";")
    options = dict(_KINDS[kind])
    for key, _, value in (pair.partition("=") for pair in pairs):
        if key not in options:
            raise UserError(
                f"mixture {spec!r}: {kind} takes no option {key!r}; it takes {', '.join(options) or 'none'}"
            )
        options[key] = _number(spec, key, "=", value)
        if not options[key]:
            raise UserError(f"mixture {spec!r}: {key} is 0; it must be positive")
    known = tuple(unique_tokens)
    languages = known if names == "*" else _languages(spec, [n for n in names.split(",") if n], known)
    if kind == "uniform":
        return uniform(languages)
    if kind == "temperature":
        return temperature({language: num_bytes[language] for language in languages}, **options)
    # The paper counts characters, at 4 a token; our budget and our sizes are both exact in tokens.
    return normalize(unimax({language: unique_tokens[language] for language in languages}, budget, **options))


def _languages(spec: str, names: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    if not names:
        raise UserError(f"mixture {spec!r} is empty; name at least one of {', '.join(known)}")
    for i, name in enumerate(names):
        if name not in known:
            raise unknown("language", name, known)
        if name in names[:i]:
            raise UserError(f"mixture {spec!r}: {name} occurs more than once; name each language once")
    return names


def _number(spec: str, name: str, sign: str, value: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= float(value) < np.inf:
            return float(value)
    raise UserError(
        f"mixture {spec!r}: {name} needs a number of at least 0, not {value!r}; write {name}{sign}0.5 or the like"
    )
