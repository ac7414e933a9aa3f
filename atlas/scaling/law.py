"""Scaling laws as pure functions of parameters and runs, and `JointLaw`, the form in which a fitted joint law travels.

Legend: N parameters, D tokens seen, U unique tokens, K languages. Every function broadcasts, works in the dtype of its
arguments and is differentiable in all of them.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from checked import UserError, unknown

FLOPS_PER_PARAMETER_TOKEN = 6  # of training: C = 6·N·D
# Width of the smooth lower bound on D_eff / D_tot: rows above 40 widths, which is nearly all, do not feel it.
GUARD = 1e-3
_LOG2 = float(np.log(2.0))  # softplus of 0
_STRAY = 0.01  # of a target's rows may lie below the effective share that they support: a stray row must not set it


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


def effective_tokens(
    D: ArrayLike,
    U: ArrayLike,
    transfer: ArrayLike,
    lam: ArrayLike,
    eta: ArrayLike | None = None,
    guard: ArrayLike = GUARD,
) -> jax.Array:
    """Tokens of the target language that a mixture is worth: D_eff of ATLAS (Eq. 2), kept positive.

    The sum over sources of transfer · S_λ(D; U), or with η the aggregate of constant elasticity of substitution
    (Σ transfer · S^η)^{1/η} (Arrow, Chenery, Minhas and Solow 1961): below η = 1 the first tokens of every language are
    worth more than its later ones beside the same others. Both are proportional to D_tot at given shares, and the
    target's own tokens where it is alone.

    Args:
      D: [..., Ls] tokens seen per source.
      U: [..., Ls] unique tokens per source.
      transfer: [..., Ls] τ of each source for the target; 1 at the target itself.
      lam: [..., Ls] repetition rate of each source, or [..., 1] of all of them.
      eta: [...] exponent of substitution; None for the plain sum.
      guard: width of the smooth lower bound, see `kept_positive`.

    Returns:
      [...] effective tokens.
    """
    z = kept_positive(mixed_share(D, U, transfer, lam, eta), guard)
    return jnp.sum(D, -1) * (z if eta is None else z ** (1.0 / eta))


def mixed_share(
    D: ArrayLike, U: ArrayLike, transfer: ArrayLike, lam: ArrayLike, eta: ArrayLike | None = None
) -> jax.Array:
    """Σ transfer · (S/D_tot)^η [...], of which D_eff/D_tot is the power 1/η; arguments as for `effective_tokens`."""
    return jnp.sum(transfer * worths(D, U, lam, eta), -1)


def worths(D: ArrayLike, U: ArrayLike, lam: ArrayLike, eta: ArrayLike | None = None) -> jax.Array:
    """(S/D_tot)^η [..., Ls], what every source adds to the mixed share at τ = 1; arguments as for `mixed_share`."""
    shares = saturation(D, U, lam) / jnp.sum(D, -1)[..., None]
    return shares if eta is None else _power(shares, jnp.asarray(eta)[..., None])


def _power(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """x^exponent of x ≥ 0, with finite slopes at 0."""
    return jnp.where(x > 0, jnp.where(x > 0, x, 1.0) ** exponent, 0.0)


def effective_share(
    D: ArrayLike, U: ArrayLike, transfer: ArrayLike, lam: ArrayLike, eta: ArrayLike | None = None
) -> jax.Array:
    """z = D_eff / D_tot [...] before it is kept positive: strongly negative transfer can make it so too."""
    mixed = mixed_share(D, U, transfer, lam, eta)
    return mixed if eta is None else jnp.sign(mixed) * _power(jnp.abs(mixed), 1.0 / jnp.asarray(eta))


def kept_positive(z: jax.Array, guard: jax.Array | float) -> jax.Array:
    """z itself to rounding above 40·guard, and above 0 everywhere: guard·softplus(z/guard) down to 0, guard²/|z| below.

    Were it softplus below 0 too, it would fall exponentially: losses B/D_eff^β would grow without bounds there, and a
    slope of 1/guard wherever z is negative would hold a fit in place.
    """
    x = z / guard
    below = _LOG2 / (1.0 - jnp.minimum(x, 0.0) / (2.0 * _LOG2))  # with the value and the slope of softplus at 0
    return guard * jnp.where(x > 0, jax.nn.softplus(jnp.maximum(x, 0.0)), below)


@partial(jax.jit, inline=True)
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


def capacity(N, K, D, E, A, alpha, B, beta, phi, psi):
    """Loss E + A·K^φ/N^α + B·K^ψ/D^β (ATLAS, arXiv 2510.22037, Eq. 7), D being tokens of the target language.

    φ > 0: every added language costs capacity; ψ < 0: added languages carry over to the target. K = 1 is Chinchilla's
    law; the data term equals B·K^(ψ+β)/D_tot^β in the total tokens D_tot = K·D of an even mixture. Broadcasts, and
    works in the arrays of its arguments.

    >>> capacity(1e8, 1, 1e9, 1.0, 400.0, 0.4, 300.0, 0.3, 0.1, -0.05) == 1.0 + 400.0 / 1e8**0.4 + 300.0 / 1e9**0.3
    True
    """
    return E + A * K**phi / N**alpha + B * K**psi / D**beta


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
    eta: ArrayLike | None = None,
) -> jax.Array:
    """Loss E + A·K^φ/N^α + B/D_eff^β (arXiv 2510.22037, Eqs. 1–3, with the capacity term of Eq. 7 on A).

    The data-side term K^ψ of Eq. 7 is left out: D_eff already carries it, and the two cannot be told apart.

    Args:
      N: [...] parameters.
      D: [..., Ls] tokens per source.
      U: [..., Ls] unique tokens per source.
      E, A, alpha, B, beta: [...] the target language's law.
      transfer, lam, eta: see `effective_tokens`.
      phi: capacity exponent, 0 for no curse of multilinguality.

    Returns:
      [...] loss, in the unit of E.
    """
    D_eff = effective_tokens(D, U, transfer, lam, eta)
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class JointLaw:
    """The law `atlas` of every target language at once, or anything else that has one value a parameter.

    A pytree of arrays, whose leading axes [...] are draws.

    Attributes:
      targets, sources: Lt and Ls languages; the targets are the first of the sources.
      E, A, alpha, B, beta: [..., Lt], A and B at one parameter and one token.
      lam: [..., Lt, 1] repetition rates where they belong to the targets, [..., 1, Ls] where to the sources.
      tau: [..., Lt, Ls] transfer weights, 1 of a target on itself.
      phi: [...] capacity exponent.
      eta: [..., Lt] exponents of substitution; None where effective tokens are a plain sum.
    """

    targets: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    sources: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    E: ArrayLike
    A: ArrayLike
    alpha: ArrayLike
    B: ArrayLike
    beta: ArrayLike
    lam: ArrayLike
    tau: ArrayLike
    phi: ArrayLike
    eta: ArrayLike | None = None

    @property
    def rates_by_source(self) -> bool:
        """Whether repetition rates belong to the sources."""
        return np.shape(self.lam)[-1] > 1

    def loss(self, N: ArrayLike, D: ArrayLike, U: ArrayLike, target: ArrayLike | None = None) -> np.ndarray:
        """float64 losses, in the unit of E, where the arguments broadcast against the draws; traced where they are.

        Args:
          N: [...] parameters.
          D: [..., Ls] tokens by source.
          U: [..., Ls] unique tokens, infinite where nothing repeats.
          target: [...] index of the evaluated language; without it all of them are.

        Returns:
          [..., Lt], or [...] of the given targets.
        """
        with jax.enable_x64(True):
            return _concrete(_losses(self, *(jnp.asarray(values, float) for values in (N, D, U)), target))

    def effective_share(self, D: ArrayLike, U: ArrayLike, target: ArrayLike | None = None) -> np.ndarray:
        """z = D_eff / D_tot, which may be negative; arguments and shape as for `loss`."""
        with jax.enable_x64(True):
            return _concrete(_effective_shares(self, *(jnp.asarray(values, float) for values in (D, U)), target))

    def supported_share(self, D: ArrayLike, U: ArrayLike) -> np.ndarray:
        """z [Lt] that nearly all of the given rows [n, Ls] which train a target exceed; at least GUARD."""
        z, trained = self.effective_share(D, U), np.asarray(D)[:, : len(self.targets)] > 0
        least = [np.quantile(z[on, t], _STRAY) if on.any() else 0.0 for t, on in enumerate(trained.T)]
        return np.maximum(least, GUARD)

    def language(self, name: str) -> dict[str, np.ndarray]:
        """E, A, alpha, B, beta, lambda [...] of one target, on its own tokens alone.

        Raises:
          UserError: it is no target of the law.
        """
        if name not in self.targets:
            raise unknown("target language", name, self.targets)
        t = self.targets.index(name)
        rate = (..., 0, t) if self.rates_by_source else (..., t, 0)
        levels = {key: np.asarray(getattr(self, key))[..., t] for key in ("E", "A", "alpha", "B", "beta")}
        return levels | {"lambda": np.asarray(self.lam)[rate]}

    def named(self) -> dict[str, ArrayLike]:
        """Every parameter [...] by the name that tables and files print: E[en], …, tau[en<-fr], lambda[<-fr], phi.

        >>> law = JointLaw(("en",), ("en", "fr"), *[[2.0]] * 5, [[0.1]], [[1.0, 0.3]], 0.1)
        >>> {name: float(value) for name, value in law.named().items() if name > "beta"}
        {'beta[en]': 2.0, 'lambda[en]': 0.1, 'tau[en<-fr]': 0.3, 'phi': 0.1}
        """
        found: dict[str, ArrayLike] = {}
        for t, target in enumerate(self.targets):
            found |= {f"{key}[{target}]": _at(getattr(self, key), t) for key in ("E", "A", "alpha", "B", "beta")}
            found |= {} if self.rates_by_source else {f"lambda[{target}]": _at(self.lam, t, 0)}
            found |= {} if self.eta is None else {f"eta[{target}]": _at(self.eta, t)}
            found |= {f"tau[{target}<-{name}]": _at(self.tau, t, s) for s, name in enumerate(self.sources) if s != t}
        if self.rates_by_source:
            found |= {f"lambda[<-{name}]": _at(self.lam, 0, s) for s, name in enumerate(self.sources)}
        return found | {"phi": self.phi}

    def to_json(self) -> dict:
        """Plain values, ready for json.dumps; a number that is not finite becomes None."""
        arrays = {name: _plain(getattr(self, name)) for name in _ARRAYS}
        return {"targets": list(self.targets), "sources": list(self.sources)} | arrays

    @classmethod
    def from_json(cls, document: Mapping) -> "JointLaw":
        """The law that `to_json` wrote.

        Raises:
          UserError: the document is of another kind.
        """
        try:
            known = [name for name in _ARRAYS if name != "eta" or document.get("eta") is not None]
            arrays = {name: np.array(document[name], float) for name in known}
            law = cls(tuple(document["targets"]), tuple(document["sources"]), **arrays)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"no law of all languages: {error}; fit the runs again") from None
        Lt, Ls = len(law.targets), len(law.sources)
        wanted = dict.fromkeys(("E", "A", "alpha", "B", "beta"), (Lt,)) | {"tau": (Lt, Ls), "phi": ()}
        wanted["lam"] = (1, Ls) if law.rates_by_source else (Lt, 1)
        wanted["eta"] = (Lt,)
        for name, values in arrays.items():
            if values.shape != wanted[name]:
                raise UserError(f"no law of all languages: {name} is {values.shape}, its languages need {wanted[name]}")
        return law


def _concrete(values: jax.Array) -> Any:
    # Arithmetic with a jax array would fall back to float32 where nobody enabled 64 bits.
    return values if isinstance(values, jax.core.Tracer) else np.asarray(values)


@jax.jit
def _losses(law: JointLaw, N: jax.Array, D: jax.Array, U: jax.Array, target: jax.Array | None) -> jax.Array:
    D, U, law = _of_rows(law, D, U, target)
    N = N[..., None] if target is None else N
    phi = jnp.reshape(law.phi, jnp.shape(law.phi) + (1,) * (jnp.ndim(law.E) - jnp.ndim(law.phi)))
    return atlas(N, D, U, law.E, law.A, law.alpha, law.B, law.beta, law.tau, law.lam, phi, law.eta)


@jax.jit
def _effective_shares(law: JointLaw, D: jax.Array, U: jax.Array, target: jax.Array | None) -> jax.Array:
    D, U, law = _of_rows(law, D, U, target)
    return effective_share(D, U, law.tau, law.lam, law.eta)


def _of_rows(law: JointLaw, D: jax.Array, U: jax.Array, target: jax.Array | None):
    """Tokens and law with an axis of targets before that of sources, or of each row's own target."""
    if target is None:
        return D[..., None, :], U[..., None, :], law
    by_target = ("E", "A", "alpha", "B", "beta", *(() if law.eta is None else ("eta",)))
    levels = {name: getattr(law, name)[..., target] for name in by_target}
    rates = jnp.broadcast_to(law.lam, (*law.tau.shape[:-1], law.lam.shape[-1]))
    return D, U, dataclasses.replace(law, lam=rates[..., target, :], tau=law.tau[..., target, :], **levels)


_ARRAYS = ("E", "A", "alpha", "B", "beta", "lam", "tau", "phi", "eta")


def _at(values: ArrayLike, *index: int) -> ArrayLike:
    values = values if isinstance(values, jax.Array) else np.asarray(values)
    return values[(..., *index)]


def _plain(values: ArrayLike) -> list | float | None:
    values = np.asarray(values, float)
    return np.where(np.isfinite(values), values, None).tolist()
