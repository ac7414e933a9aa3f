"""Numerics of the joint fit: rows of all target languages, noise, priors, and the linear system they make.

Every target language t has a block θ_t = (log E, a, log α, b, log β, log λ, τ_{t←s} for all Ls sources, log η) with
a = log(A/N₀^α) and b = log(B/D₀^β), N₀ and D₀ being geometric means: in these units the blocks are well conditioned.
The τ of a target on itself is pinned at 1; where effective tokens are a plain sum, blocks end before log η. Shared
parameters are h direct ones, which the law itself holds (φ, and log λ of every source where repetition belongs to the
source), then the means that the blocks are drawn to. Arrays carry t target, r row, g group (the rows of one run on
one target), s source, p and q parameters.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atlas.scaling import law as laws
from atlas.scaling.joint.arrow import Arrow, Coordinates, factor
from atlas.scaling.law import GUARD, JointLaw
from atlas.scaling.noise import HUBER, HUBER_VARIANCE, Groups

LOG_E, LOG_A, LOG_ALPHA, LOG_B, LOG_BETA, LOG_LAMBDA, TAU = range(7)
PHI, SOURCE_LAMBDA = range(2)  # in the direct shared parameters


class Rows(NamedTuple):
    """Evaluations by target; N in N₀, D and U in D₀. A padded row has weight 0 and harmless values."""

    log_loss: jax.Array  # [t, r]
    N: jax.Array  # [t, r]
    D: jax.Array  # [t, r, s]
    U: jax.Array  # [t, r, s]
    weight: jax.Array  # [t, r] 1 or 0
    group: jax.Array  # [t, r] int
    group_size: jax.Array  # [t, g] 0 where padded
    group_run: jax.Array  # [t, g] int, index into the runs
    languages: jax.Array  # [t, r] effective number K of the mixture


class Prior(NamedTuple):
    """Normal priors: θ_t around base + selector · means, the shared parameters around their own mean.

    A block's parameters vary alone, and those with effect 1 (the τ of other languages) also all together.
    """

    base: jax.Array  # [t, p]
    selector: jax.Array  # [t, p, k] 0 or 1; the means are the last k shared parameters
    variance: jax.Array  # [t, p]
    effect: jax.Array  # [t, p] 0 or 1
    effect_variance: jax.Array
    shared_mean: jax.Array  # [q]
    shared_precision: jax.Array  # [q]


class Noise(NamedTuple):
    """Log-loss noise: variance, correlation within a run on one target, weight of every run, and where rows are
    winsorised."""

    variance: jax.Array
    rho: jax.Array
    run_weight: jax.Array  # [runs]
    clip: jax.Array  # residual

    @property
    def scale(self) -> jax.Array:
        """Variance of what the rows of a run do not share."""
        return self.variance * (1.0 - self.rho)

    @property
    def corner(self) -> jax.Array:
        """1.345σ, where Huber winsorises."""
        return HUBER * (self.variance / HUBER_VARIANCE) ** 0.5


class State(NamedTuple):
    x: Coordinates
    noise: Noise
    prior: Prior


class Linear(NamedTuple):
    """The law of all rows near one point."""

    log_loss: jax.Array  # [t, r]
    jacobian: jax.Array  # [t, r, p+h] by θ_t and the direct shared parameters


class Units(NamedTuple):
    """N₀ and D₀: geometric means of parameters and of total tokens."""

    N: float
    D: float


@partial(jax.jit, static_argnames=("targets", "sources"))
def natural(theta, direct, units: Units, targets: tuple[str, ...], sources: tuple[str, ...]) -> JointLaw:
    """The law of blocks [..., t, p] and direct shared parameters [..., h], A and B at one parameter and one token."""
    E, a, alpha, b, beta = (jnp.exp(theta[..., i]) for i in range(LOG_LAMBDA))
    by_source = direct.shape[-1] > 1
    lam = direct[..., None, SOURCE_LAMBDA:] if by_source else theta[..., LOG_LAMBDA, None]
    A, B = a * units.N**alpha, b * units.D**beta
    tau, eta = mixing(theta, len(sources))
    return JointLaw(targets, sources, E, A, alpha, B, beta, jnp.exp(lam), tau, direct[..., PHI], eta)


def mixing(theta: jax.Array, sources: int) -> tuple[jax.Array, jax.Array | None]:
    """τ [..., Ls] and η [...] of blocks [..., p]; None where the block has none."""
    end = TAU + sources
    return theta[..., TAU:end], jnp.exp(theta[..., end]) if theta.shape[-1] > end else None


def natural_arrays(theta, direct, units: Units, targets: tuple[str, ...], sources: tuple[str, ...]) -> JointLaw:
    """`natural` in NumPy's float64, whatever the caller's precision."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, natural(theta, direct, units, targets, sources))


