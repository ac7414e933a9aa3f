"""What the joint fit owes to its data: derivatives through the optimum, and the influence of runs.

All by the implicit function theorem with the exact derivative of the estimating equations, which is an arrow as the
fit's own Hessian is, but not symmetric: clipping a residual and sharing a run's noise do not commute. Noise, weights
of runs and variances of the priors are held as fitted.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from atlas.errors import unknown
from atlas.scaling.joint import system as posterior
from atlas.scaling.joint.fit import JointFit, order_by_target, rows_by_target
from atlas.scaling.joint.information import spread
from atlas.scaling.joint.system import Rows, State
from atlas.scaling.joint.verdicts import LAW, log_law
from atlas.scaling.solver import Bordered, products


def prediction_gradients(fit: JointFit, N, D, U, target) -> np.ndarray:
    """Derivatives [m, n] of log losses predicted at m points by the log losses of the n rows given to the fit.

    What refitting after a small change of one loss would show. Rows that the fit left out, and those beyond the
    corner of the winsorised residuals, have derivative 0. Arguments as for `JointFit.predict`.
    """
    points, _ = fit.points(N, D, U, target)
    with jax.enable_x64(True):
        return _by_row(fit, _at_points(fit, points))


def parameter_gradients(fit: JointFit, names: Sequence[str] | None = None) -> np.ndarray:
    """Derivatives [m, n] of parameters by the log losses of the n rows given to the fit, as `prediction_gradients`.

    Of the logarithms of positive parameters (E, A, alpha, B, beta, lambda of a language), of τ and φ themselves.

    Args:
      names: m keys of `fit.parameters`; by default all of them.
    """
    names = list(fit.parameters) if names is None else names
    slope, target = zip(*(_direction(fit, name) for name in names), strict=True)
    with jax.enable_x64(True):
        return _by_row(fit, (np.array(slope), np.array(target)))


def influence(fit: JointFit, N, D, U, target) -> pd.DataFrame:
    """What leaving out each run would change of the log losses predicted at m points, by one Newton step.

    Arguments as for `JointFit.predict`.

    Returns:
      A row per run id, with columns loss (or loss_0, loss_1, … of several points).
    """
    points, _ = fit.points(N, D, U, target)
    state, rows = fit.record.state, _rows(fit)
    with jax.enable_x64(True):
        slope, target = _at_points(fit, points)
        change = _without(state, rows, fit.guard, slope, target, len(state.noise.run_weight))
        change = np.asarray(change)[: len(fit.record.runs.run_ids)]
    names = ["loss"] if change.shape[1] == 1 else [f"loss_{i}" for i in range(change.shape[1])]
    return pd.DataFrame(change, pd.Index(fit.record.runs.run_ids, name="run"), names)


def _rows(fit: JointFit) -> Rows:
    return rows_by_target(fit.record.runs, fit.N0, fit.D0)


def _at_points(fit: JointFit, points) -> tuple[jax.Array, np.ndarray]:
    """Slopes [m, p+h] of log losses at points, and their targets."""
    return _slopes(fit.theta, fit.direct, points, fit.guard), points.target


def _direction(fit: JointFit, name: str) -> tuple[np.ndarray, int]:
    """Derivative [p+h] of one parameter, or of its logarithm, by (θ_t, direct), and t."""
    p, found = fit.theta.shape[1], np.zeros(fit.theta.shape[1] + len(fit.direct))
    if name not in fit.parameters:
        raise unknown("parameter", name, fit.parameters)
    key, _, label = name.rstrip("]").partition("[")
    if key == "phi":
        found[p + posterior.PHI] = 1.0
        return found, 0
    if label.startswith("<-"):
        found[p + posterior.SOURCE_LAMBDA + fit.sources.index(label.removeprefix("<-"))] = 1.0
        return found, 0
    if key == "tau":
        label, source = label.split("<-")
        found[posterior.TAU + fit.sources.index(source)] = 1.0
    t = fit.targets.index(label)
    if key != "tau":
        found[:p] = log_law(fit.theta[t], (fit.N0, fit.D0))[1][LAW.index(key)]
    return found, t


def _by_row(fit: JointFit, points: tuple) -> np.ndarray:
    """Derivatives [m, n] of what has the given slopes and targets by the log losses of the rows given."""
    by_target = np.asarray(_implicit(fit.record.state, _rows(fit), fit.guard, *points))
    runs, used = fit.record.runs, np.flatnonzero(fit.record.used)
    found = np.zeros((by_target.shape[-1], len(fit.record.used)))
    for t, rows in enumerate(order_by_target(runs)):
        found[:, used[rows]] = by_target[t, : len(rows)].T
    return found


@jax.jit
def _slopes(theta, direct, points, guard) -> jax.Array:
    return posterior.slopes(theta, direct, *points, guard)[1]


class _Equations:
    """The estimating equations JᵀΩψ(r) = prior's pull at the optimum: their pieces, in units of the noise."""

    def __init__(self, state: State, rows: Rows, guard: jax.Array):
        self.state, self.rows, self.guard = state, rows, guard
        noise = state.noise
        value, self.jacobian = posterior.linearise(state, rows, guard)
        residual = rows.log_loss - value
        self.told = posterior.winsorised(residual, noise)
        self.slope = posterior.winsorised_slope(residual, noise)
        self.group_weight, self.weight = posterior.row_weights(noise, rows)
        self.shrink = self.group_weight * posterior.shrinkage(rows.group_size, noise.rho)

    def whitened(self, values: jax.Array) -> jax.Array:
        """Ω·values [t, r, …] over the noise."""
        extra = (slice(None), slice(None)) + (None,) * (values.ndim - 2)
        sums = posterior.by_group(self.rows.weight[extra] * values, self.rows) * self.shrink[extra]
        back = jax.vmap(lambda sums, group: sums[group])(sums, self.rows.group) * self.rows.weight[extra]
        return (self.weight[extra] * values - back) / self.state.noise.scale

    def matrix(self) -> jax.Array:
        """Derivative of the equations by (θ_t, direct) [t, p+h, p+h], from the rows alone."""
        by_told = self.whitened(self.slope[..., None] * self.jacobian)
        linear = jnp.einsum("trp,trk->tpk", self.jacobian, by_told)
        pull = self.whitened(self.told)
        state, rows = self.state, self.rows
        p = state.x.own.shape[1]
        direct = posterior.direct_part(state.x, state.prior)

        def bend(inputs) -> jax.Array:
            own, pull, N, D, U = inputs

            def total(z: jax.Array) -> jax.Array:
                by_row = jax.vmap(posterior.log_loss, (None, None, 0, 0, 0, None))
                return jnp.sum(pull * by_row(z[:p], z[p:], N, D, U, self.guard))

            return jax.hessian(total)(jnp.concatenate([own, direct]))

        bent = jax.lax.map(bend, (state.x.own, pull, rows.N, rows.D, rows.U))
        return linear - bent

    def bordered(self, slope: jax.Array, target: jax.Array) -> Bordered:
        """The derivative of the equations beside m rows: the slopes [m, p+h] of what is asked."""
        state = self.state
        t, p = state.x.own.shape
        full = self.matrix()
        _, prior = posterior.system(
            state.x, jnp.zeros(full.shape[:2]), jnp.zeros_like(full), state.noise.scale, state.prior
        )
        h, q = full.shape[1] - p, len(prior.corner)
        own, shared = spread(slope, target, (t, p), q)
        right = prior.border.at[..., :h].add(full[:, :p, p:])
        left = jnp.swapaxes(prior.border, 1, 2).at[:, :h].add(full[:, p:, :p])
        corner = prior.corner.at[:h, :h].add(jnp.sum(full[:, p:, p:], 0))
        return Bordered(
            prior.blocks + full[:, :p, :p],
            right,
            jnp.concatenate([left, own], 1),
            jnp.concatenate([corner, shared], 0),
        )


