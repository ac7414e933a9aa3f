"""Whole loss curves under a learning-rate schedule (Tissue et al.)."""

import jax.numpy as jnp
import numpy as np

from atlas.scaling.single.library.chinchilla import E
from atlas.scaling.single.specification import Column, Law, N, Parameter
from atlas.scaling.table.curves import annealing_areas
from atlas.scaling.table.runs import Runs
from checked import UserError


def annealing(S1, S2, E, A, alpha, C):
    """Loss E + A·S1^−α − C·S2 after a learning-rate area S1 and an annealed area S2 (arXiv 2408.11029, Eq. 1).

    See `atlas.scaling.table.curves.annealing_areas`.
    """
    return E + A * jnp.power(S1, -alpha) - C * jnp.asarray(S2)


def _areas(runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """Both areas [n] of each row, from the columns lr_area and lr_annealed, or step and learning_rate."""
    if {"lr_area", "lr_annealed"} <= set(runs.frame):
        return tuple(runs.frame[name].to_numpy(float) for name in ("lr_area", "lr_annealed"))
    if not {"step", "learning_rate"} <= set(runs.frame):
        raise UserError(
            "the annealing law needs the schedule: columns 'step' and 'learning_rate', or 'lr_area' and "
            "'lr_annealed' from atlas.scaling.table.curves.annealing_areas"
        )
    step, rate = (runs.frame[name].to_numpy(float) for name in ("step", "learning_rate"))
    found = np.zeros((2, len(runs)))
    for run in range(len(runs.run_ids)):
        rows = np.flatnonzero(runs.run == run)
        order = rows[np.argsort(step[rows])]
        every = np.arange(1, int(step[order[-1]]) + 1)
        areas = annealing_areas(np.interp(every, step[order], rate[order]))
        found[:, rows] = np.stack(areas)[:, step[rows].astype(int) - 1]
    return found[0], found[1]


_S1 = Column("S1", lambda runs, tokens: _areas(runs)[0], needs=())
_S2 = Column("S2", lambda runs, tokens: _areas(runs)[1], needs=())


def _diagnose(batch):
    if np.ptp(batch["S2"]) <= 1e-3 * batch["S1"].max():
        return {"C": "the learning rate hardly falls in any run; add rows from the decay"}
    return {}


_PARAMETERS = (E, Parameter("A", scale=("S1", "alpha")), Parameter("alpha", role="exponent"), Parameter("C"))

LAWS = (
    Law(
        "annealing",
        "Tissue et al., arXiv 2408.11029, Eq. 1",
        lambda p, x: annealing(x["S1"], x["S2"], p["E"], p["A"], p["alpha"], p["C"]),
        _PARAMETERS,
        (_S1, _S2),
        diagnose=_diagnose,
    ),
    Law(
        "annealing_sizes",
        "Tissue et al., arXiv 2408.11029: Eq. 1 with B/N^beta for runs of several sizes",
        lambda p, x: annealing(x["S1"], x["S2"], p["E"], p["A"], p["alpha"], p["C"]) + p["B"] * x["N"] ** -p["beta"],
        (*_PARAMETERS, Parameter("B", scale=("N", "beta")), Parameter("beta", role="exponent")),
        (_S1, _S2, N),
        diagnose=_diagnose,
    ),
)
