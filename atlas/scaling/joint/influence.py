"""What the joint fit owes to its data: derivatives through the optimum, and the influence of runs.

All by the implicit function theorem with the exact derivative of the estimating equations, which is an arrow as the
fit's own Hessian is, but not symmetric: clipping a residual and sharing a run's noise do not commute. Noise, weights
of runs and variances of the priors are held as fitted.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from atlas.scaling.joint import rounds, system
from atlas.scaling.joint.arrow import Bordered, Coordinates, products
from atlas.scaling.joint.fit import start_tau
from atlas.scaling.joint.fitted import JointFit, order_by_target
from atlas.scaling.joint.information import spread
from atlas.scaling.joint.prior import HYPERPRIOR
from atlas.scaling.joint.system import Rows, State
from atlas.scaling.law import GUARD
from atlas.scaling.noise import by_group, shrinkage, sums, whitened, winsorised, winsorised_slope
from atlas.scaling.padding import bucket, padded

_BATCH = 64  # gradients are asked for in multiples of it, so that most calls share a compiled program
_MODE = 1e-9  # Newton decrement that ends a timed descent
_EXACT = 1e-11  # shift in posterior standard deviations that ends a refit


def prediction_gradients(fit: JointFit, N, D, U, target) -> np.ndarray:
    """Derivatives [m, n] of log losses predicted at m points by the log losses of the n rows given to the fit.

    What refitting after a small change of one loss would show. Rows that the fit left out, and those beyond the
    corner of the winsorised residuals, have derivative 0. Arguments as for `JointFit.predict`.
    """
    points, _ = fit.points(N, D, U, target)
    with jax.enable_x64(True):
        return _by_row(fit, _slopes(fit, points), points.target)


def influence(fit: JointFit, N, D, U, target) -> pd.DataFrame:
    """What leaving out each run would change of the log losses predicted at m points, by one Newton step.

    Arguments as for `JointFit.predict`.

    Returns:
      A row per run id, with columns loss (or loss_0, loss_1, … of several points).
    """
    points, _ = fit.points(N, D, U, target)
    state, ids = fit.record.state, fit.record.runs.run_ids
    with jax.enable_x64(True):
        change = _without(state, fit.record.rows, _slopes(fit, points), points.target, len(state.noise.run_weight))
        change = np.asarray(change)[: len(ids)]
    names = ["loss"] if change.shape[1] == 1 else [f"loss_{i}" for i in range(change.shape[1])]
    return pd.DataFrame(change, pd.Index(ids, name="run"), names)


def refit(
    fit: JointFit, log_shift: np.ndarray | float = 0.0, run_weight: np.ndarray | None = None, settled: float = _EXACT
) -> JointFit:
    """The fit again with its noise and priors held, what the derivatives here are exact for.

    Its estimates and verdicts stay those of `fit`.

    Args:
      log_shift: [n] added to the log losses of the rows used.
      run_weight: [runs, or more] weights of the runs; by default the fit's own.
      settled: shift of a round, in posterior standard deviations, that ends the descent.
    """
    record, state = fit.record, fit.record.state
    if run_weight is not None:
        state = state._replace(noise=state.noise._replace(run_weight=run_weight))
    runs = dataclasses.replace(record.runs, loss=record.runs.loss * np.exp(log_shift))
    rows = record._replace(runs=runs).rows
    with jax.enable_x64(True):
        end = rounds.settle(state, system.linearise(state, rows), rows, record.spreads, settled)
        end = jax.tree.map(np.asarray, end)
    moved = record._replace(state=end.state, precision=end.precision, covariance=end.covariance, runs=runs)
    law = system.natural_arrays(moved.theta, moved.direct, record.units, fit.targets, fit.sources)
    return dataclasses.replace(fit, law=law, objective=float(end.report.objective), record=moved)


def descend(fit: JointFit) -> None:
    """One descent from the start that a fit has, with noise, priors and pseudo-observations held: to be timed."""
    state, rows = fit.record.state, fit.record.rows
    with jax.enable_x64(True):
        blocks, _ = rounds.start(rows, start_tau(fit.record.runs, None), HYPERPRIOR.repetition)
        blocks = jnp.pad(blocks, ((0, 0), (0, state.x.own.shape[1] - blocks.shape[1])))
        state = state._replace(x=Coordinates(blocks, state.prior.shared_mean))
        linear = system.linearise(state, rows)
        jax.block_until_ready(rounds.refine(state, linear, rows, fit.record.spreads, GUARD, False, True, True, _MODE))


def objective(fit: JointFit) -> tuple[Callable[[jax.Array], jax.Array], np.ndarray, np.ndarray]:
    """What the fit minimised with its noise, priors and pseudo-observations held, for another optimiser to try.

    Returns:
      Minus the log posterior as a function of all parameters [n], blocks first; where the fit ended [n]; and the
      posterior precision there [n, n]. To be called under `jax.enable_x64`.
    """
    state, rows = fit.record.state, fit.record.rows
    noise, groups = state.noise, system.groups_of(rows, state.noise)
    with jax.enable_x64(True):
        predicted = system.linearise(state, rows).log_loss
        observed = predicted + winsorised(rows.log_loss - predicted, noise.clip)

    def value(flat: jax.Array) -> jax.Array:
        x = Coordinates(flat[: state.x.own.size].reshape(state.x.own.shape), flat[state.x.own.size :])
        residual = observed - system.linearise(state._replace(x=x), rows).log_loss
        found = sums(residual, jnp.zeros((*residual.shape, 1)), groups)
        square, *_ = whitened(found, groups, noise.rho)
        return 0.5 * jnp.sum(square) / noise.scale + system.penalty(x, state.prior)

    end = np.concatenate([np.ravel(state.x.own), state.x.shared])
    return value, end, fit.record.precision.dense()


def _slopes(fit: JointFit, points) -> jax.Array:
    """Slopes [m, p+h] of log losses at points by the block of their target and the direct shared parameters."""
    return system.slopes(fit.record.theta, fit.record.direct, *points)[1]


def _by_row(fit: JointFit, slope, target: np.ndarray) -> np.ndarray:
    """Derivatives [m, n] of what has the given slopes [m, p+h] and targets by the log losses of the rows given."""
    size = bucket(len(target), _BATCH)
    slope, padding = padded(np.asarray(slope), size, 0.0), padded(np.asarray(target), size, 0)
    by_target = np.asarray(_implicit(fit.record.state, fit.record.rows, slope, padding))[..., : len(target)]
    runs, used = fit.record.runs, np.flatnonzero(fit.record.used)
    found = np.zeros((by_target.shape[-1], len(fit.record.used)))
    for t, rows in enumerate(order_by_target(runs)):
        found[:, used[rows]] = by_target[t, : len(rows)].T
    return found


class _Equations:
    """The estimating equations JᵀΩψ(r) = prior's pull at the optimum: their pieces, in units of the noise."""

    def __init__(self, state: State, rows: Rows):
        self.state, self.rows = state, rows
        noise = state.noise
        value, self.jacobian = system.linearise(state, rows)
        residual = rows.log_loss - value
        self.told = winsorised(residual, noise.clip)
        self.slope = winsorised_slope(residual, noise.clip)
        self.groups = system.groups_of(rows, noise)
        self.shrink = self.groups.trust * shrinkage(rows.group_size, noise.rho)

    def whitened(self, values: jax.Array) -> jax.Array:
        """Ω·values [t, r, …] over the noise."""
        extra = (slice(None), slice(None)) + (None,) * (values.ndim - 2)
        shared = by_group(self.rows.weight[extra] * values, self.groups) * self.shrink[extra]
        back = jax.vmap(lambda shared, group: shared[group])(shared, self.rows.group) * self.rows.weight[extra]
        return (self.groups.row_weight[extra] * values - back) / self.state.noise.scale

    def matrix(self) -> jax.Array:
        """Derivative of the equations by (θ_t, direct) [t, p+h, p+h], from the rows alone."""
        by_told = self.whitened(self.slope[..., None] * self.jacobian)
        linear = jnp.einsum("trp,trk->tpk", self.jacobian, by_told)
        pull = self.whitened(self.told)
        state, rows = self.state, self.rows
        direct = system.direct_part(state.x, state.prior)
        bent = jax.lax.map(partial(_bend, direct), (state.x.own, pull, rows.N, rows.D, rows.U))
        return linear - bent

    def bordered(self, slope: jax.Array, target: jax.Array) -> Bordered:
        """The derivative of the equations beside m rows: the slopes [m, p+h] of what is asked."""
        state = self.state
        t, p = state.x.own.shape
        full = self.matrix()
        _, prior = system.system(
            state.x, jnp.zeros(full.shape[:2]), jnp.zeros_like(full), state.noise.scale, state.prior
        )
        h, q = full.shape[1] - p, len(prior.corner)
        own, shared = spread(slope, target, (t, p), q)
        right = prior.border.at[..., :h].add(full[:, :p, p:])
        left = jnp.swapaxes(prior.border, 1, 2).at[:, :h].add(full[:, p:, :p])
        corner = prior.corner.at[:h, :h].add(jnp.sum(full[:, p:, p:], 0))
        return Bordered(
            prior.blocks + full[:, :p, :p], right, jnp.concatenate([left, own], 1), jnp.concatenate([corner, shared], 0)
        )


