"""Simulated studies with a known law: what a fitter is judged on before it sees runs whose law nobody knows.

Languages differ as real ones seem to: exponents by 6 to 8 %, repetition rates by half, transfer stronger within
one of three families than across them and now and then negative. The spreads are assumptions, not measurements.

    known = truth(L=10, seed=0)
    plan = mixtures(10, mono=5, pairs=2, uniform=20, dirichlet=0, rng=np.random.default_rng(0))
    fit = fit_joint(load_runs(table(known, plan, seed=0, rho=0.3)), known.families)
    error = fit.transfer_matrix() - known.law.tau
"""

import dataclasses
import itertools

import numpy as np
import pandas as pd

from atlas.scaling.law import JointLaw

# Hoffmann et al.'s third method as Besiroglu et al. refitted it (arXiv 2404.10102).
CHINCHILLA = {"E": 1.8172, "A": 482.01, "alpha": 0.3478, "B": 2085.43, "beta": 0.3658}

_SIZES = np.log([1e7, 8e9])  # parameters of a run, log uniform
_TOKENS = np.log([5e9, 3e11])  # of a whole run
_FIRST = 0.05  # part of a run at its first checkpoint; the others follow geometrically
_LEAST_EFFECT = 0.02  # of a run's tokens, for an evaluated language
_LEAST_SHARE = 0.005  # of a language that a run is evaluated on
_TINY_SHARE = 0.001  # the same in a study of mixtures alone, whose shares are written to so much
_SAME = (1e9, 1e11)  # parameters and tokens of every run of such a study
_CONCENTRATION = 0.5  # of sparse mixtures: most of a run is two or three of its languages

