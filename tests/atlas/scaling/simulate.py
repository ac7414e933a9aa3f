"""Simulated multilingual studies with a known law, after the design of the joint fit's simulation study."""

import dataclasses
import itertools

import jax
import numpy as np
import pandas as pd

from atlas.scaling import laws


@dataclasses.dataclass(frozen=True)
class Truth:
    """A law for L languages, in natural units; tau [L, L] has 1 on its diagonal."""

    languages: tuple[str, ...]
    families: dict[str, str]
    E: np.ndarray
    A: np.ndarray
    alpha: np.ndarray
    B: np.ndarray
    beta: np.ndarray
    lam: np.ndarray
    tau: np.ndarray
    U: np.ndarray
    phi: float

    def loss(self, N: np.ndarray, D: np.ndarray, target: np.ndarray) -> np.ndarray:
        t = target
        with jax.enable_x64(True):
            return np.asarray(
                laws.atlas(
                    N,
                    D,
                    self.U,
                    self.E[t],
                    self.A[t],
                    self.alpha[t],
                    self.B[t],
                    self.beta[t],
                    self.tau[t],
                    self.lam[t],
                    self.phi,
                )
            )


def truth(L: int, seed: int, phi: float = 0.0) -> Truth:
    rng = np.random.default_rng(seed)
    family = np.arange(L) % 3
    same = family[:, None] == family[None]
    tau = np.where(same, rng.normal(0.35, 0.12, (L, L)), rng.normal(0.10, 0.06, (L, L)))
    tau = np.where(rng.random((L, L)) < 0.08, rng.uniform(-0.15, -0.05, (L, L)), tau)
    np.fill_diagonal(tau, 1.0)
    alpha, beta = 0.33 * np.exp(rng.normal(0, 0.06, L)), 0.31 * np.exp(rng.normal(0, 0.08, L))
    languages = tuple(f"l{i}" for i in range(L))
    return Truth(
        languages,
        {name: f"f{f}" for name, f in zip(languages, family, strict=True)},
        E=rng.uniform(0.6, 1.0, L),
        A=0.35 * (4e8**alpha) * np.exp(rng.normal(0, 0.1, L)),
        alpha=alpha,
        B=0.45 * (2e10**beta) * np.exp(rng.normal(0, 0.1, L)),
        beta=beta,
        lam=0.12 * np.exp(rng.normal(0, 0.5, L)),
        tau=tau,
        U=np.exp(rng.uniform(np.log(2e9), np.log(3e11), L)),
        phi=phi,
    )


def mixtures(L: int, mono: int, pairs: float, uniform: int, dirichlet: int, rng: np.random.Generator) -> list:
    """(kind, shares) of runs: monolingual per language, copies of every pair, uniform over all, Dirichlet."""
    plan = [("mono", np.eye(L)[i]) for i in range(L) for _ in range(mono)]
    every = list(itertools.combinations(range(L), 2))
    picked = (
        every * int(pairs) if pairs >= 1 else [every[i] for i in rng.permutation(len(every))[: int(pairs * len(every))]]
    )
    for n, (i, j) in enumerate(picked):
        share = (0.5, 0.5, 0.3, 0.7)[n % 4] if pairs >= 1 else 0.5
        plan.append(("bilingual", share * np.eye(L)[i] + (1 - share) * np.eye(L)[j]))
    for n in range(uniform):
        chosen = rng.permutation(L)[: (L, max(L // 2, 3), 3)[n % 3]]
        plan.append(("uniform", np.eye(L)[chosen].mean(0)))
    plan += [("dirichlet", rng.dirichlet(np.full(L, 1.5))) for _ in range(dirichlet)]
    return plan


def table(law: Truth, plan: list, seed: int, checkpoints=10, sigma=0.005, rho=0.0, diverged=0.0) -> pd.DataFrame:
    """The runs table of a study; log-loss noise has correlation rho within one run and target."""
    rng = np.random.default_rng(seed)
    frames = []
    for number, (kind, shares) in enumerate(plan):
        N = np.exp(rng.uniform(np.log(1e7), np.log(8e9)))
        final = np.exp(rng.uniform(np.log(5e9), np.log(3e11)))
        steps = np.geomspace(0.05, 1.0, checkpoints) * final
        shift = rng.uniform(0.03, 0.10) if rng.random() < diverged else 0.0
        for t in np.flatnonzero(shares > 0.005):
            D = steps[:, None] * shares
            loss = law.loss(np.full(checkpoints, N), D, np.full(checkpoints, t))
            noise = np.sqrt(rho) * rng.normal() + np.sqrt(1 - rho) * rng.normal(size=checkpoints)
            frame = pd.DataFrame(D, columns=[f"tokens.{name}" for name in law.languages])
            frame[[f"unique_tokens.{name}" for name in law.languages]] = law.U
            frames.append(
                frame.assign(
                    run=f"r{number}",
                    num_params=N,
                    language=law.languages[t],
                    mixture=kind,
                    diverged=shift > 0,
                    loss=loss * np.exp(sigma * noise + shift),
                )
            )
    return pd.concat(frames, ignore_index=True)
