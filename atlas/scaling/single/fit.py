"""Fits of one law to one series of runs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from atlas.scaling.estimates import Estimate, quantile95, r2, relative_error
from atlas.scaling.padding import bucket, padded
from atlas.scaling.single import estimator
from atlas.scaling.single.estimator import Problem
from atlas.scaling.single.fitted import Diagnostics, Fit, columns_of, residual_of
from atlas.scaling.single.library import law_named
from atlas.scaling.single.specification import Law
from atlas.scaling.table.runs import Runs
from atlas.scaling.table.splits import WARM_UP, held_rows, late_rows, past_warm_up, split_runs
from checked import UserError, unknown

OBJECTIVES = ("huber", "least_squares", "lad")
RESIDUALS = ("log", "raw")
_LAD_DELTA = 1e-5  # a Huber corner this small is least absolute deviations for any real noise
_NO_CORNER = 1e6  # one that no residual reaches: least squares
_DELTA = 1e-3  # the usual one, of Hoffmann et al. (arXiv 2203.15556, App. D.2)

_VANISHED = 0.05  # of the least loss, below which a level is on its way to 0
_TOLD = 0.5  # of a prior's variance: below it the runs, not the prior, have told most of a parameter

# Half is the rate of parametric estimation, which Hoffmann et al. (App. D.2) expect of both terms; fits to
# published families lie between 0.15 and 0.75.
_USUAL = (float(np.log(0.5)), 0.35)
_PUBLISHED = (float(np.log(0.35)), 0.35)

_PARTS = (0.0, 0.1, 0.2, 0.3, 0.5)  # of each run, that may be left out at its start
_TAIL = 0.7  # part of the largest model's runs behind which they are predicted, as in the guide
_CLEARLY = 0.6  # of the usual choice's error, below which another is preferred to it: one model's runs tell little
_SIZES = 3  # of models, without which nothing can be predicted from smaller ones; a term of N passes through so many
_ROWS_EACH = 40  # of a run, by which the part is chosen; neighbours tell the same
_ALL_BUT_ENDS = 1.0 - 1e-9


def fit(
    law: str | Law,
    runs: Runs,
    *,
    objective: str = "huber",
    delta: float | None = None,
    tokens: str | None = None,
    residual: str = "",
    warm_up: float | None = None,
) -> Fit:
    """Fits one law to all rows, which must evaluate one language.

    Minimises the sum of huber_δ(log L − log L̂), or of huber_δ(L − L̂) where residuals are raw: starts from variable
    projection (a grid over the exponents, least squares for the rest), then damped Newton steps through ever sharper
    corners. Standard errors are those of an M-estimator, with the rows of a run correlated.

    Args:
      law: the name of one of the library, or "FILE.py:NAME" of one of your own, or a `Law`.
      runs: rows of one target language.
      objective: "huber", "least_squares" or "lad".
      delta: corner of the Huber loss, in log loss (or loss); 1e-3 by default.
      tokens: whether D is the "own" tokens of the evaluated language or the "total" of the mixture; the law's
        own choice by default.
      residual: "log", or "raw" for losses of any sign; the law's own choice by default.
      warm_up: part of each run's tokens whose rows are left out, see `past_warm_up`; by default, in tables with
        intermediate rows, whichever part lets the smaller models predict the largest best.

    Raises:
      UserError: unknown law, objective, tokens or residual; a delta of another objective; a column that the law needs
        is missing; several languages; rows without tokens of their language; fewer rows than parameters; no start of
        finite loss.
    """
    model, corner, tokens = reading(law, runs, objective, delta, tokens, residual)
    part, why = (warm_up, "") if warm_up is not None else _choose(model, runs, corner, tokens)
    runs = past_warm_up(runs, part)
    if why:
        note = f"exponents are drawn to 0.35, about which published ones lie: {why}"
        runs = dataclasses.replace(runs, notes=(*runs.notes, note))
    found = _fitted(model, runs, corner, tokens, bool(why))
    if not np.isfinite(found.fitted).all():
        raise UserError(
            f"the {model.name} law has no finite loss at any start; where it is not linear, parameters need starts"
        )
    return dataclasses.replace(found, warm_up=part)


def reading(
    law: str | Law,
    runs: Runs,
    objective: str = "huber",
    delta: float | None = None,
    tokens: str | None = None,
    residual: str = "",
    **_: Any,
) -> tuple[Law, float, str]:
    """The law, the corner of its Huber loss and the meaning of its tokens, as `fit` takes them of these arguments, once
    checked against the runs."""
    model = law_named(law) if isinstance(law, str) else law
    model = residual_of(model, residual) if residual else model
    tokens = tokens or model.tokens
    _check(model, runs, objective, delta, tokens)
    return model, {"huber": delta or _DELTA, "least_squares": _NO_CORNER, "lad": _LAD_DELTA}[objective], tokens


def warm_up_for(law: str | Law, runs: Runs, warm_up: float | None = None, **options: Any) -> float:
    """The part of each run that `fit` leaves out, under the same options."""
    if warm_up is not None:
        return warm_up
    model, corner, tokens = reading(law, runs, **options)
    return _choose(model, runs, corner, tokens)[0]


def _fitted(law: Law, runs: Runs, corner: float, tokens: str, drawn: bool, least: int = 0) -> Fit:
    """The fit of all rows; drawn: whether exponents are drawn to published ones; least: rows to pad to."""
    columns = columns_of(law, runs, tokens)
    open_ = law.diagnose(columns)
    undetermined = any(p.role == "exponent" and p.name in open_ for p in law.parameters)
    usual = _PUBLISHED if drawn else _USUAL if undetermined else None
    problem = _problem(law, columns, runs, corner, *_prior(law, usual), least)
    with jax.enable_x64(True):
        solution, spread = _solve(law, problem, len(runs))
    return _report(law, runs, columns, open_, tokens, problem, solution, spread)


def _choose(law: Law, runs: Runs, corner: float, tokens: str) -> tuple[float, str]:
    """The part of each run to leave out, and why exponents are drawn to published ones, "" where they are not.

    WARM_UP, and drawn where there are three sizes, since a term of N passes through any three losses; but what lets the
    smaller models predict the ends of the largest one's runs clearly better. A table without intermediate rows is kept
    whole.
    """
    if past_warm_up(runs, _ALL_BUT_ENDS) is runs:
        return 0.0, ""
    some = _thinned(runs)
    # Of checkpoints at powers of two a cut can leave so few that exponents are open: such a cut is none.
    open_ = [set(law.diagnose(columns_of(law, past_warm_up(some, part), tokens))) for part in _PARTS]
    parts = [part for part, names in zip(_PARTS, open_, strict=True) if names <= open_[0]]
    sizes = len(np.unique(some.N))
    usual = max(part for part in parts if part <= WARM_UP), sizes == _SIZES
    best = usual if sizes < _SIZES else _predicting_best(law, some, corner, tokens, parts, usual)
    why = "three sizes agree with any" if usual[1] else "the smaller models predict the largest so"
    return best[0], why if best[1] else ""


def _predicting_best(
    law: Law, runs: Runs, corner: float, tokens: str, parts: list[float], usual: tuple[float, bool]
) -> tuple[float, bool]:
    """The part to leave out and whether exponents are drawn: of the usual pair and those that differ in one of them."""
    train, test = split_runs(runs, "largest_n")
    test, scores = past_warm_up(test, _TAIL), {}
    for part, drawn in dict.fromkeys([*((part, usual[1]) for part in parts), (usual[0], True)]):
        kept = past_warm_up(train, part)
        if len(kept) >= len(law.names):
            found = _fitted(law, kept, corner, tokens, drawn, least=bucket(len(train)))
            predicted, raw = found.predict_runs(test)[0], law.residual == "raw"
            errors = np.abs(predicted - test.loss) if raw else relative_error(test.loss, predicted)
            error = float(np.mean(errors))
            scores[part, drawn] = error if np.isfinite(error) else np.inf
    best = min(scores, key=scores.__getitem__, default=usual)
    return best if scores.get(best, 0.0) < _CLEARLY * scores.get(usual, np.inf) else usual


def _apart(
    law: Law, columns: Mapping[str, np.ndarray], runs: Runs, open_: Mapping[str, str], drawn: bool
) -> np.ndarray:
    """[n] 1 for rows that the others are to predict, which tells the law's misfit, and -1 for rows left out of that.

    Of the largest model's runs the ends are predicted, of a table without intermediate rows the runs of most compute;
    nothing where the other rows leave more exponents open.
    """
    none = np.zeros(len(runs), int)
    if np.isnan(runs.total_tokens).any() or len(np.unique(runs.N)) < _SIZES:
        return none
    curves = past_warm_up(runs, _ALL_BUT_ENDS) is not runs
    held = held_rows(runs, "largest_n" if curves else "top_compute")
    enough = np.sum(~held) > len(law.names)
    if not (enough and (drawn or set(law.diagnose({k: v[~held] for k, v in columns.items()})) <= set(open_))):
        return none
    return np.where(held, np.where(late_rows(runs, _TAIL), 1, -1), 0)


def _thinned(runs: Runs) -> Runs:
    """At most _ROWS_EACH rows of every run, evenly over its rows by tokens: enough to choose by."""
    order = np.lexsort((runs.total_tokens, runs.run))
    count = np.bincount(runs.run)
    first = np.concatenate([[0], np.cumsum(count)[:-1]])
    picked = [
        i + np.unique(np.linspace(0, n - 1, _ROWS_EACH).round().astype(int)) for i, n in zip(first, count, strict=True)
    ]
    return runs.where(np.isin(np.arange(len(runs)), order[np.concatenate(picked)]))


def _solve(law: Law, problem: Problem, rows: int) -> tuple[estimator.Solution, estimator.Spread]:
    if rows > estimator.SAMPLE:
        # The starts of a long table compete on some of its rows.
        some = np.random.default_rng(0).choice(rows, estimator.SAMPLE, replace=False)
        picked = {name: values[some] for name, values in problem.batch.items()}
        sample = {name: getattr(problem, name)[some] for name in ("observed", "weight")}
        near = estimator.solve(law, problem._replace(batch=picked, run=np.zeros(estimator.SAMPLE, int), **sample))
        solution = estimator.polish(law, near, problem, estimator.prior_scale(law, near.x, problem))
    else:
        solution = estimator.solve(law, problem)
    spread = estimator.spread(law, solution.x, problem, solution.scale)
    if np.any(problem.precision):
        # Rows of a run tell less than as many independent ones: the prior counts for more beside them.
        more = rows / spread.rows
        if rows > estimator.SAMPLE:
            scale = estimator.prior_scale(law, solution.x, problem) * more
            solution = estimator.polish(law, solution, problem, scale)
        else:
            # So much more that the optimum lies elsewhere, and is approached anew.
            solution = estimator.solve(law, problem._replace(precision=problem.precision * more))
            solution = solution._replace(scale=solution.scale * more)
        spread = estimator.spread(law, solution.x, problem, solution.scale)
    return jax.tree.map(np.asarray, (solution, spread))


def _problem(
    law: Law,
    columns: Mapping[str, np.ndarray],
    runs: Runs,
    corner: float,
    mean: np.ndarray,
    precision: np.ndarray,
    least: int,
) -> Problem:
    size = max(bucket(len(runs)), least)
    size <<= (size.bit_length() - 1) % 2  # powers of four: a fit compiles for seconds and runs for milliseconds
    positive = [name for name, values in columns.items() if np.all(np.isfinite(values) & (values > 0))]
    return Problem(
        batch={name: padded(values, size, values[-1]) for name, values in columns.items()},
        observed=padded(np.log(runs.loss) if law.residual == "log" else runs.loss, size, 1.0),
        weight=padded(np.ones(len(runs)), size, 0.0),
        run=padded(np.asarray(runs.run), size, 0),
        centre={name: np.exp(np.mean(np.log(columns[name]))) for name in positive}
        | {"loss": np.exp(np.mean(np.log(np.abs(runs.loss[runs.loss != 0]))))},
        corner=np.float64(corner),
        mean=mean,
        precision=precision,
    )


def _prior(law: Law, usual: tuple[float, float] | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean [p] and precision [p, p] of the prior on the fitted values: the law's own, and `usual` of other exponents.

    Where the design leaves exponents open they need one: noise would otherwise choose among laws that fit alike.
    """
    known = {p.name: p.prior for p in law.parameters if p.prior}
    if usual:
        known = {p.name: usual for p in law.parameters if p.role == "exponent"} | known
    mean, deviation = np.array([known.get(name, (0.0, np.inf)) for name in law.names]).T
    return mean, np.diag(deviation**-2.0)


