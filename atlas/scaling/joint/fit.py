"""The joint ATLAS fit: all target languages, the whole transfer matrix and the capacity exponent at once."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from atlas.errors import UserError, unknown
from atlas.scaling import law as laws
from atlas.scaling.estimates import Estimate, document
from atlas.scaling.joint import rounds as refinement
from atlas.scaling.joint import system as posterior
from atlas.scaling.joint.prior import LAMBDA, check_options, joint_prior
from atlas.scaling.joint.system import PHI, SOURCE_LAMBDA
from atlas.scaling.joint.verdicts import note_runs, parameters_of
from atlas.scaling.padding import bucket, padded
from atlas.scaling.solver import Arrow, Coordinates
from atlas.scaling.table.runs import Runs

_GUARDS = (0.03, 0.01, 0.003, 0.001)
_ROUNDS = 60
_WIDE = 10.0  # spreads of the start's residuals at which rows are winsorised first, lest a bad start stand
_ROUGH, _FINE = 1.0, 0.1  # decrements that end the descents of a round, before and once the noise is estimated
_SETTLED = 1e-5  # shift of a round, in posterior standard deviations, that ends the last ones
_START_TAU = (-0.5, 1.5)  # starting values are kept within


class Record(NamedTuple):
    """What a fit keeps of its data and its optimum, for derivatives and for the design of further runs."""

    runs: Runs  # the rows used, languages in the order of the fit
    used: np.ndarray  # [n] bool, of the rows given
    state: posterior.State
    precision: Arrow  # posterior precision of all parameters


class Points(NamedTuple):
    """Where a law is evaluated; N in N0, D and U in D0."""

    N: np.ndarray  # [m]
    D: np.ndarray  # [m, Ls]
    U: np.ndarray  # [m, Ls]
    target: np.ndarray  # [m] int


@dataclasses.dataclass(frozen=True)
class JointFit:
    """The law of every target language, their transfer matrix and how well the runs determine them.

    Attributes:
      targets, sources: Lt and Ls languages.
      theta: [Lt, 6 + Ls] (log E, a, log α, b, log β, log λ, τ by source), a and b at N0 and D0.
      phi: capacity exponent.
      covariance: [Lt, 7 + Ls, 7 + Ls] Laplace posterior of (θ_t, φ), followed by log λ of the Ls sources where
        repetition belongs to the source.
      N0, D0: the geometric means that a and b refer to.
      sigma, rho: standard deviation of the noise of log loss, its correlation over the rows of one run and
        target.
      run_weights: weight of every run id; near 0 means that the run went astray as a whole.
      objective: minus the log posterior at the optimum, without its constants.
      converged: whether the gradient vanishes there (Newton decrement below 1e-6) and the rounds settled.
      parameters: name -> estimate, as in `to_json`.
      warnings: what the runs cannot tell, and what was left out.
      source_lambda: [Ls] repetition rate of each source for every target, where it belongs to the source.
      record: what `atlas.scaling.joint.influence` and `atlas.scaling.joint.information` need of the data.
    """

    targets: tuple[str, ...]
    sources: tuple[str, ...]
    theta: np.ndarray
    phi: float
    covariance: np.ndarray
    N0: float
    D0: float
    guard: float
    sigma: float
    rho: float
    run_weights: dict[str, float]
    objective: float
    converged: bool
    n_rows: int
    n_runs: int
    parameters: dict[str, Estimate]
    warnings: tuple[str, ...]
    source_lambda: np.ndarray | None = None
    record: Record | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def direct(self) -> np.ndarray:
        """[1] φ, or [1 + Ls] φ and log λ of every source."""
        return np.append(self.phi, np.log([] if self.source_lambda is None else self.source_lambda))

    def predict(self, N, D, U, target) -> tuple[np.ndarray, np.ndarray]:
        """Loss and the standard deviation from the law's uncertainty (a run's own noise, `sigma`, is more).

        Args:
          N: [...] parameters.
          D: [..., Ls] tokens by source, in the order of `sources`.
          U: [..., Ls] unique tokens, infinite where nothing repeats.
          target: [...] names or indices of target languages.

        Returns:
          Two float64 arrays [...], in the unit of the fitted losses.
        """
        points, shape = self.points(N, D, U, target)
        size = bucket(len(points.N))
        filled = [padded(values, size, 1) for values in points[:3]] + [padded(points.target, size, 0)]
        with jax.enable_x64(True):
            found = posterior.predict(self.theta, self.direct, self.covariance, *filled, self.guard)
            log_loss, deviation = (np.asarray(values)[: len(points.N)] for values in found)
        loss = np.exp(log_loss)
        return loss.reshape(shape), (loss * deviation).reshape(shape)

    def points(self, N, D, U, target) -> tuple[Points, tuple[int, ...]]:
        """Arguments of `predict`, checked, broadcast and flattened; and their common shape.

        Raises:
          UserError: an unknown target, or tokens for another number of languages than the fit's sources.
        """
        target, D = self._target_index(target), np.asarray(D, float)
        if D.shape[-1:] != (len(self.sources),):
            raise UserError(f"D needs {len(self.sources)} tokens a row, for {', '.join(self.sources)}; got {D.shape}")
        shape = np.broadcast_shapes(np.shape(N), D.shape[:-1], np.shape(U)[:-1], target.shape)
        wide = (*shape, len(self.sources))
        N = np.broadcast_to(np.asarray(N, float), shape).reshape(-1) / self.N0
        D, U = (np.broadcast_to(np.asarray(a, float), wide).reshape(-1, wide[-1]) / self.D0 for a in (D, U))
        return Points(N, D, U, np.broadcast_to(target, shape).reshape(-1)), shape

    def predict_runs(self, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
        """`predict` for every row of a table, matching languages by name.

        Raises:
          UserError: the table trains or evaluates a language that the fit does not know.
        """
        for name in set(runs.languages) - set(self.sources):
            raise unknown("source language", name, self.sources)
        order = [runs.languages.index(name) if name in runs.languages else None for name in self.sources]
        D = np.stack([np.zeros(len(runs)) if i is None else runs.D[:, i] for i in order], 1)
        U = np.stack([np.full(len(runs), np.inf) if i is None else runs.U[:, i] for i in order], 1)
        return self.predict(runs.N, D, U, np.asarray(runs.languages)[runs.target])

    def transfer_matrix(self, field: str = "value") -> pd.DataFrame:
        """τ as a table, rows targets, columns sources; 1 on the diagonal.

        Args:
          field: "value", "se", "low", "high" (90 % interval) or "identified".
        """
        if field not in Estimate.__annotations__:
            raise unknown("field", field, Estimate.__annotations__)
        known = Estimate(1.0, 0.0, 1.0, 1.0, True)
        cells = [
            [getattr(self.parameters.get(f"tau[{t}<-{s}]", known), field) for s in self.sources] for t in self.targets
        ]
        return pd.DataFrame(cells, pd.Index(self.targets, name="target"), pd.Index(self.sources, name="source"))

    def to_json(self, holdout: Mapping | None = None) -> dict:
        """The fit as plain values, ready for json.dumps."""
        extra = {"sigma": self.sigma, "rho": self.rho, "run_weights": self.run_weights}
        return document("atlas", self, holdout) | extra

    def _target_index(self, target) -> np.ndarray:
        target = np.asarray(target)
        if target.dtype.kind not in "OUS":
            return target.astype(int)
        for name in np.unique(target.astype(str)):
            if name not in self.targets:
                raise unknown("target language", str(name), self.targets)
        return pd.Index(self.targets).get_indexer(target.astype(str).ravel()).reshape(target.shape)


def fit_joint(
    runs: Runs,
    relatedness_groups: Mapping[str, str] | None = None,
    capacity: bool = True,
    robust: bool = True,
    scripts: Mapping[str, str] | None = None,
    tau_prior: str = "targets",
    lambda_kind: str = "target",
    initial_tau: pd.DataFrame | None = None,
) -> JointFit:
    """Fits L = E + A·K^φ/N^α + B/D_eff^β for all languages of a runs table together.

    The languages share φ (drawn to 0), the hierarchical priors of α, β and λ, and the prior of the τ
    (`atlas.scaling.joint.prior`), whose means and spreads are estimated from the runs. Noise is on log loss,
    winsorised at 1.345σ and equally correlated within a run on one target; its σ and ρ have the highest Laplace
    marginal likelihood. Rows that evaluate a language which the run does not train are left out.

    Args:
      runs: two or more runs.
      relatedness_groups: family of each language; languages missing from it belong to no family.
      capacity: whether to fit φ; otherwise it is 0.
      robust: whether runs that went astray as a whole lose their weight (Tukey's bisquare on a run's mean
        residual).
      scripts: script of each language, whose pairs may have another mean τ than the rest.
      tau_prior: what the weights of a pair borrow: "targets" from related pairs and from the target's other
        pairs, "pairs" from related pairs only, "flat" nothing.
      lambda_kind: whose the repetition rate λ is: one for each "target" and all that it learns from, one "shared"
        by all languages, or one for each "source", whoever learns from it, then named lambda[<-fr] (dearer: it
        couples all targets).
      initial_tau: transfer weights [target, source] to start from, NaN where unknown, such as
        `tau_from_score(score_matrix(scores))`; languages that the runs lack are ignored. They shorten the way;
        the optimum is the same.

    Raises:
      UserError: a label is given for an unknown language, an option is unknown, or no row evaluates a trained
        language.
    """
    check_options(runs.languages, relatedness_groups, scripts, tau_prior, lambda_kind)
    notes = list(runs.warnings)
    used = runs.own(runs.D) > 0
    runs = _trained_rows(runs, used, notes)
    N0, D0 = np.exp(np.mean(np.log(runs.N))), np.exp(np.mean(np.log(runs.total_tokens)))
    rows = rows_by_target(runs, N0, D0)
    prior, spreads = joint_prior(runs, relatedness_groups, scripts, tau_prior, lambda_kind, capacity)
    with jax.enable_x64(True):
        blocks, variance = refinement.start(rows, start_tau(runs, initial_tau), np.exp(LAMBDA[0]))
        weight = np.ones(bucket(len(runs.run_ids)))
        noise = posterior.Noise(variance, np.float64(0.0), weight, _WIDE * np.sqrt(variance))
        state = posterior.State(Coordinates(blocks, prior.shared_mean), noise, prior)
        found = jax.tree.map(np.asarray, _rounds(state, rows, spreads, robust))
    return _described(runs, used, found, (N0, D0), capacity, lambda_kind, notes)


def _described(
    runs: Runs,
    used: np.ndarray,
    found: tuple,
    units: tuple[float, float],
    capacity: bool,
    lambda_kind: str,
    notes: list[str],
) -> JointFit:
    """What `_rounds` found, in natural units and with its verdicts."""
    (state, _, report, cov, precision), guard, settled = found
    converged = bool(settled and report.decrement < 1e-6)
    if not converged:
        notes.append("the fit did not settle: do not trust its parameters")
    parameters = parameters_of(runs, state, cov, units, capacity, lambda_kind, notes)
    weights = dict(zip(runs.run_ids, state.noise.run_weight.round(4).tolist(), strict=False))
    note_runs(weights, float(report.lowest_z), float(guard), notes)
    direct = posterior.direct_part(state.x, state.prior)
    return JointFit(
        targets=runs.targets,
        sources=runs.languages,
        theta=state.x.own,
        phi=float(direct[PHI]),
        covariance=cov,
        N0=float(units[0]),
        D0=float(units[1]),
        guard=float(guard),
        sigma=float(np.sqrt(state.noise.variance / posterior.HUBER_VARIANCE)),
        rho=float(state.noise.rho),
        run_weights=weights,
        objective=float(report.objective),
        converged=converged,
        n_rows=len(runs),
        n_runs=len(runs.run_ids),
        parameters=parameters,
        warnings=tuple(notes),
        source_lambda=np.exp(direct[SOURCE_LAMBDA:]) if lambda_kind == "source" else None,
        record=Record(runs, used, state, precision),
    )


def _trained_rows(runs: Runs, trained: np.ndarray, notes: list[str]) -> Runs:
    if not trained.any():
        raise UserError("no row evaluates a language that its run was trained on: a joint fit needs such rows")
    if not trained.all():
        notes.append(f"left out {int((~trained).sum())} of {len(runs)} rows: the run was not trained on their language")
        runs = runs.where(trained)
    kept = np.unique(runs.target)
    if len(kept) == len(runs.targets):
        return runs
    rest = np.setdiff1d(np.arange(len(runs.languages)), kept)
    bare = ", ".join(runs.languages[i] for i in rest if i < runs.num_targets)
    notes.append(f"no row evaluates {bare} in a run trained on it: a source only")
    order = np.concatenate([kept, rest])
    return dataclasses.replace(
        runs,
        D=runs.D[:, order],
        U=runs.U[:, order],
        target=np.searchsorted(kept, runs.target),
        languages=tuple(runs.languages[i] for i in order),
        num_targets=len(kept),
    )


def rows_by_target(runs: Runs, N0: float, D0: float) -> posterior.Rows:
    """Rows by target in `order_by_target`, padded to a common length."""
    picks = order_by_target(runs)
    length = bucket(max(map(len, picks)), 512)
    members = [np.unique(runs.run[rows], return_inverse=True, return_counts=True) for rows in picks]
    groups = bucket(max(len(ids) for ids, _, _ in members), 64)

    def stack(values: np.ndarray, fill: float) -> np.ndarray:
        return np.stack([padded(values[rows], length, fill) for rows in picks])

    return posterior.Rows(
        log_loss=stack(np.log(runs.loss), 0.0),
        N=stack(runs.N / N0, 1.0),
        D=stack(runs.D / D0, 1.0),
        U=stack(runs.U / D0, np.inf),
        weight=stack(np.ones(len(runs)), 0.0),
        group=np.stack([padded(index, length, groups - 1) for _, index, _ in members]),
        group_size=np.stack([padded(count.astype(float), groups, 0.0) for _, _, count in members]),
        group_run=np.stack([padded(ids, groups, 0) for ids, _, _ in members]),
        languages=stack(np.asarray(laws.num_languages(runs.D)), 1.0),
    )


def order_by_target(runs: Runs) -> list[np.ndarray]:
    """Indices of every target's rows, those of one run side by side."""
    picks = [np.flatnonzero(runs.target == t) for t in range(len(runs.targets))]
    return [rows[np.argsort(runs.run[rows], kind="stable")] for rows in picks]


