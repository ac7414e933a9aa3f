"""Which mixture to train for a budget: the least weighted loss that a joint fit predicts, inside what it
knows.

An optimiser exploits a law's errors: without bounds it starves languages whose transfer is overestimated, and
picks sizes that no run has seen. So a plan keeps to a trust region: N within a range, a floor under the share
of every language that counts, and effective tokens per token, z = D_eff / D_tot, no lower than nearly all of
training's.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from atlas.errors import UserError, unknown
from atlas.scaling import law as laws
from atlas.scaling.estimates import transfer_pairs
from atlas.scaling.law import FLOPS_PER_PARAMETER_TOKEN, JointLaw
from atlas.scaling.single.draws import band
from atlas.scaling.table.runs import Runs

_STARTS = 32
_DRAW_STARTS = 6  # under every drawn law, from the plan and from points around it
_STEPS = 400
_RATE = 0.1
_PENALTY = 100.0  # nats of loss per squared relative shortfall of z


@dataclass(frozen=True)
class MixtureLaw:
    """Point estimates of the ATLAS law of all languages.

    Attributes:
      targets, sources: Lt and Ls languages.
      levels: E, A, alpha, B, beta, lambda, each [Lt].
      tau: [Lt, Ls], 1 for a language on itself.
      phi: capacity exponent.
    """

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    levels: dict[str, np.ndarray]
    tau: np.ndarray
    phi: float

    @classmethod
    def from_parameters(cls, parameters: Mapping) -> "MixtureLaw":
        """From the `parameters` of a JointFit or of its fit.json: E[en], …, tau[en<-fr], phi.

        Raises:
          UserError: they are of another fit, or their repetition rates belong to the sources.
        """
        value = {name: _value(estimate) for name, estimate in parameters.items()}
        targets = tuple(m[1] for name in value if (m := re.fullmatch(r"E\[(.+)\]", name)))
        pairs = transfer_pairs(value)
        if not targets:
            raise UserError("these parameters are no joint fit: they have no E[<language>]")
        if f"lambda[{targets[0]}]" not in value:
            raise UserError("mixtures need a repetition rate of every target; fit with --lambda_kind=target or shared")
        sources = (*targets, *dict.fromkeys(source for _, source in pairs if source not in targets))
        names = ("E", "A", "alpha", "B", "beta", "lambda")
        levels = {name: np.array([value[f"{name}[{target}]"] for target in targets]) for name in names}
        tau = [[1.0 if t == s else pairs.get((t, s), 0.0) for s in sources] for t in targets]
        return cls(targets, sources, levels, np.array(tau), value.get("phi", 0.0))

    def loss(self, N, D, U) -> np.ndarray:
        """Loss of every target [..., Lt] at N [...] parameters, D [..., Ls] tokens, U [Ls] unique tokens."""
        with jax.enable_x64(True):
            return np.asarray(_losses(self._arrays(), jnp.asarray(N, float), jnp.asarray(D, float), jnp.asarray(U)))

    def effective_share(self, D, U) -> np.ndarray:
        """z = D_eff / D_tot of every target [..., Lt] for D [..., Ls] and U, [..., Ls] or [Ls]."""
        with jax.enable_x64(True):
            return np.asarray(_effective_share(self._arrays(), jnp.asarray(D, float), jnp.asarray(U, float)))

    def _arrays(self) -> "_Arrays":
        return _Arrays(*self.levels.values(), self.tau, np.float64(self.phi))


def _value(estimate) -> float:
    value = estimate["value"] if isinstance(estimate, Mapping) else estimate.value
    return float("nan") if value is None else float(value)


def _repeated(law: "_Arrays", count: int) -> "_Arrays":
    return _Arrays(*(np.broadcast_to(leaf, (count, *np.shape(leaf))) for leaf in law))


class _Arrays(NamedTuple):
    E: jax.Array
    A: jax.Array
    alpha: jax.Array
    B: jax.Array
    beta: jax.Array
    lam: jax.Array
    tau: jax.Array  # [Lt, Ls]
    phi: jax.Array


def _losses(law: _Arrays, N: jax.Array, D: jax.Array, U: jax.Array) -> jax.Array:
    N, D = N[..., None], D[..., None, :]
    return laws.atlas(N, D, U, *law[:5], law.tau, law.lam[..., None], law.phi)


def _effective_share(law: _Arrays, D: jax.Array, U: jax.Array) -> jax.Array:
    S = laws.saturation(D[..., None, :], U[..., None, :], law.lam[:, None])
    return jnp.sum(law.tau * S, -1) / jnp.sum(D, -1, keepdims=True)


@dataclass(frozen=True)
class TrustRegion:
    """Where a law may be believed.

    Attributes:
      params: least and largest N.
      effective_share: [Lt] least z of each target.
      share_floor: least share of a language whose loss counts.
    """

    params: tuple[float, float]
    effective_share: np.ndarray
    share_floor: float

    @classmethod
    def of_runs(
        cls,
        law: MixtureLaw,
        runs: Runs,
        quantile: float = 0.01,
        share_floor: float = 0.02,
        reach: float = 10.0,
    ) -> "TrustRegion":
        """z that all but `quantile` of a target's rows exceed; N up to `reach` times the largest run's."""
        place = [runs.languages.index(name) if name in runs.languages else None for name in law.sources]
        D = np.stack([np.zeros(len(runs)) if i is None else runs.D[:, i] for i in place], 1)
        U = np.stack([np.full(len(runs), np.inf) if i is None else runs.U[:, i] for i in place], 1)
        z = law.effective_share(D, U)
        trained = D[:, : len(law.targets)] > 0
        least = [np.quantile(z[trained[:, t], t], quantile) if trained[:, t].any() else 0.0 for t in range(z.shape[1])]
        params = (float(runs.N.min()), float(runs.N.max() * reach))
        return cls(params, np.maximum(least, 1e-3), share_floor)


@dataclass(frozen=True)
class MixturePlan:
    """A mixture for a budget, as predicted.

    Attributes:
      params, tokens, flops: N, D_tot = C/(6N), C.
      table: a row per source: language, share, tokens, epochs, weight, loss (NaN for a source without a law),
        even_loss (of the even mixture over the counted languages at its own best N); with draws also share_low
        and share_high, the 90 % band of the best share over them.
      loss, even_loss: weighted means.
      warnings: where the plan stands at a bound or the search was unsure.
      band: with draws, 90 % bands over them: loss_low and _high of what the plan promises, params_low and _high
        of the best N, and regret_median and regret_high (95 % quantile): the loss of this plan under a drawn law
        less the best loss under it, within the same bounds.
    """

    params: float
    tokens: float
    flops: float
    table: pd.DataFrame
    loss: float
    even_loss: float
    warnings: tuple[str, ...]
    band: Mapping[str, float] = field(default_factory=dict)


def optimal_mixture(
    law: MixtureLaw,
    flops: float,
    trust: TrustRegion,
    weights: Mapping[str, float] | None = None,
    unique_tokens: Mapping[str, float] | None = None,
    seed: int = 0,
    draws: JointLaw | None = None,
) -> MixturePlan:
    """Shares and N that minimise the weighted mean loss at C = 6·N·D_tot FLOPs, inside the trust region.

    Shares are a softmax above their floors, N a sigmoid between its bounds; Adam from 32 starts at once, the
    best of which counts. Shortfalls of z are penalised, not forbidden: the plan says where one is left.

    Args:
      law: the fitted law.
      flops: C, positive.
      trust: see TrustRegion.
      weights: importance of each target language, not negative; by default all alike.
      unique_tokens: U per source language; absent means that it never repeats.
      seed: of the starts.
      draws: laws that the runs allow, of the same languages, for the plan's band.
    """
    if not (np.isfinite(flops) and flops > 0):
        raise UserError(f"the budget in FLOPs must be positive; got {flops}")
    weight = _vector(weights or dict.fromkeys(law.targets, 1.0), law.targets, 0.0, "target language")
    if weight.min() < 0 or weight.sum() <= 0:
        raise UserError("weights must not be negative, and one must be positive")
    U = _vector(unique_tokens or {}, law.sources, np.inf, "source language")
    if U.min() <= 0:
        raise UserError(f"unique tokens must be positive; {law.sources[int(U.argmin())]} has {U.min():g}")
    weight = weight / weight.sum()
    counted = np.concatenate([weight > 0, np.zeros(len(law.sources) - len(weight), bool)])
    floor = np.where(counted, min(trust.share_floor, 0.5 / counted.sum()), 0.0)
    problem = _Problem(
        law._arrays(),
        law._arrays(),
        weight,
        U,
        floor,
        np.log(trust.params),
        np.where(weight > 0, trust.effective_share, 0.0),
        flops,
    )
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=1.5, size=(_STARTS, len(U)))
    logits[0] = np.where(counted, 0.0, -4.0)
    start = np.concatenate([rng.normal(size=(_STARTS, 1)), logits], 1)
    with jax.enable_x64(True):
        end, value = _descend(problem, _repeated(problem.law, _STARTS), start)
    best = end[int(np.nanargmin(value))]
    N, shares = (np.asarray(x) for x in _unpack(problem, best, np))
    # The even mixture chooses its own size, or the gain would be partly one of allocation.
    sizes = np.geomspace(*trust.params, 201)
    even = law.loss(sizes, flops / (FLOPS_PER_PARAMETER_TOKEN * sizes[:, None]) * counted / counted.sum(), U)
    even = even[int(np.argmin(even @ weight))]
    plan = _plan(law, problem, trust, float(N), shares, even, value)
    return plan if draws is None else _with_band(plan, law, problem, draws, best, rng)


def _with_band(
    plan: MixturePlan, law: MixtureLaw, problem: "_Problem", draws: JointLaw, x: np.ndarray, rng: np.random.Generator
) -> MixturePlan:
    """The plan with its bands; x [1 + Ls] is its unconstrained vector."""
    if (draws.targets, draws.sources) != (law.targets, law.sources):
        raise UserError("the draws are of a fit with other languages than the law's")
    loss, regret, points = _replan(
        problem,
        _Arrays(draws.E, draws.A, draws.alpha, draws.B, draws.beta, draws.lam[..., 0], draws.tau, draws.phi),
        x,
        rng,
    )
    ends = {"loss": band(loss), "params": band(np.array([N for N, _ in points]))}
    found = {f"{name}_{side}": pair[i] for name, pair in ends.items() for i, side in enumerate(("low", "high"))}
    found |= {"regret_median": float(np.nanmedian(regret)), "regret_high": float(np.nanquantile(regret, 0.95))}
    low, high = np.array([band(column) for column in np.array([shares for _, shares in points]).T]).T
    return replace(plan, table=plan.table.assign(share_low=low, share_high=high), band=found)


def _replan(problem: "_Problem", drawn: "_Arrays", x: np.ndarray, rng: np.random.Generator):
    """Under every drawn law: mean loss [n] at x, its excess over the best [n], and the best (N, shares) themselves."""
    count = len(drawn.phi)
    start = x + rng.normal(size=(_DRAW_STARTS, len(x))) * (np.arange(_DRAW_STARTS) > 0)[:, None]
    with jax.enable_x64(True):
        lanes = _Arrays(*(np.repeat(leaf, _DRAW_STARTS, 0) for leaf in drawn))
        end, value = _descend(problem, lanes, np.tile(start, (count, 1)))
        loss, here = map(np.asarray, _judge(problem._replace(law=drawn), x))
    value = np.where(np.isfinite(value), value, np.inf).reshape(count, _DRAW_STARTS)
    best = end.reshape(*value.shape, -1)[np.arange(count), value.argmin(1)]
    return loss, np.maximum(here - value.min(1), 0.0), [_unpack(problem, row, np) for row in best]


def _vector(given: Mapping[str, float], names: tuple[str, ...], default: float, kind: str) -> np.ndarray:
    for name in given:
        if name not in names:
            raise unknown(kind, name, names)
    return np.array([float(given.get(name, default)) for name in names])


class _Problem(NamedTuple):
    law: _Arrays  # that gives the loss
    known: _Arrays  # that bounds z: what training covered does not depend on the draw
    weight: jax.Array  # [Lt]
    unique: jax.Array  # [Ls]
    floor: jax.Array  # [Ls]
    log_bounds: jax.Array  # [2]
    least_z: jax.Array  # [Lt]
    flops: float


def _unpack(problem: _Problem, x, np_=jnp):
    """N and shares [Ls] from an unconstrained vector [1 + Ls]."""
    low, high = problem.log_bounds
    N = np_.exp(low + (high - low) / (1 + np_.exp(-x[0])))
    soft = np_.exp(x[1:] - np_.max(x[1:]))
    return N, problem.floor + (1 - np_.sum(problem.floor)) * soft / np_.sum(soft)


def _mean_loss(x: jax.Array, problem: _Problem) -> jax.Array:
    N, shares = _unpack(problem, x)
    loss = _losses(problem.law, N, problem.flops / (FLOPS_PER_PARAMETER_TOKEN * N) * shares, problem.unique)
    return jnp.sum(jnp.where(problem.weight > 0, problem.weight * loss, 0.0))


def _objective(x: jax.Array, problem: _Problem) -> jax.Array:
    N, shares = _unpack(problem, x)
    z = _effective_share(problem.known, problem.flops / (FLOPS_PER_PARAMETER_TOKEN * N) * shares, problem.unique)
    short = jnp.maximum(1 - z / jnp.where(problem.least_z > 0, problem.least_z, 1.0), 0.0)
    return _mean_loss(x, problem) + _PENALTY * jnp.sum(jnp.where(problem.least_z > 0, short, 0.0) ** 2)


def _adam(problem: _Problem, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adam with a rate falling to zero; the end point and its objective."""
    gradient = jax.grad(_objective)

    def step(carry, i):
        x, mean, square = carry
        g = gradient(x, problem)
        mean, square = 0.9 * mean + 0.1 * g, 0.99 * square + 0.01 * g**2
        unbiased = mean / (1 - 0.9 ** (i + 1))
        scale = jnp.sqrt(square / (1 - 0.99 ** (i + 1))) + 1e-12
        rate = _RATE * 0.5 * (1 + jnp.cos(jnp.pi * i / _STEPS))
        return (x - rate * unbiased / scale, mean, square), None

    zero = jnp.zeros_like(x)
    (x, _, _), _ = jax.lax.scan(step, (x, zero, zero), jnp.arange(_STEPS))
    return x, _objective(x, problem)


