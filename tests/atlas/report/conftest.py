"""A small study from a known law: its runs table, and a joint fit made of the truth instead of by fitting."""

import dataclasses
from collections.abc import Callable
from functools import cached_property

import jax
import numpy as np
import pandas as pd
import pytest

from atlas.scaling import load_runs
from atlas.scaling.joint.arrow import Coordinates
from atlas.scaling.joint.fitted import JointFit, Record
from atlas.scaling.joint.system import Prior, State, Units
from atlas.scaling.joint.untrained import fit_untrained
from atlas.scaling.law import JointLaw

UNIQUE = 2e7


@dataclasses.dataclass(frozen=True)
class Truth:
    """levels [L, 6]: E, A, alpha, B, beta, lambda; tau [L, L]; neighbours in `languages` help each other most."""

    languages: tuple[str, ...]

    @property
    def related(self) -> dict[tuple[str, str], float]:
        place = {name: i for i, name in enumerate(self.languages)}
        return {(t, s): float(np.exp(-abs(place[t] - place[s]))) for t in place for s in place if s != t}

    @cached_property
    def tau(self) -> np.ndarray:
        place = np.arange(len(self.languages))
        near = 0.5 * np.exp(-np.abs(place[:, None] - place))
        return np.where(np.eye(len(place), dtype=bool), 1.0, near)

    @property
    def levels(self) -> np.ndarray:
        step = np.arange(len(self.languages)) / len(self.languages)
        ones = np.ones_like(step)
        return np.stack([0.9 + 0.1 * step, 30 * ones, 0.35 * ones, 60 + 10 * step, 0.28 * ones, 0.1 * ones], 1)

    def loss(self, N: float, D: np.ndarray, phi: float = 0.1) -> np.ndarray:
        """[L] for D [L]."""
        E, A, alpha, B, beta, lam = self.levels.T
        repeats = np.maximum(D / UNIQUE - 1, 0)
        S = np.minimum(D, UNIQUE) + UNIQUE * (1 - np.exp(-lam * repeats)) / lam
        shares = D[D > 0] / D.sum()
        K = np.exp(-np.sum(shares * np.log(shares)))
        return E + A * K**phi / N**alpha + B / (self.tau @ S) ** beta

    def runs(
        self, sizes=(1e5, 4e5, 8e5), pairs=True, uneven=3, noise=0.004, phases=("trunk", "cooldown")
    ) -> pd.DataFrame:
        """Monolingual, 50/50, even and uneven mixtures of every size; five checkpoints, three cooldowns."""
        rng, L = np.random.default_rng(0), len(self.languages)
        plans = [np.eye(L)[i] for i in range(L)]
        plans += [(np.eye(L)[i] + np.eye(L)[j]) / 2 for i in range(L) for j in range(i)] if pairs else []
        plans += [np.full(L, 1 / L)] if L > 2 else []
        plans += [rng.dirichlet(np.full(L, 0.7)) for _ in range(uneven)]
        totals = {"trunk": np.geomspace(1e6, 6e7, 5), "cooldown": np.array([1.5e7, 3e7, 6e7])}
        rows = []
        for N in sizes:
            for number, shares in enumerate(plans):
                for phase in phases:
                    for D in totals[phase][:, None] * shares:
                        loss = self.loss(N, D) * (1.03 if phase == "trunk" else 1.0)
                        loss = loss * np.exp(noise * rng.normal(size=L))
                        for t in np.flatnonzero(shares > 0.005):
                            row = {"run": f"r{number}-{N:.0f}", "num_params": N, "phase": phase, "loss": loss[t]}
                            row |= {"language": self.languages[t], "loss_unit": "bits per byte"}
                            row |= {f"tokens.{name}": d for name, d in zip(self.languages, D, strict=True)}
                            rows.append(row | {f"unique_tokens.{name}": UNIQUE for name in self.languages})
        return pd.DataFrame(rows)

    def fit(self, told: bool = True, warnings: tuple[str, ...] = ()) -> JointFit:
        """The truth as if fitted, with a tenth of every parameter as its standard error."""
        L, units = len(self.languages), Units(3e5, 1e7)
        E, A, alpha, B, beta, lam = self.levels.T
        law = JointLaw(self.languages, self.languages, E, A, alpha, B, beta, lam[:, None], self.tau, np.float64(0.1))
        own, place = np.eye(L, dtype=bool), np.arange(L)
        error = jax.tree.map(lambda value: 0.1 * np.asarray(value), law)
        error = dataclasses.replace(error, tau=np.where(own, 0.0, 0.05), phi=np.float64(0.01))
        known = jax.tree.map(lambda value: np.full(np.shape(value), told), law)
        known = dataclasses.replace(known, tau=own | told & ((place[:, None] + place) % 3 > 0))
        estimates = {"value": law, "se": error, "identified": known}
        for side, sign in (("low", -1), ("high", 1)):
            estimates[side] = jax.tree.map(lambda value, se, sign=sign: value + sign * 1.64 * se, law, error)
        theta = np.log(np.stack([E, A / units.N**alpha, alpha, B / units.D**beta, beta, lam], 1))
        theta = np.concatenate([theta, self.tau], 1)
        zero = np.zeros((L, L + 6))
        prior = Prior(zero, np.zeros((L, L + 6, 0)), zero, zero, 0.0, np.zeros(1), np.zeros(1))
        state = State(Coordinates(theta, np.array([0.1])), None, prior)
        few = load_runs(self.runs(sizes=(1e5,), pairs=False, uneven=0, phases=("cooldown",)))
        covariance = np.broadcast_to(1e-4 * np.eye(L + 7), (L, L + 7, L + 7))
        untrained = fit_untrained(few, law.targets, law.sources, units)
        fit = JointFit(
            law=law,
            estimates=estimates,
            sigma=0.004,
            rho=0.2,
            run_weights={},
            objective=0.0,
            converged=told,
            n_rows=1,
            n_runs=1,
            warnings=warnings,
            options={},
            record=Record(few, None, state, None, None, covariance, units, untrained),
        )
        vars(fit)["misfit"] = 0.003  # known already: there are no rows to tell it
        return fit


@pytest.fixture(scope="session")
def truth() -> Callable[..., Truth]:
    """Truth of any number of languages."""
    names = ("de", "en", "es", "hi", "ru", "zh")
    return lambda count=6: Truth(names[:count] if count <= 6 else tuple(f"l{i:02d}" for i in range(count)))