def _bend(direct: jax.Array, inputs: tuple) -> jax.Array:
    """[p+h, p+h] second derivative of what pulls rows [r] of one target: its block, their pull, N, D and U."""
    own, pull, N, D, U = inputs
    p = len(own)

    def total(z: jax.Array) -> jax.Array:
        by_row = jax.vmap(system.log_loss, (None, None, 0, 0, 0))
        return jnp.sum(pull * by_row(z[:p], z[p:], N, D, U))

    return jax.hessian(total)(jnp.concatenate([own, direct]))


@jax.jit
def _implicit(state: State, rows: Rows, slope, target) -> jax.Array:
    """[t, r, m] derivatives by the rows' log losses."""
    equations = _Equations(state, rows)
    p, h = state.x.own.shape[1], slope.shape[1] - state.x.own.shape[1]
    adjoint = equations.bordered(slope, target).adjoint(len(state.x.shared))
    reach = jnp.einsum("trp,tpm->trm", equations.jacobian[..., :p], adjoint.own)
    reach = reach + equations.jacobian[..., p:] @ adjoint.shared[:h]
    return equations.slope[..., None] * equations.whitened(reach)


@partial(jax.jit, static_argnames="runs")
def _without(state: State, rows: Rows, slope, target, runs: int) -> jax.Array:
    """[runs, m] changes after one Newton step on the equations without each run."""
    equations = _Equations(state, rows)
    p, h, q = state.x.own.shape[1], slope.shape[1] - state.x.own.shape[1], len(state.x.shared)
    matrix = equations.bordered(slope, target)
    pull = equations.whitened(equations.told)
    curved = equations.whitened(equations.slope[..., None] * equations.jacobian)
    groups, direct = rows.group_size.shape[1], system.direct_part(state.x, state.prior)

    def changes(inputs) -> jax.Array:
        """[g, q+m, q+1] what leaving out each group of one target adds to the reduced corner."""
        blocks, right, left, jacobian, curved, group, own, pull, *where = inputs

        def summed(values: jax.Array) -> jax.Array:
            return jax.ops.segment_sum(values, group, groups, indices_are_sorted=True)

        bent = jax.vmap(lambda *row: _bend(direct, (own, *(values[None] for values in row))))(pull, *where)
        lost = summed(jacobian[:, :, None] * curved[:, None, :] - bent)
        # At the optimum the equations without a run are what that run contributed, with the sign reversed.
        column = -summed(jacobian * pull[:, None])
        upper = jnp.concatenate([jnp.broadcast_to(right, (groups, *right.shape)), column[:, :p, None]], -1)
        lower = jnp.broadcast_to(left, (groups, *left.shape)).at[:, :h].add(-lost[:, p:, :p])
        upper = upper.at[..., :h].add(-lost[:, :p, p:])
        corner = jnp.zeros((groups, left.shape[0], q + 1)).at[:, :h, :h].add(-lost[:, p:, p:])
        corner = corner.at[:, :h, q].add(column[:, p:])
        before = jnp.pad(left @ jnp.linalg.solve(blocks, right), ((0, 0), (0, 1)))
        return corner - Bordered(blocks - lost[:, :p, :p], upper, lower, corner).eliminated() + before

    told = (equations.jacobian, curved, rows.group, state.x.own, pull, rows.N, rows.D, rows.U)
    inputs = (matrix.blocks, matrix.right, matrix.left, *told)
    by_group = jax.lax.map(changes, inputs)
    by_run = (
        jnp.zeros((runs, *by_group.shape[2:]))
        .at[rows.group_run]
        .add(jnp.where(rows.group_size[..., None, None] > 0, by_group, 0.0))
    )
    reduced = jnp.pad(matrix.reduced(), ((0, 0), (0, 1))) + by_run
    return products(reduced, q)[..., 0]
