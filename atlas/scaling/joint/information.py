"""What runs not trained yet would tell: the expected variance of predictions of a joint fit after adding them.

    knowledge = Information.of(fit)
    now = knowledge.variance(N=3e10, D=D, U=U, target="fr")                         # [1]
    after = knowledge.expected_variance(candidates, N=3e10, D=D, U=U, target="fr")  # [candidates, 1]
    knowledge = knowledge.adding(candidates.take([after[:, 0].argmin()]))           # and choose the next one

Losses of planned runs are unknown, but their information is not: it depends on where the law stands, on the noise
within and between runs, and on the priors, which are all taken as fitted. So a variance is what the law would know
if it is right; the worse a run is covered by those fitted, the less the promise is worth.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from atlas.scaling.joint import system
from atlas.scaling.joint.arrow import Arrow, Bordered, products
from atlas.scaling.joint.fitted import JointFit
from atlas.scaling.joint.system import Noise
from atlas.scaling.noise import shrinkage
from atlas.scaling.padding import bucket, padded

_BATCH = 64  # groups at a time: enough to fill a core, few enough for its cache


@dataclasses.dataclass(frozen=True)
class PlannedRuns:
    """Runs that could be trained; each is evaluated on every target language that it trains.

    Attributes:
      N: [c] parameters.
      D: [c, Ls] tokens by source at the end of the run, in the order of the fit's sources; 0 where untrained.
      U: [c, Ls] unique tokens by source, infinite where nothing repeats.
      checkpoints: parts of the run, in (0, 1], after which it is evaluated.
    """

    N: np.ndarray
    D: np.ndarray
    U: np.ndarray
    checkpoints: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.N)

    def take(self, index) -> "PlannedRuns":
        """The runs that indices or a mask select."""
        return dataclasses.replace(self, N=self.N[index], D=self.D[index], U=self.U[index])


@dataclasses.dataclass(frozen=True)
class Information:
    """What is known of the law of every language: its posterior precision, with the law as fitted.

    Attributes:
      fit: whose law, noise (σ, ρ) and priors hold.
      precision: of the blocks θ_t and of the shared parameters, of which the law itself holds the first h.
    """

    fit: JointFit
    precision: Arrow

    @classmethod
    def of(cls, fit: JointFit) -> "Information":
        """What the runs of a fit tell."""
        return cls(fit, fit.record.precision)

    def adding(self, runs: PlannedRuns) -> "Information":
        """What is known once all of `runs` are trained too."""
        _, groups = self._groups(runs)
        with jax.enable_x64(True):
            precision = _extended(self.precision, groups, *self._law(), np.array(runs.checkpoints))
            return dataclasses.replace(self, precision=jax.tree.map(np.asarray, precision))

    def variance(self, N, D, U, target) -> np.ndarray:
        """Posterior variance [m] of the log loss at m points; arguments as for `JointFit.predict`.

        Its root times the loss is the deviation that `JointFit.predict` returns.
        """
        with jax.enable_x64(True):
            return np.asarray(_variance(self._bordered(N, D, U, target), q=len(self.precision.corner)))

    def expected_variance(self, candidates: PlannedRuns, N, D, U, target) -> np.ndarray:
        """`variance` of m points once one candidate is trained too, for each of the c alternatives.

        Exact for the linearised law: the information of a candidate reaches the points through the blocks of
        the languages that it trains and through what all languages share.

        Returns:
          [c, m], nowhere above `variance`.
        """
        member, groups = self._groups(candidates)
        size = bucket(len(candidates), 64)
        with jax.enable_x64(True):
            bordered = self._bordered(N, D, U, target)
            parts = np.array(candidates.checkpoints)
            found = _alternatives(
                bordered, groups, member, *self._law(), parts, members=size, q=len(self.precision.corner)
            )
            return np.asarray(found)[: len(candidates)]

    def _law(self) -> tuple:
        record = self.fit.record
        return record.theta, record.direct, record.state.noise

    def _groups(self, runs: PlannedRuns) -> tuple[np.ndarray, tuple]:
        """The run of each pair of a run and a target that it trains; N, D, U, target and weight of the pairs."""
        member, target = np.nonzero(runs.D[:, : len(self.fit.targets)] > 0)
        points, _ = self.fit.points(runs.N[member], runs.D[member], runs.U[member], target)
        size = bucket(len(member), _BATCH)
        filled = [padded(values, size, 1) for values in points[:3]] + [padded(target, size, 0)]
        return padded(member, size, 0), (*filled, padded(np.ones(len(member)), size, 0.0))

    def _bordered(self, N, D, U, target) -> Bordered:
        """The precision beside the slopes of m points, as rows and as columns."""
        points, _ = self.fit.points(N, D, U, target)
        return bordered(self.precision, self.fit.record.theta, self.fit.record.direct, points)


@jax.jit
def bordered(matrix: Arrow, theta: jax.Array, direct: jax.Array, points) -> Bordered:
    """A symmetric arrow beside the slopes [m, p+h] of log losses at points, as rows and as columns."""
    _, slope = system.slopes(theta, direct, *points)
    own, shared = spread(slope, points.target, theta.shape, len(matrix.corner))
    lower = jnp.concatenate([jnp.swapaxes(matrix.border, 1, 2), own], 1)
    m = len(shared)
    corner = jnp.concatenate([matrix.corner, shared], 0)
    corner = jnp.concatenate([corner, jnp.concatenate([shared.T, jnp.zeros((m, m))], 0)], 1)
    return Bordered(matrix.blocks, jnp.swapaxes(lower, 1, 2), lower, corner)


def spread(slope: jax.Array, target: jax.Array, shape: tuple[int, int], q: int) -> tuple[jax.Array, jax.Array]:
    """Slopes [m, p+h] by block [t, m, p], zero but on a point's target, and by shared parameter [m, q]."""
    t, p = shape
    own = jax.nn.one_hot(target, t, dtype=slope.dtype).T[:, :, None] * slope[None, :, :p]
    shared = slope[:, p:]
    return own, jnp.pad(shared, ((0, 0), (0, q - shared.shape[1])))