@jax.jit
def _implicit(state: State, rows: Rows, guard, slope, target) -> jax.Array:
    """[t, r, m] derivatives by the rows' log losses."""
    equations = _Equations(state, rows, guard)
    p, h = state.x.own.shape[1], slope.shape[1] - state.x.own.shape[1]
    adjoint = equations.bordered(slope, target).adjoint(len(state.x.shared))
    reach = jnp.einsum("trp,tpm->trm", equations.jacobian[..., :p], adjoint.own)
    reach = reach + equations.jacobian[..., p:] @ adjoint.shared[:h]
    return equations.slope[..., None] * equations.whitened(reach)


@partial(jax.jit, static_argnames="runs")
def _without(state: State, rows: Rows, guard, slope, target, runs: int) -> jax.Array:
    """[runs, m] changes after one Newton step on the equations without each run."""
    equations = _Equations(state, rows, guard)
    p, h, q = state.x.own.shape[1], slope.shape[1] - state.x.own.shape[1], len(state.x.shared)
    matrix = equations.bordered(slope, target)
    pull = equations.whitened(equations.told)
    curved = equations.whitened(equations.slope[..., None] * equations.jacobian)
    groups = rows.group_size.shape[1]

    def changes(inputs) -> jax.Array:
        """[g, q+m, q+1] what leaving out each group of one target adds to the reduced corner."""
        blocks, right, left, jacobian, curved, pull, group = inputs

        def summed(values: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(values, group, groups, indices_are_sorted=True)

        lost = summed(jacobian[:, :, None] * curved[:, None, :])
        # At the optimum the equations without a run are what that run contributed, with the sign reversed.
        column = -summed(jacobian * pull[:, None])
        upper = jnp.concatenate([jnp.broadcast_to(right, (groups, *right.shape)), column[:, :p, None]], -1)
        lower = jnp.broadcast_to(left, (groups, *left.shape)).at[:, :h].add(-lost[:, p:, :p])
        upper = upper.at[..., :h].add(-lost[:, :p, p:])
        corner = jnp.zeros((groups, left.shape[0], q + 1)).at[:, :h, :h].add(-lost[:, p:, p:])
        corner = corner.at[:, :h, q].add(column[:, p:])
        before = jnp.pad(left @ jnp.linalg.solve(blocks, right), ((0, 0), (0, 1)))
        return corner - Bordered(blocks - lost[:, :p, :p], upper, lower, corner).eliminated() + before

    inputs = (matrix.blocks, matrix.right, matrix.left, equations.jacobian, curved, pull, rows.group)
    by_group = jax.lax.map(changes, inputs)
    by_run = (
        jnp.zeros((runs, *by_group.shape[2:]))
        .at[rows.group_run]
        .add(jnp.where(rows.group_size[..., None, None] > 0, by_group, 0.0))
    )
    reduced = jnp.pad(matrix.reduced(), ((0, 0), (0, 1))) + by_run
    return products(reduced, q)[..., 0]