_BY_LAW = _Problem(0, *[None] * (len(_Problem._fields) - 1))
_lanes = jax.jit(jax.vmap(_adam, (_BY_LAW, 0)))


def _descend(problem: _Problem, by_law: _Arrays, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """End points [n, 1 + Ls] and objectives [n] from x [n, 1 + Ls], each under its own law.

    In batches of one size, so that the search for a plan and its bands share a compiled program.
    """
    ends = []
    for first in range(0, len(x), _STARTS):
        some = np.resize(np.arange(first, min(first + _STARTS, len(x))), _STARTS)
        lane = problem._replace(law=_Arrays(*(leaf[some] for leaf in by_law)))
        ends.append([np.asarray(part) for part in _lanes(lane, x[some])])
    end, value = (np.concatenate(parts)[: len(x)] for parts in zip(*ends, strict=True))
    return end, value


@jax.jit
def _judge(problem: _Problem, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean loss and objective [n] at one point under every law."""
    return jax.vmap(lambda p: (_mean_loss(x, p), _objective(x, p)), (_BY_LAW,))(problem)


def _plan(
    law: MixtureLaw,
    problem: _Problem,
    trust: TrustRegion,
    N: float,
    shares: np.ndarray,
    even: np.ndarray,
    value: np.ndarray,
) -> MixturePlan:
    tokens = problem.flops / (FLOPS_PER_PARAMETER_TOKEN * N)
    loss, blank = (
        law.loss(N, tokens * shares, problem.unique),
        np.full(len(shares) - len(law.targets), np.nan),
    )
    table = pd.DataFrame(
        {
            "language": law.sources,
            "share": shares,
            "tokens": tokens * shares,
            "epochs": np.where(np.isfinite(problem.unique), tokens * shares / problem.unique, 0.0),
            "weight": np.concatenate([problem.weight, np.zeros(len(blank))]),
            "loss": np.concatenate([loss, blank]),
            "even_loss": np.concatenate([even, blank]),
        }
    )
    warnings = _plan_warnings(law, problem, trust, N, shares, value)
    means = (float(problem.weight @ loss), float(problem.weight @ even))
    return MixturePlan(N, tokens, problem.flops, table, *means, warnings)


def _plan_warnings(law, problem: _Problem, trust: TrustRegion, N: float, shares: np.ndarray, value: np.ndarray):
    found = []
    for bound, name in zip(trust.params, ("smallest", "largest"), strict=True):
        if abs(np.log(N / bound)) < 0.05:
            found.append(f"N stands at the {name} size that the runs support ({bound:.3g}): the optimum may lie beyond")
    z = law.effective_share(shares * problem.flops / (FLOPS_PER_PARAMETER_TOKEN * N), problem.unique)
    at = [t for t, has, least in zip(law.targets, z, problem.least_z, strict=True) if least > 0 and has < 1.01 * least]
    if at:
        found.append(f"held at the edge of what training covered: {', '.join(at)}")
    low = [s for s, share, floor in zip(law.sources, shares, problem.floor, strict=True) if 0 < share < 1.05 * floor]
    if low:
        found.append(f"held at the floor of their share: {', '.join(low)}")
    agree = int(np.sum(value < np.nanmin(value) + 1e-4))
    if agree < 3:
        found.append(f"only {agree} of {len(value)} starts found this plan")
    return tuple(found)
