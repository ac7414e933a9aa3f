"""What a law is: a pure function of parameters and of columns of a runs table, and what a fit has to know of both.

The library's laws are a file each in atlas/scaling/single/library, listed there. Anyone's own is a few lines in a file
of theirs, which `law_named("my_laws.py:moe")` and `experiments.fit --law=my_laws.py:moe` find:

>>> def loss(p, x):
...     return p["E"] + p["A"] * x["N"] ** -p["alpha"] * x["experts"] ** p["gain"] + p["B"] * x["D"] ** -p["beta"]
>>> exponents = [Parameter(name, role="exponent") for name in ("alpha", "beta")]
>>> gain = Parameter("gain", positive=False, starts=(-0.2, 0.0, 0.2))
>>> moe = Law("moe", "mine", loss, ["E", "A", "B", *exponents, gain], ["N", "D", Column("experts")])
>>> moe.linear, moe.needs
(('E', 'A', 'B'), ('num_params', 'tokens', 'experts'))
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from atlas.scaling.table.runs import Runs

Params = Mapping[str, jax.Array]
Batch = Mapping[str, jax.Array]

EXPONENTS = tuple(np.geomspace(0.05, 1.6, 12))  # published ones lie between 0.15 and 0.75
_MOST = 1024  # points of a grid that are tried: of a finer one, as many drawn from it
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
      starts: values at which fits begin; by default those that published exponents have, else the prior's mean. In
        parameters without any the loss must be linear while the others are held: least squares starts them.
      width: standard deviation of the fitted value from which it counts as unknown; of a coefficient there is none, as
        the value of a term at one parameter or token is vague in any real study.
    """

    name: str
    positive: bool = True
    role: str = ""
    scale: tuple[str, str] | None = None
    prior: tuple[float, float] | None = None
    starts: tuple[float, ...] = ()
    width: float = 1.0

    @property
    def grid(self) -> tuple[float, ...]:
        """The values at which fits begin; none of a linear parameter."""
        middle = self.prior and (float(np.exp(self.prior[0])) if self.positive else self.prior[0],)
        return self.starts or (EXPONENTS if self.role == "exponent" else middle or ())


@dataclasses.dataclass(frozen=True)
class Column:
    """An input of a law.

    Attributes:
      name: as the law's function calls it.
      of: (runs, meaning of tokens) -> values [n]; by default the table's column of this name.
      default: its value where a prediction names none.
      needs: columns that the table must have for it; by default the one of this name.
    """

    name: str
    of: Callable[[Runs, str], np.ndarray] | None = None
    default: float | None = None
    needs: tuple[str, ...] | None = None

    def read(self, runs: Runs, tokens: str) -> np.ndarray:
        """[n] float64 values of a table."""
        return np.asarray(self.of(runs, tokens) if self.of else runs.frame[self.name], float)


def _of_tokens(runs: Runs, tokens: str) -> np.ndarray:
    return runs.own(runs.D) if tokens == "own" else runs.total_tokens


def _of_unique(runs: Runs, tokens: str) -> np.ndarray:
    # Of a mixture in which something repeats, only the seen part of each language is unique.
    return runs.own(runs.U) if tokens == "own" else np.minimum(runs.D, runs.U).sum(1)


N = Column("N", lambda runs, tokens: runs.N, needs=("num_params",))
D = Column("D", _of_tokens, needs=("tokens",))
U = Column("U", _of_unique, np.inf, needs=("tokens",))
SHARE = Column("p", lambda runs, tokens: runs.own(runs.shares), 1.0, needs=("tokens",))
_COLUMNS = {column.name: column for column in (N, D, U, SHARE)}


def _inverse_softplus(y: jax.Array) -> jax.Array:
    return y + jnp.log(-jnp.expm1(-y))


