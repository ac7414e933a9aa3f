"""Overfitting: repeated text makes large models worse, which laws of diminishing value cannot say."""

import jax.numpy as jnp

from atlas.scaling.estimates import diagnose_sizes
from atlas.scaling.single.library import chinchilla
from atlas.scaling.single.library.chinchilla import ALPHA, BETA, A, B, E
from atlas.scaling.single.library.data_constrained import repetition_open
from atlas.scaling.single.specification import D, Law, N, Parameter, U

_UNIT = 1e9  # parameters and unique tokens at which C is stated


def _loss(p, x):
    """E + A/N^α + B/D^β + C·(N/10⁹)^γ·(U/10⁹)^−δ·ln(D/U)^η, the last term from the second epoch on."""
    unique = jnp.minimum(x["D"], x["U"])
    penalty = p["C"] * (x["N"] / _UNIT) ** p["gamma"] * (unique / _UNIT) ** -p["delta"]
    return chinchilla.loss(p, x) + penalty * jnp.log(x["D"] / unique) ** p["eta"]


def _diagnose(batch):
    reason = repetition_open(batch)
    return diagnose_sizes(batch) | (dict.fromkeys(("C", "gamma", "delta", "eta"), reason) if reason else {})


LAWS = (
    Law(
        "overfitting",
        "Chinchilla's law with a penalty of repetition as in arXiv 2605.01640: a power of size, unique tokens, epochs",
        _loss,
        (
            *(E, A, ALPHA, B, BETA, Parameter("C", width=2.0)),
            Parameter("gamma", positive=False, starts=(0.0, 0.3, 0.7), width=0.5),
            *(Parameter("delta", starts=(0.2, 0.5, 1.0)), Parameter("eta", starts=(1.0, 2.0))),
        ),
        (N, D, U),
        diagnose=_diagnose,
    ),
)
