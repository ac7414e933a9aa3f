"""What a law is: a pure function of parameters and a batch of runs, and a specification of both.

A new law is one file in atlas/scaling/single/library, listed there.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from atlas.scaling.table.runs import Runs

Params = Mapping[str, jax.Array]
Batch = Mapping[str, jax.Array]

EXPONENTS = tuple(np.geomspace(0.05, 1.6, 12))  # published ones lie between 0.15 and 0.75
_BEST = 6  # points of the grid from which the fit descends: enough to see whether they agree
# Where coordinates turn into logarithms, which keep levels and exponents positive: below and beyond what is published.
_LOW = 0.1  # level over the mean loss
_STEEP = 0.3  # inverse of the exponent
_FLOOR = 1e-3  # least share of the mean loss that a term has at a start: none may begin with a logarithm of 0
_RIDGE = 1e-10  # relative: terms that the design cannot tell apart share their coefficient


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a law.

    Attributes:
      name: as the law's function and the fit call it.
      positive: fitted as its logarithm; otherwise as itself.
      role: "level" of a constant in the unit of the loss, "exponent" of a power, or "".
      scale: (column, exponent) of a coefficient of column^(−exponent).
      prior: mean and standard deviation of the fitted value (the logarithm of a positive parameter), for
        what few studies determine.
      width: standard deviation of the fitted value from which it counts as unknown; of a coefficient there is none, as
        the value of a term at one parameter or token is vague in any real study.
    """

    name: str
    positive: bool = True
    role: str = ""
    scale: tuple[str, str] | None = None
    prior: tuple[float, float] | None = None
    width: float = 1.0


@dataclasses.dataclass(frozen=True)
class Column:
    """An input of a law: how a runs table gives it, and its value where a prediction names none."""

    name: str
    of: Callable[[Runs, str], np.ndarray]
    default: float | None = None


def _of_tokens(runs: Runs, tokens: str) -> np.ndarray:
    return runs.own(runs.D) if tokens == "own" else runs.total_tokens


def _of_unique(runs: Runs, tokens: str) -> np.ndarray:
    # Of a mixture in which something repeats, only the seen part of each language is unique.
    return runs.own(runs.U) if tokens == "own" else np.minimum(runs.D, runs.U).sum(1)


N = Column("N", lambda runs, tokens: runs.N)
D = Column("D", _of_tokens)
U = Column("U", _of_unique, np.inf)
SHARE = Column("p", lambda runs, tokens: runs.own(runs.shares), 1.0)


def _unbend(parameter: Parameter, x: jax.Array, centre: Batch) -> jax.Array:
    """The fitted value (of a coefficient, the log slope) at a coordinate."""
    if parameter.role == "level":
        return jnp.log(_LOW * centre["loss"] * jax.nn.softplus(x))
    if parameter.role == "exponent":
        return -jnp.log(_STEEP * jax.nn.softplus(x))
    return x


def _bend(parameter: Parameter, value: jax.Array, centre: Batch) -> jax.Array:
    """The inverse of `_unbend`."""
    if parameter.role == "level":
        return _inverse_softplus(jnp.exp(value) / (_LOW * centre["loss"]))
    if parameter.role == "exponent":
        return _inverse_softplus(jnp.exp(-value) / _STEEP)
    return value


def _inverse_softplus(y: jax.Array) -> jax.Array:
    return y + jnp.log(-jnp.expm1(-y))