def log_loss(theta: jax.Array, direct: jax.Array, N: jax.Array, D: jax.Array, U: jax.Array, guard: float = GUARD):
    """log of `laws.atlas` for one row, from a block θ [p] and the direct shared [h]; N in N₀, D and U [s] in D₀."""
    tau, eta = mixing(theta, len(D))
    mixed = laws.mixed_share(D, U, tau, repetition(theta, direct), eta)
    return _log_loss(theta[:LOG_LAMBDA], mixed, direct[PHI], eta, N, jnp.sum(D), laws.num_languages(D), guard)


def _log_loss(levels, mixed, phi, eta, N, total, languages, guard) -> jax.Array:
    E, A, alpha, B, beta = jnp.exp(levels)
    z = laws.kept_positive(mixed, guard)
    D_eff = total * (z if eta is None else z ** (1.0 / eta))
    return jnp.log(laws.chinchilla(N, D_eff, E, A * languages**phi, alpha, B, beta))


def _slopes(theta, direct, N, D, U, languages, guard=GUARD) -> tuple[jax.Array, jax.Array]:
    """`log_loss` of one row and its slopes [p+h]: τ and λ reach it through the mixed share alone, η also otherwise."""
    by_source, (tau, eta) = len(direct) > 1, mixing(theta, len(D))
    rate = jnp.broadcast_to(direct[SOURCE_LAMBDA:] if by_source else theta[LOG_LAMBDA], D.shape)
    worth, bend = jax.jvp(lambda rate: laws.worths(D, U, jnp.exp(rate), eta), (rate,), (jnp.ones_like(rate),))
    at = (theta[:LOG_LAMBDA], tau @ worth, direct[PHI], eta, N, jnp.sum(D), languages, guard)
    if eta is None:
        value, (by_level, by_mixed, by_phi) = jax.value_and_grad(_log_loss, (0, 1, 2))(*at)
        by_eta = by_level[:0]
    else:
        value, (by_level, by_mixed, by_phi, by_eta) = jax.value_and_grad(_log_loss, (0, 1, 2, 3))(*at)
        _, turn = jax.jvp(lambda eta: laws.worths(D, U, jnp.exp(rate), eta), (eta,), (jnp.ones_like(eta),))
        by_eta = (eta * (by_eta + by_mixed * (tau @ turn)))[None]
    by_rate = by_mixed * tau * bend
    own_rate, of_sources = (0.0, by_rate) if by_source else (jnp.sum(by_rate), by_rate[:0])
    own = [by_level, jnp.array([own_rate]), by_mixed * worth, by_eta]
    return value, jnp.concatenate([*own, by_phi[None], of_sources])


def repetition(theta: jax.Array, direct: jax.Array) -> jax.Array:
    """λ of one target's law: its own, or [s] where repetition belongs to the sources."""
    return jnp.exp(direct[SOURCE_LAMBDA:] if len(direct) > 1 else theta[LOG_LAMBDA])


def direct_part(x: Coordinates, prior: Prior) -> jax.Array:
    """[h] the shared parameters that the law itself holds."""
    return x.shared[: len(x.shared) - prior.selector.shape[-1]]


def linearise(state: State, rows: Rows, guard: jax.Array | float = GUARD) -> Linear:
    return _linearise(state, rows, guard)  # always given, since a default compiles a second program


@jax.jit
def _linearise(state: State, rows: Rows, guard: jax.Array | float) -> Linear:
    by_row = jax.vmap(_slopes, (None, None, 0, 0, 0, 0, None))
    by_target = jax.vmap(by_row, (0, None, 0, 0, 0, 0, None))
    direct = direct_part(state.x, state.prior)
    return Linear(*by_target(state.x.own, direct, rows.N, rows.D, rows.U, rows.languages, guard))


def groups_of(rows: Rows, noise: Noise) -> Groups:
    """The rows of one run on one target correlate; a run's weight is the trust in all of its groups."""
    return Groups(rows.group, rows.weight, rows.group_size, noise.run_weight[rows.group_run])


def precision(prior: Prior) -> jax.Array:
    """[t, p, p] of the blocks around what they are drawn to."""
    alone = 1.0 / prior.variance
    moved = prior.effect * alone
    spread = effect_spread(prior)
    return jax.vmap(jnp.diag)(alone) - jnp.einsum("t,tp,tk->tpk", spread, moved, moved)


def effect_spread(prior: Prior) -> jax.Array:
    """[t] variance that a target's effect keeps once its parameters are known."""
    return prior.effect_variance / (1.0 + prior.effect_variance * jnp.sum(prior.effect / prior.variance, 1))


def gap(x: Coordinates, prior: Prior) -> jax.Array:
    """[t, p] distance of the blocks from what they are drawn to."""
    return x.own - prior.base - prior.selector @ x.shared[len(x.shared) - prior.selector.shape[-1] :]


