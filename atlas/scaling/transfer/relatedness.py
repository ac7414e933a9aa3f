"""What a transfer matrix says of its languages: whether relatives help each other more, and whether help is mutual."""

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from atlas.scaling.joint.draws import joint_draws
from atlas.scaling.joint.fitted import JointFit
from atlas.scaling.single.draws import band

_DRAWS = 1000  # of the law, for the ends of an interval
_ALL, _SOME = 7, 2_000  # up to so many languages all relabellings are tried, beyond it a sample


class Effect(NamedTuple):
    """By how much ordered pairs that share a label lie above the others on average.

    p: share of the relabellings of the languages, the true one included, whose difference is as large: as languages and
    not pairs are exchanged, that a language helps or is helped much altogether makes no effect.
    """

    difference: float
    p: float
    sharing: int
    others: int


def label_effect(matrix: pd.DataFrame, labels: Mapping[str, str], seed: int = 0) -> Effect | None:
    """The effect of a shared label (family, script) on a matrix [target, source], without NaN cells and the diagonal.

    None where no two languages share one, or all do.

    >>> values = [[0, 1, 0.1, 0], [1, 0, 0, 0], [0.1, 0, 0, 1], [0, 0, 1, 0]]
    >>> names = ["de", "nl", "fr", "es"]
    >>> label_effect(pd.DataFrame(values, names, names), {"de": "G", "nl": "G", "fr": "R", "es": "R"})
    Effect(difference=0.975, p=0.3333333333333333, sharing=4, others=8)
    """
    names = [name for name in matrix.index if name in labels and name in matrix.columns]
    values = matrix.reindex(index=names, columns=names).to_numpy(float, copy=True)
    np.fill_diagonal(values, np.nan)
    label = np.array([labels[name] for name in names])
    known, same = np.isfinite(values), label[:, None] == label
    if not (known & same).any() or (same | ~known).all():
        return None
    filled = np.where(known, values, 0.0)

    def difference(order: np.ndarray) -> float:
        shared, other = (known & mask for mask in (same[np.ix_(order, order)], ~same[np.ix_(order, order)]))
        return float(filled[shared].sum() / max(shared.sum(), 1) - filled[other].sum() / max(other.sum(), 1))

    whole = np.arange(len(names))
    rng = np.random.default_rng(seed)
    orders = itertools.permutations(whole) if len(names) <= _ALL else (rng.permutation(whole) for _ in range(_SOME))
    observed = difference(whole)
    # Equal differences may round apart.
    as_large = sum(difference(np.array(order)) >= observed - 1e-12 for order in orders)
    tried = math.factorial(len(names)) if len(names) <= _ALL else _SOME + 1
    p = (as_large + (len(names) > _ALL)) / tried
    return Effect(observed, p, int((known & same).sum()), int((known & ~same).sum()))


def asymmetric_pairs(fit: JointFit) -> tuple[list[str], int]:
    """Pairs of targets between which transfer is not mutual, and how many there are.

    A pair counts where the 90 % interval of τ[a ← b] − τ[b ← a] excludes 0; a tenth does by chance. They are written
    with the one that helps more first: "en → de".
    """
    tau = np.asarray(joint_draws(fit, _DRAWS).tau)
    pairs, found = list(itertools.combinations(range(len(fit.targets)), 2)), []
    for a, b in pairs:
        low, high = band(tau[:, a, b] - tau[:, b, a])
        if low > 0 or high < 0:
            helper, helped = (b, a) if low > 0 else (a, b)
            found.append(f"{fit.targets[helper]} → {fit.targets[helped]}")
    return found, len(pairs)
