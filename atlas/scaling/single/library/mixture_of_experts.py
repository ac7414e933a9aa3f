"""Mixtures of experts (Ludziejewski et al.): active parameters and tokens, both worth more with more experts."""

import jax.numpy as jnp
import numpy as np

from atlas.scaling.estimates import diagnose_sizes
from atlas.scaling.single.library.chinchilla import ALPHA, BETA, A, B, E
from atlas.scaling.single.specification import Column, D, Law, N, Parameter

# What experts change is little and confounded in few sizes: exponents of them are drawn to none.
_BY_EXPERTS = [
    Parameter(name, positive=False, prior=(0.0, width), width=width / 2.0)
    for name, width in (("delta", 0.5), ("gamma", 0.05), ("omega", 0.5), ("zeta", 0.05))
]


def _loss(p, x):
    """E + A·X^δ·N^−(α − γ·ln X) + B·X^ω·D^−(β − ζ·ln X) of X experts."""
    log_X, log_N, log_D = (jnp.log(x[name]) for name in ("X", "N", "D"))
    size = p["A"] * jnp.exp(p["delta"] * log_X - (p["alpha"] - p["gamma"] * log_X) * log_N)
    return p["E"] + size + p["B"] * jnp.exp(p["omega"] * log_X - (p["beta"] - p["zeta"] * log_X) * log_D)


def _diagnose(batch):
    found = diagnose_sizes(batch)
    if len(np.unique(batch["X"])) < 2:
        found |= dict.fromkeys((p.name for p in _BY_EXPERTS), "every run has as many experts; vary them")
    return found


LAWS = (
    Law(
        "mixture_of_experts",
        "Ludziejewski et al., arXiv 2502.05172, Eq. 5, with N active parameters and X the experts as they are counted",
        _loss,
        (E, A, ALPHA, B, BETA, *_BY_EXPERTS),
        (N, D, Column("X", lambda runs, tokens: runs.frame["experts"], 1.0, needs=("experts",))),
        diagnose=_diagnose,
    ),
)