@dataclasses.dataclass(frozen=True, eq=False)
class Law:
    """A scaling law.

    Attributes:
      name: how `fit` and the command line call it.
      source: the paper and its equation.
      loss: (parameters, batch) -> losses; parameters by name, batch columns by name, arrays that broadcast.
      parameters: their specification, in the order of the fit's arrays; a name stands for a positive linear one.
      columns: the batch; a name stands for N, D, U, p (the share) or for the table's column of this name.
      residual: "log" of the losses, which must be positive, or "raw" for losses of any sign.
      start_loss: in place of `loss` for the starts, where that is not linear in `linear`.
      starts: (batch, loss [n], weight [n], centre) -> coordinates [s, p]; in place of what the parameters say.
      coordinates: (x [p], centre) -> fitted values [p]; in place of what `Parameter.scale` gives.
      diagnose: batch -> parameter -> why the design cannot determine it.
      tokens: which tokens of a mixture D means unless a fit says otherwise: "own" or "total".
    """

    name: str
    source: str
    loss: Callable[[Params, Batch], jax.Array]
    parameters: Sequence[Parameter]
    columns: Sequence[Column]
    residual: str = "log"
    start_loss: Callable[[Params, Batch], jax.Array] | None = None
    starts: Callable[..., jax.Array] | None = None
    coordinates: Callable[[jax.Array, Batch], jax.Array] | None = None
    diagnose: Callable[[Mapping[str, np.ndarray]], dict[str, str]] = lambda batch: {}
    tokens: str = "own"

    def __post_init__(self) -> None:
        parameters = tuple(Parameter(p) if isinstance(p, str) else p for p in self.parameters)
        columns = tuple(_COLUMNS.get(c, Column(c)) if isinstance(c, str) else c for c in self.columns)
        object.__setattr__(self, "parameters", parameters)
        object.__setattr__(self, "columns", columns)

    def __repr__(self) -> str:
        return f"Law({self.name!r})"

    @property
    def linear(self) -> tuple[str, ...]:
        """The parameters that least squares starts."""
        return tuple(p.name for p in self.parameters if not p.grid)

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns that a table must have beside the loss."""
        each = ((c.name,) if c.needs is None else c.needs for c in self.columns)
        return tuple(dict.fromkeys(name for names in each for name in names))

    def observed(self, loss: jax.Array) -> jax.Array:
        """What residuals are differences of: losses, or their logarithms."""
        return jnp.log(loss) if self.residual == "log" else loss

    def loss_of(self, observed: jax.Array) -> jax.Array:
        """The inverse of `observed`."""
        return jnp.exp(observed) if self.residual == "log" else observed

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
        level, exponent = self._roles()
        bent = jnp.log(jax.nn.softplus(jnp.where(level | exponent, x, 0.0)))
        values = jnp.where(level, jnp.log(_LOW * centre["loss"]) + bent, x)
        values = jnp.where(exponent, -jnp.log(_STEEP) - bent, values)
        return values + self._shift(values, centre)

    def locate(self, fitted: jax.Array, centre: Batch) -> jax.Array:
        """The inverse of `fitted` for laws without coordinates of their own."""
        values, (level, exponent) = fitted - self._shift(fitted, centre), self._roles()
        size = jnp.where(level, values - jnp.log(_LOW * centre["loss"]), -values - jnp.log(_STEEP))
        return jnp.where(level | exponent, _inverse_softplus(jnp.exp(size)), values)

    def _roles(self) -> tuple[np.ndarray, np.ndarray]:
        """[p] whether each is a level, and whether an exponent."""
        roles = np.array([p.role for p in self.parameters])
        return roles == "level", roles == "exponent"

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
        if not (terms := self.terms()):
            return jnp.zeros_like(fitted)
        which, exponents, columns = zip(*terms, strict=True)
        logs = fitted[np.array(exponents)]
        each = jnp.exp(logs) * jnp.log(jnp.stack([centre[column] for column in columns])) - logs
        return each @ np.eye(len(fitted))[np.array(which)]

    def start(self, batch: Batch, loss: jax.Array, weight: jax.Array, centre: Batch) -> jax.Array:
        """Coordinates [s, p] from which to descend: best of the grid by variable projection.

        For each point of the grid, the linear parameters minimise the squared residuals, relative ones unless they
        are raw.
        """
        if self.starts is not None:
            return self.starts(batch, loss, weight, centre)
        form, scale = self.start_loss or self.loss, weight / loss if self.residual == "log" else weight
        mean = jnp.sum(weight * jnp.abs(loss)) / jnp.sum(weight)
        positive = jnp.array([p.positive for p in self.parameters if not p.grid])

        def score(point: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            def losses(values: dict[str, jax.Array]) -> jax.Array:
                return jnp.broadcast_to(form(point | values, batch), loss.shape)

            zero = {name: jnp.zeros_like(mean) for name in self.linear}
            rest = losses(zero)
            terms = jnp.stack([losses(zero | {name: jnp.ones_like(mean)}) - rest for name in self.linear], -1)
            size = jnp.sum(weight[:, None] * jnp.abs(terms), 0) / jnp.sum(weight)
            design = terms / size * scale[:, None]
            normal = design.T @ design
            ridge = _RIDGE * jnp.diag(jnp.diagonal(normal))
            coefficients = jnp.linalg.solve(normal + ridge, design.T @ (scale * (loss - rest)))
            coefficients = jnp.where(positive, jnp.maximum(coefficients, _FLOOR * mean), coefficients) / size
            values = point | dict(zip(self.linear, coefficients, strict=True))
            misfit = jnp.sum(weight * jnp.abs(self.observed(losses(values)) - self.observed(loss)))
            fitted = jnp.stack([jnp.log(values[p.name]) if p.positive else values[p.name] for p in self.parameters])
            return misfit, self.locate(fitted, centre)

        grid = {p.name: p.grid for p in self.parameters if p.grid}
        mesh = np.stack([m.ravel() for m in np.meshgrid(*grid.values(), indexing="ij")])
        if mesh.shape[1] > _MOST:
            mesh = mesh[:, np.random.default_rng(0).choice(mesh.shape[1], _MOST, replace=False)]
        scores, points = jax.vmap(score)(dict(zip(grid, jnp.asarray(mesh), strict=True)))
        return points[jnp.argsort(jnp.where(jnp.isfinite(scores), scores, jnp.inf))[:_BEST]]
