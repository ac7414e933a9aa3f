"""Chinchilla: one power law in parameters, one in tokens."""

from atlas.scaling.estimates import diagnose_sizes
from atlas.scaling.law import chinchilla
from atlas.scaling.single.specification import D, Law, N, Parameter

E = Parameter("E", role="level")
A = Parameter("A", scale=("N", "alpha"))
ALPHA = Parameter("alpha", role="exponent")
B = Parameter("B", scale=("D", "beta"))
BETA = Parameter("beta", role="exponent")

_SOURCE = "Hoffmann et al., arXiv 2203.15556, Eq. 2"


def loss(p, x):
    """Chinchilla's loss of the named parameters p and columns x."""
    return chinchilla(x["N"], x["D"], p["E"], p["A"], p["alpha"], p["B"], p["beta"])


LAWS = (
    Law("chinchilla", _SOURCE, loss, (E, A, ALPHA, B, BETA), (N, D), diagnose=diagnose_sizes),
    Law(
        "chinchilla_tied",
        _SOURCE + ", with alpha = beta as in Muennighoff et al. and Gadre et al. (arXiv 2403.08540, alpha = 2·eta)",
        lambda p, x: loss(p | {"beta": p["alpha"]}, x),
        (E, A, ALPHA, Parameter("B", scale=("D", "alpha"))),
        (N, D),
    ),
)
