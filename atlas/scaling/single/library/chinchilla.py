"""Chinchilla: one power law in parameters, one in tokens."""

from atlas.scaling.law import chinchilla
from atlas.scaling.single.specification import EXPONENTS, D, Law, N, Parameter, diagnose_power_laws

E = Parameter("E", "loss", role="level")
A = Parameter("A", "loss·N^alpha", scale=("N", "alpha", 1.0))
ALPHA = Parameter("alpha", role="exponent")
B = Parameter("B", "loss·D^beta", scale=("D", "beta", 1.0))
BETA = Parameter("beta", role="exponent")

_SOURCE = "Hoffmann et al., arXiv 2203.15556, Eq. 2"

GRID = {"alpha": EXPONENTS, "beta": EXPONENTS}


def loss(p, x):
    """Chinchilla's loss of the named parameters p and columns x."""
    return chinchilla(x["N"], x["D"], p["E"], p["A"], p["alpha"], p["B"], p["beta"])


LAWS = (
    Law(
        "chinchilla",
        _SOURCE,
        loss,
        (E, A, ALPHA, B, BETA),
        (N, D),
        grid=GRID,
        linear=("E", "A", "B"),
        diagnose=diagnose_power_laws,
    ),
    Law(
        "chinchilla_tied",
        _SOURCE + ", with alpha = beta as in Muennighoff et al. and ATLAS",
        lambda p, x: loss(p | {"beta": p["alpha"]}, x),
        (E, A, ALPHA, Parameter("B", "loss·D^alpha", scale=("D", "alpha", 1.0))),
        (N, D),
        grid={"alpha": EXPONENTS},
        linear=("E", "A", "B"),
    ),
)
