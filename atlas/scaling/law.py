"""Scaling laws as pure functions of parameters and runs.

Legend: N parameters, D tokens seen, U unique tokens, K languages. Every function broadcasts, works in the dtype of its
arguments and is differentiable in all of them.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

FLOPS_PER_PARAMETER_TOKEN = 6  # of training: C = 6·N·D


def saturation(D: ArrayLike, U: ArrayLike, lam: ArrayLike) -> jax.Array:
    """Tokens that repetition leaves effective: S_λ(D; U) of ATLAS (arXiv 2510.22037, Eq. 3).

    D up to one epoch; U·(1 + (1 − exp(−λ·(D/U − 1)))/λ) beyond it. Continuous with slope 1 at D = U, D
    itself as λ → 0, U·(1 + 1/λ) as D → ∞, and exactly 0 at D = 0. The same as Muennighoff's D' with R* = 1/λ.

    Args:
      D: tokens seen.
      U: unique tokens; infinite means no repetition.
      lam: rate at which repeated tokens lose value, 0 or more.

    >>> [round(float(saturation(d, 1.0, 1.0)), 4) for d in (0.5, 1.0, 2.0, 4.0)]
    [0.5, 1.0, 1.6321, 1.9502]
    """
    D, U, lam = jnp.asarray(D), jnp.asarray(U), jnp.asarray(lam)
    repeated = D > U
    # Operands of the branch not taken must stay finite, or their gradients are NaN.
    U_safe = jnp.where(repeated, U, 1.0)
    excess = jnp.where(repeated, D, 1.0) / U_safe - 1.0
    return jnp.where(repeated, U_safe * (1.0 + excess * _mean_decay(lam * excess)), D)


def _mean_decay(x: jax.Array) -> jax.Array:
    """(1 − e^{−x})/x, the mean of e^{−u} over [0, x]; 1 at x = 0."""
    small = jnp.abs(x) < 1e-5
    x_safe = jnp.where(small, 1.0, x)
    return jnp.where(small, 1.0 - x / 2.0 + x * x / 6.0, -jnp.expm1(-x_safe) / x_safe)


def effective_tokens(D: ArrayLike, U: ArrayLike, transfer: ArrayLike, lam: ArrayLike, guard: ArrayLike) -> jax.Array:
    """Tokens of the target language that a mixture is worth: D_eff of ATLAS (Eq. 2), kept positive.

    The sum over sources of transfer · S_λ(D; U) is z·D_tot; strongly negative transfer makes z ≤ 0, where
    the law has no meaning. z is replaced by guard·softplus(z/guard), which equals z to rounding once z >
    40·guard.

    Args:
      D: [..., Ls] tokens seen per source.
      U: [..., Ls] unique tokens per source.
      transfer: [..., Ls] τ of each source for the target; 1 at the target itself.
      lam: [...] repetition rate.
      guard: width of the smooth lower bound on z.

    Returns:
      [...] effective tokens.
    """
    total = jnp.sum(D, -1)
    S = saturation(D, U, jnp.asarray(lam)[..., None])
    z = jnp.sum(transfer * S, -1) / total
    return total * kept_positive(z, guard)


def kept_positive(z: ArrayLike, guard: ArrayLike) -> jax.Array:
    """guard·softplus(z/guard): z itself once it is above 40·guard, and above 0 everywhere."""
    return guard * jax.nn.softplus(z / guard)


def num_languages(D: ArrayLike) -> jax.Array:
    """Effective number of languages K of a mixture: exp of the entropy of its shares.

    Equals the count for an even mixture and 1 for a single language. Chosen over the count because a
    language of 1 % costs little capacity; on mono, bilingual and even mixtures the two cannot be told apart.

    Args:
      D: [..., Ls] tokens per source.
    """
    shares = D / jnp.sum(D, -1, keepdims=True)
    present = shares > 0
    return jnp.exp(-jnp.sum(jnp.where(present, shares * jnp.log(jnp.where(present, shares, 1.0)), 0.0), -1))


def chinchilla(
    N: ArrayLike, D: ArrayLike, E: ArrayLike, A: ArrayLike, alpha: ArrayLike, B: ArrayLike, beta: ArrayLike
) -> jax.Array:
    """Loss E + A/N^α + B/D^β (Hoffmann et al., arXiv 2203.15556, Eq. 2)."""
    return E + A * jnp.power(N, -alpha) + B * jnp.power(D, -beta)


def atlas(
    N: ArrayLike,
    D: ArrayLike,
    U: ArrayLike,
    E: ArrayLike,
    A: ArrayLike,
    alpha: ArrayLike,
    B: ArrayLike,
    beta: ArrayLike,
    transfer: ArrayLike,
    lam: ArrayLike,
    phi: ArrayLike = 0.0,
    guard: ArrayLike = 1e-3,
) -> jax.Array:
    """Loss E + A·K^φ/N^α + B/D_eff^β (arXiv 2510.22037, Eqs. 1–3, with the capacity term of Eq. 7 on A).

    The data-side term K^ψ of Eq. 7 is left out: D_eff already carries it, and the two cannot be told apart.

    Args:
      N: [...] parameters.
      D: [..., Ls] tokens per source.
      U: [..., Ls] unique tokens per source.
      E, A, alpha, B, beta, lam: [...] the target language's law.
      transfer: [..., Ls] τ of each source for the target; 1 at the target itself.
      phi: capacity exponent, 0 for no curse of multilinguality.
      guard: see `effective_tokens`.

    Returns:
      [...] loss, in the unit of E.
    """
    D_eff = effective_tokens(D, U, transfer, lam, guard)
    return chinchilla(N, D_eff, E, A * num_languages(D) ** phi, alpha, B, beta)


def data_constrained(
    N: ArrayLike,
    D: ArrayLike,
    U: ArrayLike,
    E: ArrayLike,
    A: ArrayLike,
    alpha: ArrayLike,
    B: ArrayLike,
    beta: ArrayLike,
    R_D: ArrayLike,
    R_N: ArrayLike,
) -> jax.Array:
    """Loss under repetition, with diminishing value of repeated tokens and of excess parameters.

    Muennighoff et al. (arXiv 2305.16264): E + A/N'^α + B/D'^β, where D' = S(D; U) with λ = 1/R_D and N'
    saturates in the same way beyond the size that is compute-optimal for the unique tokens seen.

    >>> round(float(data_constrained(1e9, 1e10, 1e10, 1.87, 521., .3526596, 1488., .3526596, 15.39, 5.31)), 3)
    2.667
    """
    N, D = jnp.asarray(N), jnp.asarray(D)
    unique = jnp.minimum(D, U)
    N_optimal = jnp.power(alpha * A / (beta * B) * jnp.power(unique, beta), 1.0 / alpha)
    return chinchilla(saturation(N, N_optimal, 1.0 / R_N), saturation(D, U, 1.0 / R_D), E, A, alpha, B, beta)