def _information(group: tuple, theta, direct, noise: Noise, checkpoints) -> jax.Array:
    """[p+h, p+h] Fisher information of one planned run's evaluations on one target."""
    N, D, U, target, weight = group
    by_row = jax.vmap(jax.grad(system.log_loss, (0, 1)), (None, None, None, 0, None))
    J = jnp.concatenate(by_row(theta[target], direct, N, D * checkpoints[:, None], U), -1)
    total = jnp.sum(J, 0)
    shrink = shrinkage(jnp.float64(len(J)), noise.rho)
    return weight * (J.T @ J - shrink * jnp.outer(total, total)) / noise.scale


@jax.jit
def _extended(matrix: Arrow, groups: tuple, theta, direct, noise, checkpoints) -> Arrow:
    def each(group: tuple):
        return _information(group, theta, direct, noise, checkpoints)

    p, h = theta.shape[1], len(direct)
    by_target = jax.ops.segment_sum(jax.lax.map(each, groups, batch_size=_BATCH), groups[3], len(theta))
    return Arrow(
        matrix.blocks + by_target[:, :p, :p],
        matrix.border.at[:, :, :h].add(by_target[:, :p, p:]),
        matrix.corner.at[:h, :h].add(jnp.sum(by_target[:, p:, p:], 0)),
    )


@partial(jax.jit, static_argnames="q")
def _variance(matrix: Bordered, q: int) -> jax.Array:
    return jnp.diagonal(products(matrix.reduced(), q))


@partial(jax.jit, static_argnames=("members", "q"))
def _alternatives(
    matrix: Bordered, groups: tuple, member, theta, direct, noise, checkpoints, members: int, q: int
) -> jax.Array:
    """[members, m] variances under each member's own groups."""
    p, h = theta.shape[1], len(direct)
    eliminated = matrix.eliminated()

    def change(group: tuple) -> jax.Array:
        information = _information(group, theta, direct, noise, checkpoints)
        target = group[3]
        lower = matrix.left[target].at[:h].add(information[p:, :p])
        factor = jnp.linalg.cholesky(matrix.blocks[target] + information[:p, :p])
        moved = lower @ jax.scipy.linalg.cho_solve((factor, True), lower.T) - eliminated[target]
        return (-moved).at[:h, :h].add(information[p:, p:])

    changes = jax.lax.map(change, groups)  # one by one for the reason that `solver.solve_each` states
    reduced = matrix.corner - jnp.sum(eliminated, 0) + jax.ops.segment_sum(changes, member, members)
    return jnp.diagonal(products(reduced, q), axis1=-2, axis2=-1)