def _check(law: Law, runs: Runs, objective: str, delta: float | None, tokens: str) -> None:
    for kind, name, valid in (
        ("objective", objective, OBJECTIVES),
        ("meaning of tokens", tokens, ("own", "total")),
        ("residual", law.residual, RESIDUALS),
    ):
        if name not in valid:
            raise unknown(kind, name, valid)
    if delta is not None and objective != "huber":
        raise UserError(f"delta is the corner of the Huber loss, and {objective} has none: leave it out")
    if delta is not None and not (np.isfinite(delta) and delta > 0):
        raise UserError(f"delta must be a positive number of log loss, got {delta}; 1e-3 is usual")
    evaluated = [runs.languages[i] for i in np.unique(runs.target)]
    if len(evaluated) > 1:
        raise UserError(
            f"the {law.name} law is fitted to one language, the rows evaluate {len(evaluated)}: "
            f"choose one, such as 'language == \"{evaluated[0]}\"', or fit the atlas law"
        )
    if (tokens == "own" or any(c.name == "p" for c in law.columns)) and (runs.own(runs.D) <= 0).any():
        raise UserError(
            f"some runs evaluate {evaluated[0]!r} without training on it: leave them out or use total tokens"
        )
    if law.residual == "log" and (runs.loss <= 0).any():
        raise UserError("some losses are not positive, and log residuals need positive ones: give --residual=raw")
    if len(runs) < len(law.names):
        raise UserError(f"{len(runs)} rows cannot determine the {len(law.names)} parameters of the {law.name} law")


