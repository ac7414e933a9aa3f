"""A runs table like a small study's, from a known law."""

import numpy as np
import pandas as pd

LANGUAGES = ("de", "en", "es", "hi", "ru", "zh")


def related(languages=LANGUAGES) -> dict[tuple[str, str], float]:
    """Truth: neighbours in the list are related, others less with distance."""
    place = {name: i for i, name in enumerate(languages)}
    return {(t, s): float(np.exp(-abs(place[t] - place[s]))) for t in languages for s in languages if s != t}


def runs_table(languages=LANGUAGES, sizes=(1e5, 4e5, 8e5), uneven=4, noise=0.004, seed=0, unique=2e7) -> pd.DataFrame:
    """Monolingual, all 50/50, even and a few uneven mixtures of every size; a trunk and three cooldowns each."""
    rng = np.random.default_rng(seed)
    L = len(languages)
    tau = np.array([[1.0 if t == s else 0.5 * related(languages)[t, s] for s in languages] for t in languages])
    plans = [np.eye(L)[i] for i in range(L)]
    plans += [(np.eye(L)[i] + np.eye(L)[j]) / 2 for i in range(L) for j in range(i)]
    plans += [np.eye(L)[rng.permutation(L)[:k]].mean(0) for k in (3, 3, L) if k <= L]
    plans += [rng.dirichlet(np.full(L, 0.7)) for _ in range(uneven)]
    E, B = 0.9 + 0.1 * np.arange(L) / L, 60 + 10 * np.arange(L) / L
    rows = []
    for N in sizes:
        for number, shares in enumerate(plans):
            shift = 0.5 * noise * rng.normal()
            for phase, totals in (("trunk", np.geomspace(1e6, 6e7, 9)), ("cooldown", [1.5e7, 3e7, 6e7])):
                for total in totals:
                    D = total * shares
                    S = np.where(D > unique, unique * (1 + (1 - np.exp(-0.1 * (D / unique - 1))) / 0.1), D)
                    for t in np.flatnonzero(shares > 0.005):
                        K = np.exp(-np.sum(shares[shares > 0] * np.log(shares[shares > 0])))
                        loss = E[t] + 30 * K**0.1 / N**0.35 + B[t] / (tau[t] @ S) ** 0.28
                        loss *= (1.0 if phase == "cooldown" else 1.03) * np.exp(shift + noise * rng.normal())
                        row = {"run": f"r{number}-{N:.0f}", "num_params": N, "language": languages[t], "loss": loss}
                        row |= {"phase": phase, "loss_unit": "bits per byte"}
                        row |= {f"tokens.{name}": d for name, d in zip(languages, D, strict=True)}
                        row |= {f"unique_tokens.{name}": unique for name in languages}
                        rows.append(row)
    return pd.DataFrame(rows)
