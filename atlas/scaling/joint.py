"""The joint ATLAS fit: all target languages, the whole transfer matrix and the capacity exponent at once."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
import pandas as pd

from atlas.errors import UserError, unknown
from atlas.scaling import posterior
from atlas.scaling.arrays import bucket, padded
from atlas.scaling.estimates import Estimate, document
from atlas.scaling.posterior import LOG_ALPHA, LOG_LAMBDA, MEAN_ALPHA, MEAN_BETA, MEAN_TAU, PHI, TAU
from atlas.scaling.runs import Runs
from atlas.scaling.solver import Coordinates
from atlas.scaling.verdicts import CAPACITY, EXPONENT, note_runs, parameters_of

_PINNED = 1e10  # prior precision of a parameter that is known
_GUARDS = (0.03, 0.01, 0.003, 0.001)
_ROUNDS = 30
_LAMBDA = (np.log(0.1), 0.7)  # prior mean and standard deviation of log λ
_LEVEL = {"log E": 0.7, "a": 1.5, "b": 1.5}  # prior standard deviations of the three terms' logs
_TRANSFER = (0.1, 0.2)  # of the mean τ of a group
_FLOOR_EXPONENT = (2.0, 0.15)  # pseudo-observations and standard deviation that the spread is drawn to
_FLOOR_TRANSFER = (3.0, 0.15)


@dataclasses.dataclass(frozen=True)
class JointFit:
    """The law of every target language, their transfer matrix and how well the runs determine them.

    Attributes:
      targets, sources: Lt and Ls languages.
      theta: [Lt, 6 + Ls] (log E, a, log α, b, log β, log λ, τ by source), a and b at N0 and D0.
      phi: capacity exponent.
      covariance: [Lt, 7 + Ls, 7 + Ls] Laplace posterior of (θ_t, φ).
      N0, D0: the geometric means that a and b refer to.
      sigma, rho: standard deviation of the noise of log loss, its correlation over the rows of one run and
        target.
      run_weights: weight of every run id; near 0 means that the run went astray as a whole.
      objective: minus the log posterior at the optimum, without its constants.
      converged: whether the gradient vanishes there (Newton decrement below 1e-6) and the rounds settled.
      parameters: name -> estimate, as in `to_json`.
      warnings: what the runs cannot tell, and what was left out.
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
        target = self._target_index(target)
        D = np.asarray(D, float)
        if D.shape[-1:] != (len(self.sources),):
            raise UserError(f"D needs {len(self.sources)} tokens a row, for {', '.join(self.sources)}; got {D.shape}")
        shape = np.broadcast_shapes(np.shape(N), D.shape[:-1], np.shape(U)[:-1], target.shape)
        wide = (*shape, len(self.sources))
        flat = [np.broadcast_to(a, s).reshape(-1, *s[len(shape) :]) for a, s in ((N, shape), (D, wide), (U, wide))]
        rows = [padded(np.asarray(a, float), bucket(len(a)), 1.0) for a in flat]
        index = padded(np.broadcast_to(target, shape).reshape(-1), len(rows[0]), 0)
        with jax.enable_x64(True):
            log_loss, deviation = posterior.predict(
                self.theta,
                self.phi,
                self.covariance,
                rows[0] / self.N0,
                rows[1] / self.D0,
                rows[2] / self.D0,
                index,
                self.guard,
            )
            loss = np.exp(np.asarray(log_loss))[: len(flat[0])]
            deviation = loss * np.asarray(deviation)[: len(flat[0])]
        return loss.reshape(shape), deviation.reshape(shape)

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
) -> JointFit:
    """Fits L = E + A·K^φ/N^α + B/D_eff^β for all languages of a runs table together.

    The languages share φ (drawn to 0), the hierarchical priors of α and β, and the prior of the τ, whose
    mean and spread are estimated from the runs: one for all pairs, or one for pairs within a family and one
    across. Noise is on log loss, winsorised at 1.345σ and equally correlated within a run on one target; its
    σ and ρ have the highest Laplace marginal likelihood. Rows that evaluate a language which the run does
    not train are left out.

    Args:
      runs: two or more runs.
      relatedness_groups: family of each language; languages missing from it belong to no family.
      capacity: whether to fit φ; otherwise it is 0.
      robust: whether runs that went astray as a whole lose their weight (Tukey's bisquare on a run's mean
        residual).

    Raises:
      UserError: a family is given for an unknown language, or no row evaluates a trained language.
    """
    for name in set(relatedness_groups or {}) - set(runs.languages):
        raise unknown("language", name, runs.languages)
    notes = list(runs.warnings)
    runs = _trained_rows(runs, notes)
    Lt, Ls = len(runs.targets), len(runs.languages)
    N0, D0 = np.exp(np.mean(np.log(runs.N))), np.exp(np.mean(np.log(runs.total_tokens)))
    rows = _rows(runs, N0, D0)
    tau_groups = _tau_groups(runs, relatedness_groups)
    with jax.enable_x64(True):
        blocks, variance = posterior.start(rows, np.eye(Lt, Ls), np.exp(_LAMBDA[0]))
        prior = _prior(runs, tau_groups, capacity)
        state = posterior.State(
            Coordinates(blocks, prior.shared_mean),
            posterior.Noise(variance, np.float64(0.0), np.ones(bucket(len(runs.run_ids)))),
            prior,
        )
        state, report, cov, guard, settled = _rounds(state, rows, _spread_groups(tau_groups), robust)
        state, report, cov = jax.tree.map(np.asarray, (state, report, cov))
    converged = bool(settled and report.decrement < 1e-6)
    if not converged:
        notes.append("the fit did not settle: do not trust its parameters")
    theta, shared = state.x
    own_prior = 1.0 / state.prior.precision
    parameters = parameters_of(runs, theta, shared[PHI], cov, own_prior, (N0, D0), capacity, notes)
    weights = dict(zip(runs.run_ids, state.noise.run_weight.round(4).tolist(), strict=False))
    note_runs(weights, float(report.lowest_z), guard, notes)
    return JointFit(
        targets=runs.targets,
        sources=runs.languages,
        theta=theta,
        phi=float(shared[PHI]),
        covariance=cov,
        N0=float(N0),
        D0=float(D0),
        guard=guard,
        sigma=float(np.sqrt(state.noise.variance / posterior.HUBER_VARIANCE)),
        rho=float(state.noise.rho),
        run_weights=weights,
        objective=float(report.objective),
        converged=converged,
        n_rows=len(runs),
        n_runs=len(runs.run_ids),
        parameters=parameters,
        warnings=tuple(notes),
    )