def _report(law, runs, columns, open_, tokens, problem, solution, spread) -> Fit:
    fitted, predicted = spread.fitted, spread.predicted[: len(runs)]
    covariance = spread.to_fitted @ spread.covariance @ spread.to_fitted.T
    notes = list(runs.warnings)
    deviations = np.sqrt(np.maximum(np.diagonal(covariance), 0.0))
    told = _judge(law, open_, deviations, np.diagonal(problem.precision), notes)
    if not solution.converged:
        notes.insert(0, _astray(law, fitted, runs))
    quantile = quantile95(float(spread.freedom))
    estimates = {
        p.name: (Estimate.lognormal if p.positive else Estimate.normal)(value, deviation, p.name in told, quantile)
        for p, value, deviation in zip(law.parameters, fitted, deviations, strict=True)
    }
    return Fit(
        law=law.name,
        parameters=estimates,
        objective=float(solution.objective),
        converged=bool(solution.converged),
        starts_agreeing=float(solution.agreeing),
        covariance=covariance,
        freedom=float(spread.freedom),
        tokens=tokens,
        unit=runs.loss_unit,
        language=runs.languages[runs.target[0]],
        n_rows=len(runs),
        n_runs=len(runs.run_ids),
        warnings=tuple(notes),
        diagnostics=Diagnostics(
            decrement=float(solution.decrement / max(float(solution.objective), estimator.LEAST_OBJECTIVE)),
            condition=float(spread.condition),
            sigma=float(spread.sigma),
            correlation=float(spread.correlation),
            independent_rows=float(spread.rows),
            r2=r2(runs.loss, predicted),
            are=float(np.mean(relative_error(runs.loss, predicted))),
        ),
        fitted=fitted,
        model=law,
        problem=problem,
        x=solution.x,
        scale=float(solution.scale),
        apart=_apart(law, columns, runs, open_, bool(np.any(problem.precision))),
    )


