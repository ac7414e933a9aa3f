"""Parallel scaling (Chen et al.): P streams through one model count as a larger model."""

import jax.numpy as jnp

from atlas.scaling.single.library.chinchilla import ALPHA, A, E
from atlas.scaling.single.specification import Column, Law, N, Parameter

_STREAMS = Column("P", lambda runs, tokens: runs.frame["parallel_size"], 1.0, needs=("parallel_size",))


def _diagnose(batch):
    if batch["P"].max() < 2.0 * batch["P"].min():
        return {"k": "every run has about as many streams; vary parallel_size"}
    return {}


LAWS = (
    Law(
        "parallel",
        "Chen et al., arXiv 2505.10475, Eq. 5: E + A/(N·(1 + k·ln P))^alpha; the tokens are the same in all runs",
        lambda p, x: p["E"] + p["A"] * (x["N"] * (1.0 + p["k"] * jnp.log(x["P"]))) ** -p["alpha"],
        (E, A, ALPHA, Parameter("k", starts=(0.1, 0.3, 1.0))),
        (N, _STREAMS),
        diagnose=_diagnose,
    ),
)
