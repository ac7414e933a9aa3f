"""The data-constrained law: repeated tokens and excess parameters lose value."""

import numpy as np

from atlas.scaling.estimates import diagnose_sizes
from atlas.scaling.law import data_constrained
from atlas.scaling.single.library import chinchilla
from atlas.scaling.single.library.chinchilla import ALPHA, BETA, A, B, E
from atlas.scaling.single.specification import D, Law, N, Parameter, U

_EPOCHS = 4.0  # below which repetition costs too little to be seen


def _diagnose(batch):
    found = diagnose_sizes(batch)
    epochs = np.max(batch["D"] / batch["U"])
    if not np.isfinite(batch["U"]).any():
        found["R_D"] = "unique tokens not given"
    elif epochs < _EPOCHS:
        found["R_D"] = f"at most {epochs:.1f} epochs seen; 8 or more tell it"
    return found


LAWS = (
    Law(
        "data_constrained",
        "Muennighoff et al., arXiv 2305.16264",
        lambda p, x: data_constrained(x["N"], x["D"], x["U"], *(p[name] for name in LAWS[0].names)),
        # The two rates of decay are drawn to the published ones: few studies repeat data or overgrow models
        # enough.
        (
            *(E, A, ALPHA, B, BETA),
            Parameter("R_D", prior=(float(np.log(15.387756)), 1.0)),
            Parameter("R_N", prior=(float(np.log(5.309743)), 2.0)),
        ),
        (N, D, U),
        grid=chinchilla.GRID,
        linear=("E", "A", "B"),
        start_loss=chinchilla.loss,
        diagnose=_diagnose,
    ),
)
