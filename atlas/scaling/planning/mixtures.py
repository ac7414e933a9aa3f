"""Which mixture to train for a budget: the least weighted loss that a joint fit predicts, inside what it
knows.

An optimiser exploits a law's errors: without bounds it starves languages whose transfer is overestimated, and
picks sizes that no run has seen. So a plan keeps to a trust region: N within a range, a floor under the share
of every language that counts, and effective tokens per token, z = D_eff / D_tot, no lower than nearly all of
training's.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from atlas.scaling.law import FLOPS_PER_PARAMETER_TOKEN, JointLaw
from atlas.scaling.single.draws import band
from atlas.scaling.table.runs import Runs
from checked import UserError, unknown

_BUDGET_FACTOR = 10  # a budget in multiples of the most expensive run's: one step beyond what was trained
_REACH = 10.0  # N at most, in multiples of the largest run's: a law of sizes is not believed further out
_SHARE_FLOOR = 0.02  # of a language that counts, which is never left to transfer alone
_STARTS = 32  # of the search; a plan that only few of them find is warned of
_DRAW_STARTS = 6  # under every drawn law, from the plan and from points around it
_SPREAD = 1.5  # standard deviation of the starts' logits: shares that differ by a factor of e^3 are usual
_STEPS, _RATE = 400, 0.1  # of Adam, whose rate falls to zero over them
_MEAN, _SQUARE = 0.9, 0.99  # its decay rates
_PENALTY = 100.0  # nats of loss per squared relative shortfall of z
_SIZES = 201  # among which the even mixture chooses its own
_AT_BOUND = 0.05  # relative distance within which a plan is said to be held by a bound
_AT_EDGE = 0.01  # the same of z
_AGREEING, _LEAST_AGREEING = 1e-4, 3  # loss within which starts agree, and how many must for a plan without a warning


class TrustRegion(NamedTuple):
    """Where a law may be believed: least and largest N, the least z [Lt] of each target, and which sources [Ls] some
    run trained (all where it is None)."""

    params: tuple[float, float]
    effective_share: np.ndarray
    trained: np.ndarray | None = None

    @classmethod
    def of_runs(cls, law: JointLaw, runs: Runs) -> "TrustRegion":
        """z that nearly all rows of a target exceed; N from the smallest run's to ten times the largest one's.

        Where all runs have one size, nothing tells how loss falls with N, and N is theirs.
        """
        D, U = runs.aligned(law.sources)
        low, high = float(runs.N.min()), float(runs.N.max())
        return cls((low, high * _REACH if low < high else high), law.supported_share(D, U), (D > 0).any(0))


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


def plan_mixture(
    law: JointLaw,
    runs: Runs,
    flops: float | None = None,
    weights: Mapping[str, float] | None = None,
    unique_tokens: Mapping[str, float] | None = None,
    draws: JointLaw | None = None,
) -> MixturePlan:
    """The best mixture by a fit of these runs, in the region that they support and with the text that they had.

    Shares and N minimise the weighted mean loss at C = 6·N·D_tot FLOPs. Shares are a softmax above their floors, 0 of
    sources that no run trained, N a sigmoid between its bounds; Adam from 32 starts at once, the best of which counts.
    Shortfalls of z are penalised, not forbidden: the plan says where one is left.

    Args:
      law, runs: a joint fit's law and the rows that it is of.
      flops: budget C; by default ten times that of the most expensive run.
      weights: importance of each target language, not negative; by default all alike.
      unique_tokens: U by language where it is another than `Runs.unique_tokens` says.
      draws: laws [n] that the runs allow, of the same languages, for the plan's band.

    Raises:
      UserError: the budget or a U is not positive, a weight is negative, a language is unknown, or the draws are of
        other languages.
    """
    if flops is None:
        flops = _BUDGET_FACTOR * FLOPS_PER_PARAMETER_TOKEN * float((runs.N * runs.total_tokens).max())
    known = {name: U for name, U in runs.unique_tokens().items() if name in law.sources}
    return optimal_mixture(
        law, flops, TrustRegion.of_runs(law, runs), weights, known | dict(unique_tokens or {}), draws
    )


def optimal_mixture(
    law: JointLaw,
    flops: float,
    trust: TrustRegion,
    weights: Mapping[str, float] | None = None,
    unique_tokens: Mapping[str, float] | None = None,
    draws: JointLaw | None = None,
) -> MixturePlan:
    """`plan_mixture` of any law in any region; a language without `unique_tokens` never repeats."""
    problem = _problem(law, flops, trust, weights, unique_tokens)
    rng = np.random.default_rng(0)
    lanes = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf)[None], _STARTS, 0), law)
    with jax.enable_x64(True):
        end, value = _descend(problem, lanes, _starts(problem, rng))
    best = end[int(np.nanargmin(value))]
    plan = _plan(problem, best, _warnings(problem, best, value))
    if plan.loss > plan.even_loss:
        beyond = "the even mixture has a lower loss, but less of some language than training covered"
        plan = replace(plan, warnings=(*plan.warnings, beyond))
    return plan if draws is None else _with_band(plan, problem, draws, best, rng)


def _problem(
    law: JointLaw,
    flops: float,
    trust: TrustRegion,
    weights: Mapping[str, float] | None,
    unique_tokens: Mapping[str, float] | None,
) -> "_Problem":
    if not (np.isfinite(flops) and flops > 0):
        raise UserError(f"the budget in FLOPs must be positive; got {flops}")
    weight = by_language(weights or dict.fromkeys(law.targets, 1.0), law.targets, 0.0, "target language")
    if weight.min() < 0 or weight.sum() <= 0:
        raise UserError("weights must not be negative, and one must be positive")
    U = by_language(unique_tokens or {}, law.sources, np.inf, "source language")
    if U.min() <= 0:
        raise UserError(f"unique tokens must be positive; {law.sources[int(U.argmin())]} has {U.min():g}")
    counted = np.pad(weight > 0, (0, len(law.sources) - len(weight)))
    floor = np.where(counted, min(_SHARE_FLOOR, 0.5 / counted.sum()), 0.0)
    least_z = np.where(weight > 0, trust.effective_share, 0.0)
    open_ = np.ones(len(law.sources), bool) if trust.trained is None else trust.trained
    return _Problem(law, law, weight / weight.sum(), U, counted, open_, floor, np.log(trust.params), least_z, flops)


def untold(names: Iterable[str]) -> UserError:
    """What is raised where nothing tells the losses of these languages."""
    return UserError(
        f"the mixture leaves {', '.join(names)} hardly an effective token, which no law tells; give it a share"
    )


def by_language(
    given: Mapping[str, float], names: tuple[str, ...], default: float | Sequence[float], kind: str
) -> np.ndarray:
    """What is given of the named languages, and else the default, as an array; another language is a UserError."""
    for name in given:
        if name not in names:
            raise unknown(kind, name, names)
    return np.array([given.get(*pair) for pair in zip(names, np.broadcast_to(default, len(names)), strict=True)], float)


def _starts(problem: "_Problem", rng: np.random.Generator) -> np.ndarray:
    """Unconstrained vectors [starts, 1 + Ls] to search from: the even mixture, and random ones."""
    logits = rng.normal(scale=_SPREAD, size=(_STARTS, len(problem.unique)))
    logits[0] = np.where(problem.counted, 0.0, -4.0)
    return np.concatenate([rng.normal(size=(_STARTS, 1)), logits], 1)


def _with_band(
    plan: MixturePlan, problem: "_Problem", draws: JointLaw, x: np.ndarray, rng: np.random.Generator
) -> MixturePlan:
    """The plan with its bands; x [1 + Ls] is its unconstrained vector."""
    if (draws.targets, draws.sources) != (problem.law.targets, problem.law.sources):
        raise UserError("the draws are of a fit with other languages than the law's")
    loss, regret, best = _replan(problem, draws, x, rng)
    sizes, shares = map(np.array, zip(*(_unpack(problem, row, np) for row in best), strict=True))
    names = ("loss_low", "loss_high", "params_low", "params_high", "regret_median", "regret_high")
    ends = (*band(loss), *band(sizes), float(np.nanmedian(regret)), band(regret)[1])
    low, high = np.array([band(column) for column in shares.T]).T
    table = plan.table.assign(share_low=low, share_high=high)
    return replace(plan, table=table, band=dict(zip(names, ends, strict=True)))


def _replan(problem: "_Problem", drawn: JointLaw, x: np.ndarray, rng: np.random.Generator):
    """Under every drawn law: mean loss [n] at x, its excess over that of the best point [n], and that [n, 1 + Ls]."""
    count = len(drawn.phi)
    start = x + rng.normal(size=(_DRAW_STARTS, len(x))) * (np.arange(_DRAW_STARTS) > 0)[:, None]
    with jax.enable_x64(True):
        lanes = jax.tree.map(lambda leaf: np.repeat(leaf, _DRAW_STARTS, 0), drawn)
        end, value = _descend(problem, lanes, np.tile(start, (count, 1)))
        value = np.where(np.isfinite(value), value, np.inf).reshape(count, _DRAW_STARTS)
        best = end.reshape(*value.shape, -1)[np.arange(count), value.argmin(1)]
        loss, least = (np.asarray(_losses(at, problem._replace(law=drawn))) for at in (np.tile(x, (count, 1)), best))
    return loss, np.maximum(loss - least, 0.0), best


class _Problem(NamedTuple):
    law: JointLaw  # that gives the loss
    known: JointLaw  # that bounds z: what training covered does not depend on the draw
    weight: jax.Array  # [Lt]
    unique: jax.Array  # [Ls]
    counted: jax.Array  # [Ls] bool: whether its loss counts
    open: jax.Array  # [Ls] bool: whether it may have a share
    floor: jax.Array  # [Ls]
    log_bounds: jax.Array  # [2]
    least_z: jax.Array  # [Lt]
    flops: float


def _unpack(problem: _Problem, x, np_=jnp):
    """N and shares [Ls] from an unconstrained vector [1 + Ls]."""
    low, high = problem.log_bounds
    N = np_.exp(low + (high - low) / (1 + np_.exp(-x[0])))
    soft = np_.where(problem.open, np_.exp(x[1:] - np_.max(x[1:], where=problem.open, initial=-np.inf)), 0.0)
    return N, problem.floor + (1 - np_.sum(problem.floor)) * soft / np_.sum(soft)


def _mean_loss(x: jax.Array, problem: _Problem) -> jax.Array:
    N, shares = _unpack(problem, x)
    loss = problem.law.loss(N, problem.flops / (FLOPS_PER_PARAMETER_TOKEN * N) * shares, problem.unique)
    return jnp.sum(jnp.where(problem.weight > 0, problem.weight * loss, 0.0))


def _objective(x: jax.Array, problem: _Problem) -> jax.Array:
    N, shares = _unpack(problem, x)
    z = problem.known.effective_share(problem.flops / (FLOPS_PER_PARAMETER_TOKEN * N) * shares, problem.unique)
    short = jnp.maximum(1 - z / jnp.where(problem.least_z > 0, problem.least_z, 1.0), 0.0)
    return _mean_loss(x, problem) + _PENALTY * jnp.sum(jnp.where(problem.least_z > 0, short, 0.0) ** 2)


def _adam(problem: _Problem, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Adam with a rate falling to zero; the end point and its objective."""
    gradient = jax.grad(_objective)

    def step(carry, i):
        x, mean, square = carry
        g = gradient(x, problem)
        mean, square = _MEAN * mean + (1 - _MEAN) * g, _SQUARE * square + (1 - _SQUARE) * g**2
        unbiased = mean / (1 - _MEAN ** (i + 1))
        scale = jnp.sqrt(square / (1 - _SQUARE ** (i + 1))) + 1e-12
        rate = _RATE * 0.5 * (1 + jnp.cos(jnp.pi * i / _STEPS))
        return (x - rate * unbiased / scale, mean, square), None

    zero = jnp.zeros_like(x)
    (x, _, _), _ = jax.lax.scan(step, (x, zero, zero), jnp.arange(_STEPS))
    return x, _objective(x, problem)