def start_tau(runs: Runs, initial: pd.DataFrame | None) -> np.ndarray:
    """[Lt, Ls] 1 for a language on itself, the given weights elsewhere, NaN where none is given."""
    start = np.full((len(runs.targets), len(runs.languages)), np.nan)
    if initial is not None:
        start = initial.reindex(index=runs.targets, columns=runs.languages).to_numpy(float).clip(*_START_TAU)
    np.fill_diagonal(start, 1.0)
    return start


def _rounds(state: posterior.State, rows: posterior.Rows, spreads: refinement.Spreads, robust: bool):
    """Refines until parameters, noise and prior stand still, the guard narrowing on the way; then to the optimum."""
    settled, judge, keep, seen, rho = False, False, False, np.zeros(2), [0.0] * 4
    for i in range(_ROUNDS):
        # First the law, then its noise, then which runs go astray: a verdict on a law that does not fit may stand.
        hold = i < len(_GUARDS)
        if hold:
            guard = _GUARDS[i]
            linear = posterior.linearise(state, rows, guard)
        tolerance = _ROUGH if hold else _FINE
        state, linear, report, *_ = refinement.refine(state, linear, rows, spreads, guard, judge, keep, hold, tolerance)
        noise = np.array([state.noise.rho, state.noise.clip])
        settled = i > len(_GUARDS) and float(report.shift) < 0.02 and np.allclose(noise, seen, rtol=0.02)
        settled = settled and (judge or not robust)
        judge = judge or bool(robust and i >= len(_GUARDS) and noise[1] < 1.02 * float(state.noise.corner))
        if settled:
            break
        seen, rho = noise, [*rho[-4:], float(noise[0])]
        # Two places of ρ's grid can each make the other one likelier: then it lies between them.
        if (middle := _alternating(rho)) is not None:
            keep, state = True, state._replace(noise=state.noise._replace(rho=jnp.float64(middle)))
    end = refinement.settle(state, linear, rows, spreads, guard, _SETTLED)
    return end, guard, settled and float(end.report.shift) < 1e-3


def _alternating(values: list[float]) -> float | None:
    """The mean of two values between which a list goes to and fro.

    >>> [_alternating(values) for values in ([0.0, 0.1, 0.0, 0.1, 0.0], [0.0, 0.1, 0.1, 0.1, 0.0], [0.0] * 5)]
    [0.05, None, None]
    """
    even, odd = set(values[::2]), set(values[1::2])
    return sum(even | odd) / 2 if len(even) == len(odd) == 1 and even != odd else None
