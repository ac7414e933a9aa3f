"""The joint ATLAS fit: all target languages, the whole transfer matrix and the capacity exponent at once."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np
import pandas as pd

from atlas.scaling.joint import rounds, system
from atlas.scaling.joint.arrow import Coordinates
from atlas.scaling.joint.fitted import JointFit, Record, rows_by_target
from atlas.scaling.joint.prior import HYPERPRIOR, Hyperprior, check_options, joint_prior
from atlas.scaling.joint.rounds import Spreads
from atlas.scaling.joint.system import Units
from atlas.scaling.joint.untrained import fit_untrained
from atlas.scaling.joint.verdicts import DISTORTED, estimates_of, exponents_astray, judge_runs, sizes_astray, unsettled
from atlas.scaling.law import GUARD
from atlas.scaling.noise import HUBER_VARIANCE
from atlas.scaling.padding import bucket
from atlas.scaling.table.runs import Runs
from checked import UserError

# Widths of the guard, one a round: a wide one has a gradient where a start leaves no effective tokens, and the last is
# that of the law.
_GUARDS = (0.03, 0.01, 0.003, GUARD)
_ROUNDS = 100  # at most; 10 to 25 are usual
_WIDE = 10.0  # spreads of the start's residuals at which rows are winsorised first, lest a bad start stand
_ROUGH, _FINE = 1.0, 0.1  # decrements that end the descents of a round, before and once the noise is estimated
_STILL = 0.02  # largest shift, in posterior standard deviations and relative in the noise, of a round that settled
# Runs are judged once winsorising has closed to so many corners and a round moves no parameter by more than so many
# posterior standard deviations: under a law that does not fit yet half of them seem astray, and come back one by one.
_HELD = 24  # rounds, at most
_CLIPPED, _NEAR = 1.02, 1.0
_SETTLED = 1e-5  # shift of a round, in posterior standard deviations, that ends the last ones
_OPTIMAL = 1e-6  # Newton decrement below which a gradient counts as zero
_LAST_SHIFT = 1e-3  # of the last round, above which the fit has not settled
_TIGHT = 0.05  # of the prior deviations of mean exponents, where free ones run off
_START_TAU = (0.0, 1.5)  # starting values are kept within: from below 0 sound runs can seem astray, and stay so


def fit_joint(
    runs: Runs,
    families: Mapping[str, str] | None = None,
    scripts: Mapping[str, str] | None = None,
    tau_prior: str = "targets",
    lambda_kind: str = "target",
    mixing: str = "sum",
    initial_tau: pd.DataFrame | None = None,
    hyperprior: Hyperprior = HYPERPRIOR,
) -> JointFit:
    """Fits L = E + A·K^φ/N^α + B/D_eff^β for all languages of a runs table together.

    The languages share φ (drawn to 0), the hierarchical priors of α, β and λ, and the prior of the τ
    (`atlas.scaling.joint.prior`), whose means and spreads are estimated from the runs. Noise is on log loss,
    winsorised at 1.345σ and equally correlated within a run on one target; its σ and ρ have the highest Laplace
    marginal likelihood. Runs that went astray as a whole lose their weight (Tukey's bisquare on a run's mean
    residual). Rows that evaluate a language which the run does not train are left out of the law, and have one of
    their own (`atlas.scaling.joint.untrained`).

    Exponents that leave what losses have, as they can where sizes and tokens hardly vary, and fits that do not settle
    are tried again with the mean exponents held near usual ones: the better fit stands, and says so.

    Args:
      runs: two or more runs.
      families: family of each language; languages missing from it belong to no family.
      scripts: script of each language, whose pairs may have another mean τ than the rest.
      tau_prior: what the weights of a pair borrow: "targets" from related pairs and from the target's other
        pairs, "pairs" from related pairs only, "flat" nothing.
      lambda_kind: whose the repetition rate λ is: one for each "target" and all that it learns from, one "shared"
        by all languages, or one for each "source", whoever learns from it, then named lambda[<-fr] (dearer: it
        couples all targets).
      mixing: how tokens of several languages make effective ones: their "sum", as ATLAS has it, or "ces", the aggregate
        of constant elasticity of substitution with an exponent η of every target, drawn to 1 (see
        `laws.effective_tokens`): where little of each of many sources tells more than much of one.
      initial_tau: transfer weights [target, source] to start from, such as those of an earlier fit, NaN where unknown;
        languages that the runs lack are ignored, and negative ones start from 0.
      hyperprior: the numbers of the prior.

    Raises:
      UserError: a label is given for an unknown language, an option is unknown, no row evaluates a trained language, or
        the tokens of a run of several languages are not given by language.
    """
    if runs.unmixed:
        raise UserError(
            f"run {runs.unmixed[0]!r} evaluates several languages, and 'tokens' does not tell the mixture, which the "
            "joint law is of: give columns tokens.<language>, or each language's run an id of its own"
        )
    check_options(runs.languages, families, scripts, tau_prior, lambda_kind, mixing)
    kinds = {"tau_prior": tau_prior, "lambda_kind": lambda_kind, "mixing": mixing}
    options = {"families": dict(families or {}), "scripts": dict(scripts or {})} | kinds
    notes = list(runs.warnings)
    used, given = telling_rows(runs, notes), runs
    runs = _trained_rows(runs, used, notes)
    units = Units(*(float(np.exp(np.mean(np.log(values)))) for values in (runs.N, runs.total_tokens)))
    rows = rows_by_target(runs, units)
    priors = functools.partial(joint_prior, runs, families, scripts, tau_prior, lambda_kind, mixing)
    prior, _ = priors(hyperprior)
    with jax.enable_x64(True):
        state = _start(runs, rows, start_tau(runs, initial_tau), prior, hyperprior.repetition)
        end, settled, spreads, hyperprior = _optimum(runs, state, rows, priors, hyperprior, mixing == "ces", notes)
    converged = bool(settled and end.report.decrement < _OPTIMAL)
    if not converged:
        notes.insert(0, unsettled(len(runs), prior.base.size, float(end.report.lowest_z), mixing))
    untrained = fit_untrained(given, runs.targets, runs.languages, units)
    record = Record(runs, used, end.state, spreads, end.precision, end.covariance, units, untrained)
    noise = end.state.noise
    estimates = estimates_of(runs, end.state, end.covariance, units, lambda_kind, hyperprior, notes)
    weights = dict(zip(runs.run_ids, noise.run_weight.round(4).tolist(), strict=False))
    judge_runs(weights, float(end.report.lowest_z), notes)
    return JointFit(
        law=system.natural_arrays(record.theta, record.direct, units, runs.targets, runs.languages),
        estimates=estimates,
        sigma=float(np.sqrt(noise.variance / HUBER_VARIANCE)),
        rho=float(noise.rho),
        run_weights=weights,
        objective=float(end.report.objective),
        converged=converged,
        n_rows=len(runs),
        n_runs=len(runs.run_ids),
        warnings=tuple(notes),
        options=options,
        record=record,
    )


def _start(runs: Runs, rows: system.Rows, tau: np.ndarray, prior: system.Prior, repetition: float) -> system.State:
    found = rounds.start(rows, tau, repetition)
    blocks, variance = map(np.asarray, found)  # each operation of JAX on an array is a program to compile
    blocks = np.pad(blocks, ((0, 0), (0, prior.base.shape[1] - blocks.shape[1])))  # η = 1
    weight = np.ones(bucket(len(runs.run_ids)))
    noise = system.Noise(variance, np.float64(0.0), weight, _WIDE * np.sqrt(variance))
    return system.State(Coordinates(blocks, prior.shared_mean), noise, prior)


def _optimum(
    runs: Runs,
    state: system.State,
    rows: system.Rows,
    priors: Callable[[Hyperprior], tuple[system.Prior, Spreads]],
    hyperprior: Hyperprior,
    ces: bool,
    notes: list[str],
) -> tuple[rounds.Round, bool, Spreads, Hyperprior]:
    """Where the rounds end, whether they settled, and under which prior; in `notes` what had to be tried besides."""

    def attempt(hyperprior: Hyperprior, judges: bool = True) -> tuple[rounds.Round, bool, Spreads]:
        prior, spreads = priors(hyperprior)
        end, settled = _rounds(state._replace(prior=prior), rows, spreads, judges)
        return jax.tree.map(np.asarray, end), bool(settled), spreads

    end, settled, spreads = attempt(hyperprior)
    far = exponents_astray(end.state, hyperprior, ces)
    if far or not settled:
        # Where sizes and tokens hardly vary, weights can all go to 1 as beta grows without end, or to 0 as eta grows.
        narrow = {name: _TIGHT * getattr(hyperprior, name) for name in ("exponent_sd", "substitution_sd")}
        tight = dataclasses.replace(hyperprior, **narrow)
        held = attempt(tight)
        if held[1] and (not settled or held[0].state.noise.variance < end.state.noise.variance):
            (end, settled, spreads), hyperprior = held, tight
            why = f"{far}, where the law fits worse" if far else "with free exponents the fit did not settle"
            notes.append(f"{why}: they are held at usual ones; vary sizes and tokens more")
    if sizes := sizes_astray(runs, end.state.noise.run_weight):
        notes.append(
            f"most runs of N = {sizes} lie off the law of the others: it does not fit, and all runs kept weight"
        )
        end, settled, spreads = attempt(hyperprior, judges=False)
    return end, settled, spreads, hyperprior


def telling_rows(runs: Runs, notes: list[str]) -> np.ndarray:
    """[n] whether a row says something of the law; in `notes` which do not.

    A loss of a language that its run does not train starts from a level of its own. One of a language of next to no
    share follows the law's guard, and shares are written to a thousandth; where most of a language's rows have no more
    they are all that there is, and kept.
    """
    own = runs.own(runs.shares)
    trained, little = own > 0, (own > 0) & (own < DISTORTED * GUARD)
    if not trained.any():
        raise UserError("no row evaluates a language that its run was trained on: a joint fit needs such rows")
    if not trained.all():
        notes.append(f"left out {int((~trained).sum())} of {len(runs)} rows: the run was not trained on their language")
    size = len(runs.targets)
    many, few = (np.bincount(runs.target[rows], minlength=size) for rows in (trained, little))
    little &= (2 * few < many)[runs.target]
    if little.any():
        notes.append(
            f"left out {int(little.sum())} of {len(runs)} rows: less than {DISTORTED * GUARD:.1%} of their run is in "
            "the language, too little for the law"
        )
    return trained & ~little


def _trained_rows(runs: Runs, trained: np.ndarray, notes: list[str]) -> Runs:
    runs = runs.where(trained)
    kept = np.unique(runs.target)
    if len(kept) == len(runs.targets):
        return runs
    rest = np.setdiff1d(np.arange(len(runs.languages)), kept)
    bare = ", ".join(runs.languages[i] for i in rest if i < len(runs.targets))
    notes.append(f"no row evaluates {bare} in a run trained on it: a source only")
    order = np.concatenate([kept, rest])
    return dataclasses.replace(
        runs,
        D=runs.D[:, order],
        U=runs.U[:, order],
        target=np.searchsorted(kept, runs.target),
        languages=tuple(runs.languages[i] for i in order),
        targets=tuple(runs.languages[i] for i in kept),
    )


def start_tau(runs: Runs, initial: pd.DataFrame | None) -> np.ndarray:
    """[Lt, Ls] 1 for a language on itself, the given weights elsewhere, NaN where none is given."""
    start = np.full((len(runs.targets), len(runs.languages)), np.nan)
    if initial is not None:
        start = initial.reindex(index=runs.targets, columns=runs.languages).to_numpy(float).clip(*_START_TAU)
    np.fill_diagonal(start, 1.0)
    return start


def _rounds(state: system.State, rows: system.Rows, spreads: Spreads, judges: bool = True) -> tuple[rounds.Round, bool]:
    """Refines until parameters, noise and prior stand still, the guard narrowing on the way; then to the optimum.

    judges: whether runs that go astray lose their weight.
    """
    judge, keep, hold, shift, seen, rho = False, False, True, np.inf, np.zeros(2), [0.0] * 4
    ahead = rounds.Ahead()
    for i in range(_ROUNDS):
        # First the law, then its noise, then which runs go astray: a verdict on a law that does not fit may stand.
        hold = i < len(_GUARDS) or (i < _HELD and hold and shift > _NEAR)
        if i < len(_GUARDS):
            guard = _GUARDS[i]
            linear = system.linearise(state, rows, guard)
        tolerance, start = _ROUGH if hold else _FINE, state.x
        found = rounds.refine(state, linear, rows, spreads, guard, judge and judges, keep, hold, tolerance)
        state, linear, report, *_ = found
        known, shift = jax.tree.map(np.asarray, state.noise), float(report.shift)
        noise = np.array([known.rho, known.clip])
        still = shift < _STILL and np.allclose(noise, seen, rtol=_STILL)
        settled = i > len(_GUARDS) and still and judge
        closed = not hold and noise[1] < _CLIPPED * float(known.corner)
        judge = judge or bool(closed and shift < _NEAR)
        if settled:
            break
        seen, rho = noise, [*rho[-4:], float(noise[0])]
        # Two places of ρ's grid can each make the other one likelier: then it lies between them.
        if (middle := _alternating(rho)) is not None:
            keep, state = True, state._replace(noise=state.noise._replace(rho=np.float64(middle)))
        if i >= len(_GUARDS) and (further := ahead(start, found)) is not None:
            state = state._replace(x=further)
            linear = system.linearise(state, rows, guard)
    end = rounds.settle(state, linear, rows, spreads, _SETTLED)
    return end, settled and float(end.report.shift) < _LAST_SHIFT


def _alternating(values: list[float]) -> float | None:
    """The mean of two values between which a list goes to and fro.

    >>> [_alternating(values) for values in ([0.0, 0.1, 0.0, 0.1, 0.0], [0.0, 0.1, 0.1, 0.1, 0.0], [0.0] * 5)]
    [0.05, None, None]
    """
    even, odd = set(values[::2]), set(values[1::2])
    return sum(even | odd) / 2 if len(even) == len(odd) == 1 and even != odd else None