@dataclasses.dataclass(frozen=True, eq=False)
class Law:
    """A scaling law.

    Attributes:
      name: how `fit` and the command line call it.
      source: the paper and its equation.
      loss: (parameters, batch) -> losses; parameters by name, batch columns by name, arrays that broadcast.
      parameters: their specification, in the order of the fit's arrays.
      columns: the batch.
      grid: values of the non-linear parameters at which fits start.
      linear: parameters in which `start_loss` is linear and homogeneous, given the grid's.
      start_loss: in place of `loss` for the starts, where that is not linear in them.
      starts: (batch, loss [n], weight [n], centre) -> coordinates [s, p]; in place of grid and linear.
      coordinates: (x [p], centre) -> fitted values [p]; in place of what `Parameter.scale` gives.
      diagnose: batch -> parameter -> why the design cannot determine it.
      tokens: which tokens of a mixture D means unless a fit says otherwise: "own" or "total".
    """

    name: str
    source: str
    loss: Callable[[Params, Batch], jax.Array]
    parameters: tuple[Parameter, ...]
    columns: tuple[Column, ...]
    grid: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    linear: tuple[str, ...] = ()
    start_loss: Callable[[Params, Batch], jax.Array] | None = None
    starts: Callable[..., jax.Array] | None = None
    coordinates: Callable[[jax.Array, Batch], jax.Array] | None = None
    diagnose: Callable[[Mapping[str, np.ndarray]], dict[str, str]] = lambda batch: {}
    tokens: str = "own"

    def __repr__(self) -> str:
        return f"Law({self.name!r})"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(parameter.name for parameter in self.parameters)

    def fitted(self, x: jax.Array, centre: Batch) -> jax.Array:
        """Fitted values [p] (logarithms of positive parameters) at coordinates x [p].

        Coordinates are what the fit moves in. An exponent's is its inverse, a coefficient's the logarithm of
        its term's slope at the geometric mean of the column (`centre`), a level's the level itself until it
        nears 0. A shallow power law with a low level can hardly be told from a steep one with a high level;
        in these coordinates the valley between them is nearly straight.
        """
        if self.coordinates is not None:
            return self.coordinates(x, centre)
        values = [_unbend(parameter, value, centre) for parameter, value in zip(self.parameters, x, strict=True)]
        return jnp.stack(values) + self._shift(jnp.stack(values), centre)

    def locate(self, fitted: jax.Array, centre: Batch) -> jax.Array:
        """The inverse of `fitted` for laws without coordinates of their own."""
        values = fitted - self._shift(fitted, centre)
        return jnp.stack([_bend(p, value, centre) for p, value in zip(self.parameters, values, strict=True)])

    def natural(self, fitted: jax.Array) -> dict[str, jax.Array]:
        """Parameters by name."""
        return {p.name: jnp.exp(t) if p.positive else t for p, t in zip(self.parameters, fitted, strict=True)}

    def predict(self, x: jax.Array, centre: Batch, batch: Batch) -> jax.Array:
        """Losses at coordinates x [p]."""
        return self.loss(self.natural(self.fitted(x, centre)), batch)

    def terms(self) -> list[tuple[int, int, str]]:
        """Of every coefficient of column^(−exponent): its index, its exponent's, the column."""
        scaled = [(i, p.scale) for i, p in enumerate(self.parameters) if p.scale]
        return [(i, self.names.index(exponent), column) for i, (column, exponent) in scaled]

    def to_terms(self, fitted: np.ndarray, centre: Mapping[str, float]) -> np.ndarray:
        """[p, p] changes by changes of fitted values [p], with log terms at `centre` in place of log coefficients."""
        matrix = np.eye(len(fitted))
        for i, j, column in self.terms():
            matrix[i, j] = -np.exp(fitted[j]) * np.log(centre[column])
        return matrix

    def _shift(self, fitted: jax.Array, centre: Batch) -> jax.Array:
        """[p] log coefficients less the logs of their terms' slopes."""
        shifts = [jnp.zeros_like(fitted[0])] * len(fitted)
        for i, j, column in self.terms():
            shifts[i] = jnp.exp(fitted[j]) * jnp.log(centre[column]) - fitted[j]
        return jnp.stack(shifts)

    def start(self, batch: Batch, loss: jax.Array, weight: jax.Array, centre: Batch) -> jax.Array:
        """Coordinates [s, p] from which to descend: best of the grid by variable projection.

        For each point of the grid, the linear parameters minimise the squared relative residuals.
        """
        if self.starts is not None:
            return self.starts(batch, loss, weight, centre)
        form = self.start_loss or self.loss
        mean = jnp.sum(weight * loss) / jnp.sum(weight)
        middle = {p.name: jnp.exp(p.prior[0]) if p.positive else p.prior[0] for p in self.parameters if p.prior}

        def score(point: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            def losses(values: dict[str, jax.Array]) -> jax.Array:
                return form(middle | point | values, batch)

            zero = {name: jnp.zeros_like(mean) for name in self.linear}
            terms = jnp.stack([losses(zero | {name: jnp.ones_like(mean)}) for name in self.linear], -1)
            size = jnp.sum(weight[:, None] * jnp.abs(terms), 0) / jnp.sum(weight)
            design = terms / size * (weight / loss)[:, None]
            normal = design.T @ design
            target = design.T @ weight
            coefficients = jnp.linalg.solve(normal + _RIDGE * jnp.diag(jnp.diagonal(normal)), target)
            found = dict(zip(self.linear, jnp.maximum(coefficients, _FLOOR * mean) / size, strict=True))
            misfit = jnp.sum(weight * jnp.abs(jnp.log(losses(found) / loss)))
            values = middle | point | found
            fitted = jnp.stack([jnp.log(values[p.name]) if p.positive else values[p.name] for p in self.parameters])
            return misfit, self.locate(fitted, centre)

        names = list(self.grid)
        mesh = np.meshgrid(*self.grid.values(), indexing="ij")
        scores, points = jax.vmap(score)({name: jnp.asarray(m.ravel()) for name, m in zip(names, mesh, strict=True)})
        return points[jnp.argsort(jnp.where(jnp.isfinite(scores), scores, jnp.inf))[:_BEST]]
