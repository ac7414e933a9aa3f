"""Over-training (Gadre et al.): loss by compute and by tokens per parameter."""

import jax.numpy as jnp

from atlas.scaling.single.specification import EXPONENTS, D, Law, N, Parameter


def over_training(N, D, E, a, b, eta):
    """Loss E + (a·M^η + b·M^−η)·C^−η with M = D/N and C = 6·N·D (arXiv 2403.08540, Eq. 4).

    Chinchilla's law with both exponents 2η, A = a·6^−η and B = b·6^−η.

    >>> round(float(over_training(1e9, 2e10, 1.8, 75.0, 150.0, 0.15)), 4)
    2.0075
    """
    M, C = jnp.asarray(D) / N, 6.0 * jnp.asarray(N) * D
    return E + (a * M**eta + b * M**-eta) * C**-eta


LAWS = (
    Law(
        "over_training",
        "Gadre et al., arXiv 2403.08540, Eq. 4",
        lambda p, x: over_training(x["N"], x["D"], p["E"], p["a"], p["b"], p["eta"]),
        (
            Parameter("E", "loss", role="level"),
            Parameter("a", "loss·N^2eta", scale=("N", "eta", 2.0)),
            Parameter("b", "loss·D^2eta", scale=("D", "eta", 2.0)),
            Parameter("eta", role="exponent"),
        ),
        (N, D),
        grid={"eta": tuple(e / 2 for e in EXPONENTS)},
        linear=("E", "a", "b"),
    ),
)
