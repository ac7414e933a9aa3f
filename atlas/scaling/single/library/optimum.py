"""The best learning rate and batch (Step Law): where the loss of a sweep is least, by size and tokens."""

import jax
import jax.numpy as jnp

from atlas.scaling.estimates import diagnose_sizes
from atlas.scaling.single.library import chinchilla
from atlas.scaling.single.library.chinchilla import ALPHA, BETA, A, B, E
from atlas.scaling.single.specification import Column, D, Law, N, Parameter

# Where `rate` and `batch` are stated: a size and a run that sweeps can afford, so that both are numbers people know.
_SIZE, _TOKENS = 1e8, 1e10
_LEAST_CURVATURE = 1e-4  # of a start, in loss per squared logarithm: flatter than any sweep


def _ratios(p, x):
    """Logarithms of the learning rate and of the batch over the best ones."""
    n, d = jnp.log(x["N"] / _SIZE), jnp.log(x["D"] / _TOKENS)
    rate = jnp.log(x["rate"] / p["rate"]) - p["rate_N"] * n - p["rate_D"] * d
    return rate, jnp.log(x["batch"] / p["batch"]) - p["batch_D"] * d


def _loss(p, x):
    rate, batch = _ratios(p, x)
    return chinchilla.loss(p, x) + p["rate_cost"] * rate**2 + p["batch_cost"] * batch**2


def _starts(batch, loss, weight, centre):
    """Chinchilla's starts, and the vertex of a quadratic in all logarithms fitted to the losses."""
    n, d = jnp.log(batch["N"] / _SIZE), jnp.log(batch["D"] / _TOKENS)
    rate, size = jnp.log(batch["rate"]), jnp.log(batch["batch"])
    own = [rate**2, rate, rate * n, rate * d, size**2, size, size * d]
    design = jnp.stack([*own, jnp.ones_like(n), n, d, n * n, n * d, d * d], 1) * weight[:, None]
    found = jnp.linalg.lstsq(design, weight * loss)[0]
    costs = jnp.maximum(found[jnp.array([0, 4])], _LEAST_CURVATURE)
    at_rate, at_batch = -0.5 * found[1:4] / costs[0], -0.5 * found[5:7] / costs[1]
    rest = jnp.concatenate([jnp.log(costs[:1]), at_rate, jnp.log(costs[1:]), at_batch])
    return jax.vmap(lambda x: jnp.concatenate([x, rest]))(chinchilla.LAWS[0].start(batch, loss, weight, centre))


def _diagnose(batch):
    found = diagnose_sizes(batch)
    for column, names in (
        ("rate", ("rate_cost", "rate", "rate_N", "rate_D")),
        ("batch", ("batch_cost", "batch", "batch_D")),
    ):
        if batch[column].max() < 1.5 * batch[column].min():
            found |= dict.fromkeys(names, f"the {column} hardly differs between runs; vary it")
    return found


LAWS = (
    Law(
        "optimum",
        "Step Law, arXiv 2503.04715, Eq. 1, with a quadratic around it: the learning rate that is best at N and D is "
        "rate·(N/1e8)^rate_N·(D/1e10)^rate_D, the batch batch·(D/1e10)^batch_D",
        _loss,
        (
            *(E, A, ALPHA, B, BETA, Parameter("rate_cost"), Parameter("rate")),
            *(Parameter(name, positive=False, width=0.3) for name in ("rate_N", "rate_D")),
            *(Parameter("batch_cost"), Parameter("batch"), Parameter("batch_D", positive=False, width=0.3)),
        ),
        (
            *(N, D, Column("rate", lambda runs, tokens: runs.frame["learning_rate"], needs=("learning_rate",))),
            Column("batch", lambda runs, tokens: runs.frame["batch_size"], needs=("batch_size",)),
        ),
        starts=_starts,
        diagnose=_diagnose,
    ),
)