def _trained_rows(runs: Runs, notes: list[str]) -> Runs:
    trained = runs.own(runs.D) > 0
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


def _rows(runs: Runs, N0: float, D0: float) -> posterior.Rows:
    """Rows by target, those of one run side by side, padded to a common length."""
    picks = [np.flatnonzero(runs.target == t) for t in range(len(runs.targets))]
    picks = [rows[np.argsort(runs.run[rows], kind="stable")] for rows in picks]
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
    )


def _tau_groups(runs: Runs, families: Mapping[str, str] | None) -> np.ndarray:
    """[Lt, Ls] −1 for a language on itself, 0 across families (or for all pairs), 1 within a family."""
    groups = np.zeros((len(runs.targets), len(runs.languages)), int)
    for i, target in enumerate(runs.targets):
        for j, source in enumerate(runs.languages):
            if families and target in families and families.get(source) == families[target]:
                groups[i, j] = 1
    groups[np.arange(len(runs.targets)), np.arange(len(runs.targets))] = -1
    return groups


def _spread_groups(tau_groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Membership [Lt, p, k] of log α, log β and each group of τ, and what each spread is drawn to [k, 2]."""
    kinds = tau_groups.max() + 1
    member = np.zeros((len(tau_groups), TAU + tau_groups.shape[1], 2 + kinds))
    member[:, LOG_ALPHA, 0] = member[:, posterior.LOG_BETA, 1] = 1.0
    for kind in range(kinds):
        member[:, TAU:, 2 + kind] = tau_groups == kind
    return member, np.array([_FLOOR_EXPONENT] * 2 + [_FLOOR_TRANSFER] * kinds)


def _prior(runs: Runs, tau_groups: np.ndarray, capacity: bool) -> posterior.Prior:
    Lt, Ls = tau_groups.shape
    kinds = max(tau_groups.max() + 1, 1)
    base, deviation = np.zeros((Lt, TAU + Ls)), np.full((Lt, TAU + Ls), 0.3)
    selector = np.zeros((Lt, TAU + Ls, MEAN_TAU + kinds))
    for t in range(Lt):
        losses = runs.loss[runs.target == t]
        base[t, posterior.LOG_E] = np.log(0.6 * losses.min())
        base[t, [posterior.LOG_A, posterior.LOG_B]] = np.log(0.2 * np.median(losses))
    deviation[:, [posterior.LOG_E, posterior.LOG_A, posterior.LOG_B]] = list(_LEVEL.values())
    base[:, LOG_LAMBDA], deviation[:, LOG_LAMBDA] = _LAMBDA
    selector[:, LOG_ALPHA, MEAN_ALPHA] = selector[:, posterior.LOG_BETA, MEAN_BETA] = 1.0
    for kind in range(kinds):
        selector[:, TAU:, MEAN_TAU + kind] = tau_groups == kind
    own = np.concatenate([np.zeros((Lt, TAU), bool), tau_groups < 0], 1)
    base[own] = 1.0
    mean = np.array([0.0, EXPONENT[0], EXPONENT[0]] + [_TRANSFER[0]] * kinds)
    spread = np.array([CAPACITY, EXPONENT[1], EXPONENT[1]] + [_TRANSFER[1]] * kinds)
    precision = 1.0 / spread**2
    precision[PHI] = precision[PHI] if capacity else _PINNED
    return posterior.Prior(base, selector, np.where(own, _PINNED, deviation**-2.0), mean, precision)


def _rounds(state: posterior.State, rows: posterior.Rows, spreads: tuple[np.ndarray, np.ndarray], robust: bool):
    """Refines until parameters, noise and prior stand still, the guard narrowing on the way."""
    settled, rho = False, -1.0
    for i in range(_ROUNDS):
        guard = _GUARDS[min(i, len(_GUARDS) - 1)]
        state, report, cov = posterior.refine(state, rows, *spreads, guard, robust and i >= 2)
        settled = i >= len(_GUARDS) and float(report.shift) < 0.02 and float(state.noise.rho) == rho
        if settled:
            break
        rho = float(state.noise.rho)
    return state, report, cov, guard, settled
