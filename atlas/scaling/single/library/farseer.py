"""Farseer: the exponent of tokens and both intercepts change with the size of the model."""

import jax
import jax.numpy as jnp

from atlas.scaling.estimates import diagnose_sizes
from atlas.scaling.single.library import chinchilla
from atlas.scaling.single.specification import D, Law, N, Parameter

_STRAIGHT = 1e-4  # size of a power below which N^power is its logarithm to rounding


def farseer(N, D, s, q, S, B, b, Q, A, a, E):
    """Loss exp(s·N^q + S) + exp(B·N^b + Q)·D^−exp(A·N^a + E) (arXiv 2506.10972, Eq. 3)."""
    intercept, rise, exponent = s * N**q + S, B * N**b + Q, jnp.exp(A * N**a + E)
    return jnp.exp(intercept) + jnp.exp(rise - exponent * jnp.log(D))


def _natural(value, slope, power, log_centre):
    """Coefficient, power and constant of c·N^p + k with this value and slope in log N at the centre."""
    power = jnp.where(jnp.abs(power) < _STRAIGHT, _STRAIGHT, power)
    return slope / power * jnp.exp(-power * log_centre), power, value - slope / power


def _coordinates(x, centre):
    """From values, slopes and powers at the geometric mean size and token count, where they are hardly confounded."""
    (level, tilt, q), (fall, lean, b), (steep, turn, a) = x.reshape(3, 3)
    log_N, log_D = jnp.log(centre["N"]), jnp.log(centre["D"])
    exponent = jnp.exp(steep)
    data = _natural(fall + exponent * log_D, lean + turn * exponent * log_D, b, log_N)
    return jnp.stack([*_natural(level, tilt, q, log_N), *data, *_natural(steep, turn, a, log_N)])


def _starts(batch, loss, weight, centre):
    """The law nearest to each of Chinchilla's starts."""

    nearest = chinchilla.LAWS[0]

    def convert(x: jax.Array) -> jax.Array:
        log_E, log_A, log_alpha, log_B, log_beta = nearest.fitted(x, centre)
        alpha, beta = jnp.exp(log_alpha), jnp.exp(log_beta)
        E, A = jnp.exp(log_E), jnp.exp(log_A - alpha * jnp.log(centre["N"]))
        part = A / (E + A)
        size = [jnp.log(E + A), -alpha * part, -alpha * (1.0 - part)]
        data = [log_B - beta * jnp.log(centre["D"]), 0.0, -0.1]
        return jnp.stack([*size, *data, log_beta, 0.0, 0.1])

    return jax.vmap(convert)(nearest.start(batch, loss, weight, centre))


def _diagnose(batch):
    reasons = list(diagnose_sizes(batch).values())
    return dict.fromkeys(LAWS[0].names, reasons[0]) if reasons else {}


LAWS = (
    Law(
        "farseer",
        "Farseer, arXiv 2506.10972, Eq. 3",
        lambda p, x: farseer(x["N"], x["D"], *(p[name] for name in LAWS[0].names)),
        # Powers near 0 are logarithms; sizes that span a few decades tell a power little better than that.
        tuple(
            Parameter(name, positive=False, prior=(0.0, 0.3) if name in "qba" else None, width=float("inf"))
            for name in ("s", "q", "S", "B", "b", "Q", "A", "a", "E")
        ),
        (N, D),
        starts=_starts,
        coordinates=_coordinates,
        diagnose=_diagnose,
    ),
)
