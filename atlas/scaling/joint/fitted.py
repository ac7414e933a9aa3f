"""A joint fit: the law of all languages, what the runs tell of it, and what it says of others."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd

from atlas.scaling.estimates import Z90, Estimate, document
from atlas.scaling.joint import system
from atlas.scaling.joint.arrow import Arrow
from atlas.scaling.joint.misfit import misfit
from atlas.scaling.joint.rounds import Spreads
from atlas.scaling.joint.system import Units
from atlas.scaling.joint.untrained import Untrained
from atlas.scaling.joint.verdicts import Estimates
from atlas.scaling.law import JointLaw, num_languages
from atlas.scaling.padding import bucket, padded
from atlas.scaling.table.runs import Runs
from checked import UserError, unknown

SUPPORTED = 0.1  # of the effective share that nearly all rows exceed: with less, the law only continues its own form


class Record(NamedTuple):
    """What a fit keeps of its data and its optimum, for derivatives, draws and the design of further runs."""

    runs: Runs  # the rows used, languages in the order of the fit
    used: np.ndarray  # [n] bool, of the rows given
    state: system.State
    spreads: Spreads
    precision: Arrow  # posterior precision of all parameters
    covariance: np.ndarray  # [Lt, p+h, p+h] of every target's block and of the direct shared parameters
    units: Units
    untrained: Untrained

    @property
    def theta(self) -> jax.Array:
        """[Lt, 6 + Ls] blocks."""
        return self.state.x.own

    @property
    def direct(self) -> jax.Array:
        """[1] φ, or [1 + Ls] φ and log λ of every source."""
        return system.direct_part(self.state.x, self.state.prior)

    @property
    def rows(self) -> system.Rows:
        """The rows as the system takes them."""
        return rows_by_target(self.runs, self.units)


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
      law: the most likely one.
      estimates: JointLaws of value, se, low, high (90 % interval) and identified; the value of a τ that the design
        hides is a guess, not the law's.
      sigma, rho: standard deviation of the noise of log loss, its correlation over the rows of one run and
        target.
      run_weights: weight of every run id; near 0 means that the run went astray as a whole.
      objective: minus the log posterior at the optimum, without its constants.
      converged: whether the gradient vanishes there and the rounds settled.
      warnings: what the runs cannot tell, and what was left out.
      options: of `fit_joint`, by which the same runs give the same fit.
      record: data and optimum, for `atlas.scaling.joint`.
    """

    law: JointLaw
    estimates: Estimates
    sigma: float
    rho: float
    run_weights: dict[str, float]
    objective: float
    converged: bool
    n_rows: int
    n_runs: int
    warnings: tuple[str, ...]
    options: Mapping[str, Any]
    record: Record = dataclasses.field(repr=False, compare=False)

    @property
    def targets(self) -> tuple[str, ...]:
        """Lt languages."""
        return self.law.targets

    @property
    def sources(self) -> tuple[str, ...]:
        """Ls languages, of which the targets are the first."""
        return self.law.sources

    @functools.cached_property
    def misfit(self) -> float:
        """By how much, in log loss, the law misses runs unlike the others; see `atlas.scaling.joint.misfit`."""
        return misfit(self.record.rows, self.record.state, self.record.spreads)

    @property
    def run_noise(self) -> float:
        """Standard deviation, in log loss, of a new run around the law: of its noise and of the law's misfit."""
        return float(np.hypot(self.sigma, self.misfit))

    @functools.cached_property
    def parameters(self) -> dict[str, Estimate]:
        """Estimates by name, as `JointLaw.named` has them."""
        value, se, low, high, told = (law.named() for law in self.estimates.values())
        return {n: Estimate(*(float(c[n]) for c in (value, se, low, high)), identified=bool(told[n])) for n in told}

    def predict(self, N, D, U, target) -> tuple[np.ndarray, np.ndarray]:
        """Loss and the standard deviation from the law's uncertainty, without a new run's, `run_noise`.

        Of a language that a mixture lacks, what such rows of the table tell (`atlas.scaling.joint.untrained`). Where
        they tell nothing, or a mixture leaves fewer effective tokens than a tenth of what the runs had at least, no law
        has a say: the loss is that of the tenth, and its deviation infinite.

        Args:
          N: [...] parameters.
          D: [..., Ls] tokens by source, in the order of `sources`.
          U: [..., Ls] unique tokens, infinite where nothing repeats.
          target: [...] names or indices of target languages.

        Returns:
          Two float64 arrays [...], in the unit of the fitted losses.
        """
        points, shape = self.points(N, D, U, target)
        size, of_law = bucket(len(points.N)), (self.record.theta, self.record.direct, self.record.covariance)
        filled = Points(*(padded(values, size, fill) for values, fill in zip(points, (1, 1, 1, 0), strict=True)))
        with jax.enable_x64(True):
            found = *system.predict(*of_law, *filled), *self._unsupported(filled)
        log_loss, deviation, beyond, bound = (np.asarray(values)[: len(points.N)] for values in found)
        loss = np.exp(log_loss)
        beyond |= points.D[range(len(loss)), points.target] == 0  # unless a regression tells, below
        loss, deviation = np.where(beyond, bound, loss), np.where(beyond, np.inf, loss * deviation)
        if (lacking := self.record.untrained.applies(points.D, points.target)).any():
            of_rows, spread = self.record.untrained.predict(*(p[lacking] for p in (points.N, points.D, points.target)))
            loss[lacking], deviation[lacking] = np.exp(of_rows), np.exp(of_rows) * spread
        return loss.reshape(shape), deviation.reshape(shape)

    def run_interval(self, N, D, U, target) -> tuple[np.ndarray, np.ndarray]:
        """Bounds [...] of the 90 % interval of a new run's loss: of the law, with a row's noise and the law's misfit.

        Arguments as for `predict`.
        """
        loss, deviation = self.predict(N, D, U, target)
        (points, shape), known = self.points(N, D, U, target), self.record.untrained
        noise = np.where(known.applies(points.D, points.target), known.noise[points.target], self.run_noise)
        reach = np.exp(Z90 * np.hypot(deviation / loss, noise.reshape(shape)))
        return loss / reach, loss * reach

    @functools.cached_property
    def _supported(self) -> np.ndarray:
        return self.law.supported_share(self.record.runs.D, self.record.runs.U)

    def _unsupported(self, points: Points) -> tuple[np.ndarray, np.ndarray]:
        """[m] whether points have too few effective tokens to be predicted; the loss that just enough would give."""
        law, units, target = self.law, self.record.units, points.target
        D, U = points.D * units.D, points.U * units.D
        least = SUPPORTED * self._supported[target]
        E, A, alpha, B, beta = (getattr(law, name)[target] for name in ("E", "A", "alpha", "B", "beta"))
        A = A * _num_languages(D) ** law.phi
        bound = E + A * (points.N * units.N) ** -alpha + B * (least * D.sum(1)) ** -beta
        return law.effective_share(D, U, target) < least, bound

    def points(self, N, D, U, target) -> tuple[Points, tuple[int, ...]]:
        """Arguments of `predict`, checked, broadcast and flattened; and their common shape.

        Raises:
          UserError: an unknown target, or tokens for another number of languages than the fit's sources.
        """
        target, D = self._target_index(target), np.asarray(D, float)
        if D.shape[-1:] != (len(self.sources),):
            raise UserError(f"D needs {len(self.sources)} tokens a row, for {', '.join(self.sources)}; got {D.shape}")
        shape = np.broadcast_shapes(np.shape(N), D.shape[:-1], np.shape(U)[:-1], target.shape)
        wide, units = (*shape, len(self.sources)), self.record.units
        N = np.broadcast_to(np.asarray(N, float), shape).reshape(-1) / units.N
        D, U = (np.broadcast_to(np.asarray(a, float), wide).reshape(-1, wide[-1]) / units.D for a in (D, U))
        return Points(N, D, U, np.broadcast_to(target, shape).reshape(-1)), shape

    def predict_runs(self, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
        """`predict` for every row of a table, matching languages by name.

        Raises:
          UserError: the table trains or evaluates a language that the fit does not know.
        """
        for name in set(runs.languages) - set(self.sources):
            raise unknown("source language", name, self.sources)
        D, U = runs.aligned(self.sources)
        return self.predict(runs.N, D, U, np.asarray(runs.languages)[runs.target])

    def transfer_matrix(self, field: str = "value") -> pd.DataFrame:
        """τ as a table, rows targets, columns sources; 1 on the diagonal.

        Args:
          field: "value", "se", "low", "high" (90 % interval) or "identified".
        """
        if field not in self.estimates:
            raise unknown("field", field, self.estimates)
        cells, index = self.estimates[field].tau, pd.Index(self.targets, name="target")
        return pd.DataFrame(cells, index, pd.Index(self.sources, name="source"))

    def to_json(self, holdout: Mapping | None = None) -> dict:
        """The fit as plain values, ready for json.dumps; "joint_law" is what `JointLaw.from_json` reads."""
        extra = {"sigma": self.sigma, "rho": self.rho, "misfit": self.misfit, "run_weights": self.run_weights}
        extra["options"] = dict(self.options)
        return document("atlas", self, holdout) | extra | {"joint_law": self.law.to_json()}

    def _target_index(self, target) -> np.ndarray:
        target = np.asarray(target)
        if target.dtype.kind not in "OUS":
            return target.astype(int)
        for name in np.unique(target.astype(str)):
            if name not in self.targets:
                raise unknown("target language", str(name), self.targets)
        return pd.Index(self.targets).get_indexer(target.astype(str).ravel()).reshape(target.shape)


def rows_by_target(runs: Runs, units: Units) -> system.Rows:
    """Rows by target in `order_by_target`, padded to a common length."""
    picks = order_by_target(runs)
    length = bucket(max(map(len, picks)), 512)
    members = [np.unique(runs.run[rows], return_inverse=True, return_counts=True) for rows in picks]
    groups = bucket(max(len(ids) for ids, _, _ in members), 64)

    def stack(values: np.ndarray, fill: float) -> np.ndarray:
        return np.stack([padded(values[rows], length, fill) for rows in picks])

    return system.Rows(
        log_loss=stack(np.log(runs.loss), 0.0),
        N=stack(runs.N / units.N, 1.0),
        D=stack(runs.D / units.D, 1.0),
        U=stack(runs.U / units.D, np.inf),
        weight=stack(np.ones(len(runs)), 0.0),
        group=np.stack([padded(index, length, groups - 1) for _, index, _ in members]),
        group_size=np.stack([padded(count.astype(float), groups, 0.0) for _, _, count in members]),
        group_run=np.stack([padded(ids, groups, 0) for ids, _, _ in members]),
        languages=stack(_num_languages(runs.D), 1.0),
    )


def _num_languages(D: np.ndarray) -> np.ndarray:
    with jax.enable_x64(True):  # also where a caller has not
        return np.asarray(num_languages(D))


def order_by_target(runs: Runs) -> list[np.ndarray]:
    """Indices of every target's rows, those of one run side by side."""
    picks = [np.flatnonzero(runs.target == t) for t in range(len(runs.targets))]
    return [rows[np.argsort(runs.run[rows], kind="stable")] for rows in picks]