Mixture = tuple[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Truth:
    """A study's law, the family of each of its L languages, and how many unique tokens [L] each has."""

    law: JointLaw
    families: dict[str, str]
    U: np.ndarray

    @property
    def languages(self) -> tuple[str, ...]:
        """All of them are both targets and sources."""
        return self.law.sources

    def loss(self, N: np.ndarray, D: np.ndarray, target: np.ndarray) -> np.ndarray:
        """[...] losses without noise, for N [...], D [..., L] and indices of target languages [...]."""
        return self.law.loss(N, D, self.U, target)


def truth(L: int, seed: int, phi: float = 0.0, eta: float | None = None, against: float = 0.0) -> Truth:
    """A law for L languages of three families, drawn at random.

    Args:
      L: languages.
      seed: of all that is drawn.
      phi: capacity exponent.
      eta: mean exponent of substitution; None where effective tokens are a plain sum.
      against: part of the pairs whose transfer is strongly negative, −0.4 to −0.15.
    """
    rng = np.random.default_rng(seed)
    family = np.arange(L) % 3
    same = family[:, None] == family[None]
    tau = np.where(same, rng.normal(0.35, 0.12, (L, L)), rng.normal(0.10, 0.06, (L, L)))
    tau = np.where(rng.random((L, L)) < 0.08, rng.uniform(-0.15, -0.05, (L, L)), tau)
    if against:
        tau = np.where(rng.random((L, L)) < against, rng.uniform(-0.4, -0.15, (L, L)), tau)
    np.fill_diagonal(tau, 1.0)
    alpha, beta = 0.33 * np.exp(rng.normal(0, 0.06, L)), 0.31 * np.exp(rng.normal(0, 0.08, L))
    languages = tuple(f"l{i}" for i in range(L))
    law = JointLaw(
        targets=languages,
        sources=languages,
        E=rng.uniform(0.6, 1.0, L),
        A=0.35 * (4e8**alpha) * np.exp(rng.normal(0, 0.1, L)),
        alpha=alpha,
        B=0.45 * (2e10**beta) * np.exp(rng.normal(0, 0.1, L)),
        beta=beta,
        lam=0.12 * np.exp(rng.normal(0, 0.5, (L, 1))),
        tau=tau,
        phi=np.float64(phi),
        eta=None if eta is None else eta * np.exp(np.random.default_rng([seed, L]).normal(0, 0.15, L)),
    )
    families = {name: f"f{f}" for name, f in zip(languages, family, strict=True)}
    return Truth(law, families, U=np.exp(rng.uniform(np.log(2e9), np.log(3e11), L)))


def mixtures(
    L: int, mono: int, pairs: float, uniform: int, dirichlet: int, rng: np.random.Generator, sparse: int = 0
) -> list[Mixture]:
    """What each run of a study trains on, as (kind, shares [L]).

    Args:
      L: languages.
      mono: monolingual runs of every language.
      pairs: runs of every pair, half of them in unequal proportion; below 1 the part of the pairs that has one, in
        equal proportion.
      uniform: even mixtures, of all, half and three of the languages in turn.
      dirichlet: mixtures of all languages in random proportion.
      rng: draws pairs, members of even mixtures, and proportions.
      sparse: mixtures of a random half of the languages in very uneven proportion, rounded to a thousandth.

    >>> [kind for kind, _ in mixtures(3, 1, 1 / 3, 0, 1, np.random.default_rng(0))]
    ['mono', 'mono', 'mono', 'bilingual', 'dirichlet']
    """
    plan = [("mono", np.eye(L)[i]) for i in range(L) for _ in range(mono)]
    every = list(itertools.combinations(range(L), 2))
    picked = (
        every * int(pairs)
        if pairs >= 1
        else [every[i] for i in rng.permutation(len(every))[: round(pairs * len(every))]]
    )
    for n, (i, j) in enumerate(picked):
        share = (0.5, 0.5, 0.3, 0.7)[n % 4] if pairs >= 1 else 0.5
        plan.append(("bilingual", share * np.eye(L)[i] + (1 - share) * np.eye(L)[j]))
    for n in range(uniform):
        chosen = rng.permutation(L)[: (L, max(L // 2, 3), 3)[n % 3]]
        plan.append(("uniform", np.eye(L)[chosen].mean(0)))
    plan += [("dirichlet", rng.dirichlet(np.full(L, 1.5))) for _ in range(dirichlet)]
    for _ in range(sparse):
        shares = np.zeros(L)
        shares[rng.permutation(L)[: (L + 1) // 2]] = rng.dirichlet(np.full((L + 1) // 2, _CONCENTRATION))
        rounded = shares.round(3)
        plan.append(("sparse", rounded / rounded.sum()))
    return plan


def table(
    truth: Truth,
    plan: list[Mixture],
    seed: int,
    checkpoints: int = 10,
    sigma: float = 0.005,
    rho: float = 0.0,
    diverged: float = 0.0,
    same: bool = False,
) -> pd.DataFrame:
    """The runs table of a study, which `load_runs` reads.

    Sizes and final tokens are log uniform, 10M to 8B and 5B to 300B; every checkpoint of a run is evaluated on every
    language with half a percent of its tokens, if at least 2 % of the tokens are effective: with less, as interference
    can leave, the law has no meaning.

    Args:
      truth: what the losses follow.
      plan: the mixture of every run, from `mixtures`.
      seed: of sizes, tokens and noise.
      checkpoints: of every run, spaced geometrically from a twentieth of its tokens.
      sigma: standard deviation of the noise of log losses.
      rho: correlation of that noise within one run and language.
      diverged: probability that a run's losses all lie 3 to 10 % too high; column `diverged` tells.
      same: whether all runs have one size and one number of tokens, as studies of mixtures have, and are evaluated on
        all that they train.
    """
    rng = np.random.default_rng(seed)
    parts = []
    for number, (kind, shares) in enumerate(plan):
        N, final = _SAME if same else np.exp([rng.uniform(*_SIZES), rng.uniform(*_TOKENS)])
        shift = rng.uniform(0.03, 0.10) if rng.random() < diverged else 0.0
        for t in np.flatnonzero(shares > (_TINY_SHARE / 2 if same else _LEAST_SHARE)):
            noise = sigma * _noise(rng, checkpoints, rho) + shift
            parts.append((number, N, final, t, kind, shift > 0, noise))
    *once, noise = zip(*parts, strict=True)
    names = ("run", "N", "final", "target", "mixture", "diverged")
    rows = {name: np.repeat(values, checkpoints) for name, values in zip(names, once, strict=True)}
    shares = np.stack([shares for _, shares in plan])[rows["run"]]
    D = (np.tile(_schedule(checkpoints), len(parts)) * rows["final"])[:, None] * shares
    columns = {f"tokens.{name}": D[:, i] for i, name in enumerate(truth.languages)}
    columns |= {f"unique_tokens.{name}": truth.U[i] for i, name in enumerate(truth.languages)}
    columns |= {
        "run": [f"r{number}" for number in rows["run"]],
        "num_params": rows["N"],
        "language": np.asarray(truth.languages)[rows["target"]],
        "mixture": rows["mixture"],
        "diverged": rows["diverged"],
        "loss": truth.loss(rows["N"], D, rows["target"]) * np.exp(np.concatenate(noise)),
    }
    frame = pd.DataFrame(columns)
    z = truth.law.effective_share(D, truth.U, rows["target"])
    return frame[z >= (_TINY_SHARE / 2 if same else _LEAST_EFFECT)].reset_index(drop=True)


def series(runs: int, seed: int, checkpoints: int = 1, sigma: float = 0.005, rho: float = 0.0) -> pd.DataFrame:
    """The runs table of a study of one language under `CHINCHILLA`.

    Args:
      runs: models of 50M to 10B parameters, log uniform, trained on 2 to 200 tokens a parameter.
      seed: of sizes, tokens and noise.
      checkpoints, sigma, rho: as for `table`.

    >>> series(40, seed=0, checkpoints=8).shape
    (320, 4)
    """
    rng = np.random.default_rng(seed)
    N = np.exp(rng.uniform(np.log(5e7), np.log(1e10), runs))
    final = N * np.exp(rng.uniform(np.log(2.0), np.log(200.0), runs))
    D = final[:, None] * _schedule(checkpoints)
    noise = np.stack([_noise(rng, checkpoints, rho) for _ in range(runs)])
    E, A, alpha, B, beta = CHINCHILLA.values()
    loss = (E + A / N[:, None] ** alpha + B / D**beta) * np.exp(sigma * noise)
    names = np.repeat([f"r{number}" for number in range(runs)], checkpoints)
    return pd.DataFrame(
        {"run": names, "num_params": np.repeat(N, checkpoints), "tokens": D.ravel(), "loss": loss.ravel()}
    )


def _schedule(checkpoints: int) -> np.ndarray:
    """Parts of a run at which it is evaluated, the last of them 1."""
    return np.geomspace(_FIRST, 1.0, checkpoints) if checkpoints > 1 else np.ones(1)


def _noise(rng: np.random.Generator, checkpoints: int, rho: float) -> np.ndarray:
    """Standard normal noise, equally correlated over the checkpoints of a run."""
    return np.sqrt(rho) * rng.normal() + np.sqrt(1 - rho) * rng.normal(size=checkpoints)