_BY_LAW = _Problem(0, *[None] * (len(_Problem._fields) - 1))
_lanes = jax.jit(jax.vmap(_adam, (_BY_LAW, 0)))
_losses = jax.jit(jax.vmap(_mean_loss, (0, _BY_LAW)))


def _descend(problem: _Problem, by_law: JointLaw, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """End points [n, 1 + Ls] and objectives [n] from x [n, 1 + Ls], each under its own law.

    In batches of one size, so that the search for a plan and its bands share a compiled program.
    """
    ends = []
    for first in range(0, len(x), _STARTS):
        some = np.resize(np.arange(first, min(first + _STARTS, len(x))), _STARTS)
        lane = problem._replace(law=jax.tree.map(lambda leaf, some=some: leaf[some], by_law))
        # Twice: steps are small for long after the steep penalties that a start meets outside the region.
        near, _ = _lanes(lane, x[some])
        ends.append([np.asarray(part) for part in _lanes(lane, near)])
    end, value = (np.concatenate(parts)[: len(x)] for parts in zip(*ends, strict=True))
    return end, value


def _plan(problem: _Problem, x: np.ndarray, warnings: tuple[str, ...]) -> MixturePlan:
    law = problem.law
    N, shares = (np.asarray(value) for value in _unpack(problem, x, np))
    tokens = problem.flops / (FLOPS_PER_PARAMETER_TOKEN * float(N))
    loss, even = law.loss(N, tokens * shares, problem.unique), _even_loss(problem)
    rest = (0, len(shares) - len(law.targets))
    table = pd.DataFrame(
        {
            "language": law.sources,
            "share": shares,
            "tokens": tokens * shares,
            "epochs": tokens * shares / problem.unique,
            "weight": np.pad(problem.weight, rest),
            "loss": np.pad(loss, rest, constant_values=np.nan),
            "even_loss": np.pad(even, rest, constant_values=np.nan),
        }
    )
    means = (float(problem.weight @ loss), float(problem.weight @ even))
    return MixturePlan(float(N), tokens, problem.flops, table, *means, warnings)


def _even_loss(problem: _Problem) -> np.ndarray:
    """Losses [Lt] of the even mixture at its own best size, or a gain over it would be partly one of allocation."""
    sizes = np.geomspace(*np.exp(problem.log_bounds), _SIZES)
    tokens = problem.flops / (FLOPS_PER_PARAMETER_TOKEN * sizes)
    shares = problem.counted / problem.counted.sum()
    even = problem.law.loss(sizes, tokens[:, None] * shares, problem.unique)
    return even[int(np.argmin(even @ problem.weight))]


def _warnings(problem: _Problem, x: np.ndarray, value: np.ndarray) -> tuple[str, ...]:
    """Where the plan at x stands at a bound, or few starts agree on it; value [starts]."""
    found, law = [], problem.law
    N, shares = _unpack(problem, x, np)
    for bound, name in zip(np.exp(problem.log_bounds), ("smallest", "largest"), strict=True):
        if abs(np.log(N / bound)) < _AT_BOUND:
            found.append(f"N stands at the {name} size that the runs support ({bound:.3g}): the optimum may lie beyond")
    tokens = problem.flops / (FLOPS_PER_PARAMETER_TOKEN * N)
    z = law.effective_share(shares * tokens, problem.unique)
    part = {t: has / least for t, has, least in zip(law.targets, z, problem.least_z, strict=True) if least > 0}
    if below := [f"{t} ({p:.0%})" for t, p in part.items() if p < 1 - _AT_EDGE]:
        found.append(
            f"below what training covered, of the least effective tokens in a token: {', '.join(below)}; no mixture "
            "that was found at this budget keeps to it"
        )
    if at := [t for t, p in part.items() if 1 - _AT_EDGE <= p < 1 + _AT_EDGE]:
        found.append(f"held at the edge of what training covered: {', '.join(at)}")
    held = (shares > 0) & (shares < (1 + _AT_BOUND) * problem.floor)
    if held.any():
        found.append(f"held at the floor of their share: {', '.join(np.asarray(law.sources)[held])}")
    agree = int(np.sum(value < np.nanmin(value) + _AGREEING))
    if agree < _LEAST_AGREEING:
        found.append(f"only {agree} of {len(value)} starts found this plan")
    return tuple(found)