def penalty(x: Coordinates, prior: Prior) -> jax.Array:
    """Minus the log prior, without its constants."""
    own = jnp.einsum("tp,tpk,tk->", gap(x, prior), precision(prior), gap(x, prior))
    return 0.5 * (own + jnp.sum(prior.shared_precision * (x.shared - prior.shared_mean) ** 2))


def system(
    x: Coordinates, gradient: jax.Array, hessian: jax.Array, scale: jax.Array, prior: Prior
) -> tuple[Coordinates, Arrow]:
    """Gradient and Hessian of minus the log posterior, from the whitened sums over `scale` and the prior."""
    p = x.own.shape[1]
    own_precision = precision(prior)
    pull = jnp.einsum("tpk,tk->tp", own_precision, gap(x, prior))
    drawn = jnp.einsum("tpk,tkq->tpq", own_precision, prior.selector)
    shared = jnp.concatenate([jnp.sum(gradient[:, p:], 0) / scale, jnp.einsum("tpq,tp->q", prior.selector, pull)])
    shared = prior.shared_precision * (x.shared - prior.shared_mean) - shared
    border = jnp.concatenate([hessian[:, :p, p:] / scale, -drawn], -1)
    by_law, by_means = jnp.sum(hessian[:, p:, p:], 0) / scale, jnp.einsum("tpq,tpk->qk", prior.selector, drawn)
    corner = jax.scipy.linalg.block_diag(by_law, by_means) + jnp.diag(prior.shared_precision)
    slope = Coordinates(-gradient[:, :p] / scale + pull, shared)
    return slope, Arrow(hessian[:, :p, :p] / scale + own_precision, border, corner)


def told(hessian: jax.Array, scale: jax.Array, prior: Prior) -> Coordinates:
    """The diagonal of the Hessian that the rows alone make."""
    means, p = prior.selector.shape[-1], prior.base.shape[1]
    diagonal = jnp.diagonal(hessian, axis1=1, axis2=2) / scale
    return Coordinates(diagonal[:, :p], jnp.append(jnp.sum(diagonal[:, p:], 0), jnp.zeros(means)))


def covariance(matrix: Arrow, h: int) -> tuple[jax.Array, Arrow]:
    """Covariance of θ_t and the h direct [t, p+h, p+h]; and blocks⁻¹, coupling, covariance of all shared."""
    factors = factor(matrix)
    own = jnp.swapaxes(factors.inverse, 1, 2) @ factors.inverse
    shared = jax.scipy.linalg.cho_solve((factors.schur, True), jnp.eye(len(factors.schur)))
    full = own + jnp.einsum("tpq,qk,tlk->tpl", factors.coupling, shared, factors.coupling)
    cross = -jnp.einsum("tpq,qk->tpk", factors.coupling, shared[:, :h])
    corner = jnp.broadcast_to(shared[:h, :h], (len(own), h, h))
    bottom = jnp.concatenate([jnp.swapaxes(cross, 1, 2), corner], -1)
    everything = jnp.concatenate([jnp.concatenate([full, cross], -1), bottom], 1)
    return everything, Arrow(own, factors.coupling, shared)


def lowest_z(state: State, rows: Rows) -> jax.Array:
    """Smallest D_eff / D_tot over used rows, before the guard."""
    lam = jax.vmap(repetition, (0, None))(state.x.own, direct_part(state.x, state.prior))
    lam = jnp.reshape(lam, (len(lam), 1, -1))
    tau, eta = mixing(state.x.own[:, None], rows.D.shape[-1])
    z = laws.effective_share(rows.D, rows.U, tau, lam, eta)
    return jnp.min(jnp.where(rows.weight > 0, z, jnp.inf))


@jax.jit
def slopes(theta, direct, N, D, U, target) -> tuple[jax.Array, jax.Array]:
    """Log losses [n] of single rows, each on its own target, and their Jacobian [n, p+h]."""
    by_row = jax.vmap(_slopes, (0, None, 0, 0, 0, 0))
    return by_row(theta[target], direct, N, D, U, laws.num_languages(D))


@jax.jit
def predict(
    theta: jax.Array, direct: jax.Array, cov: jax.Array, N: jax.Array, D: jax.Array, U: jax.Array, target: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log loss of rows and its standard deviation under the posterior of the law.

    Args:
      theta: [t, p]; direct: [h]; cov: [t, p+h, p+h].
      N: [n]; D, U: [n, s], in N₀ and D₀.
      target: [n] int.
    """
    value, slope = slopes(theta, direct, N, D, U, target)
    return value, jnp.sqrt(jnp.einsum("np,npk,nk->n", slope, cov[target], slope))