def _astray(law: Law, fitted: np.ndarray, runs: Runs) -> str:
    """What a fit says that did not converge, with what would mend it."""
    least = np.log(_VANISHED * np.min(np.abs(runs.loss)))
    levels = [(p.name, at) for p, at in zip(law.parameters, fitted, strict=True) if p.role == "level" and p.positive]
    for name, at in levels:
        if at < least:
            return f"{name} runs to 0: do not trust the parameters; larger or longer runs would tell {name}"
    return "the fit did not reach an optimum: do not trust its parameters; fit a law of fewer, or add runs"


def _judge(
    law: Law, structural: Mapping[str, str], deviations: np.ndarray, precision: np.ndarray, notes: list[str]
) -> set[str]:
    """The parameters that the runs determine; why not, in `notes`, for the others.

    A level and a coefficient are known no better than the exponents that extrapolate to them.
    """
    for reason in dict.fromkeys(structural.values()):
        notes.append(f"{', '.join(n for n in structural if structural[n] == reason)} not identified: {reason}")
    told = set(law.names) - set(structural)
    widths = [np.inf if p.scale else p.width for p in law.parameters]
    vague = {name for name, d, width in zip(law.names, deviations, widths, strict=True) if not d < width}
    vague |= {p.name for p in law.parameters if p.scale and p.scale[1] in vague}
    borrowed = {name for name, d, own in zip(law.names, deviations, precision, strict=True) if d**2 * own > _TOLD}
    exponents = {p.name for p in law.parameters if p.role == "exponent" and p.name in borrowed & told}
    scaled = {p.name for p in law.parameters if p.scale and p.scale[1] in exponents}
    levels = {p.name for p in law.parameters if p.role == "level" and exponents}
    for names, reason in ((vague, "the runs leave its size open"), (borrowed - vague, "its prior decides it")):
        if extra := sorted(names & told):
            notes.append(f"{', '.join(extra)} not identified: {reason}")
    if extra := sorted((scaled | levels) & told - vague - borrowed):
        notes.append(f"{', '.join(extra)} not identified: the prior of {', '.join(sorted(exponents))} decides it")
    return told - vague - borrowed - scaled - levels
