"""The data-constrained law: repeated tokens and excess parameters lose value."""

from collections.abc import Mapping

import numpy as np

from atlas.scaling.estimates import diagnose_sizes
from atlas.scaling.law import data_constrained
from atlas.scaling.single.library import chinchilla
from atlas.scaling.single.library.chinchilla import ALPHA, BETA, A, B, E
from atlas.scaling.single.specification import D, Law, N, Parameter, U

_EPOCHS = 4.0  # below which repetition costs too little to be seen


def repetition_open(batch: Mapping[str, np.ndarray]) -> str:
    """Why runs of D and U [n] tokens cannot tell what repetition costs; "" where they can."""
    if not np.isfinite(batch["U"]).any():
        return "unique tokens not given"
    epochs = np.max(batch["D"] / batch["U"])
    return f"at most {epochs:.1f} epochs seen; 8 or more tell it" if epochs < _EPOCHS else ""


def _diagnose(batch):
    reason = repetition_open(batch)
    return diagnose_sizes(batch) | ({"R_D": reason} if reason else {})


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
        start_loss=chinchilla.loss,
        diagnose=_diagnose,
    ),
)
