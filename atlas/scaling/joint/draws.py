"""Laws of all languages drawn from what a joint fit leaves open, for bands around a plan."""

from collections.abc import Mapping

import jax
import numpy as np

from atlas.scaling.joint.arrow import factor
from atlas.scaling.joint.fit import fit_joint, telling_rows
from atlas.scaling.joint.fitted import JointFit
from atlas.scaling.joint.system import LOG_A, LOG_B, LOG_E, natural_arrays
from atlas.scaling.law import JointLaw
from atlas.scaling.single.draws import linear_in_value
from atlas.scaling.table.labels import labels
from atlas.scaling.table.runs import Runs
from checked import UserError

DRAWS = 48  # for bands: each plans a mixture anew, and is written into every report
_OPTIONS = {"families": Mapping, "scripts": Mapping, **dict.fromkeys(("tau_prior", "lambda_kind", "mixing"), str)}
_AGREEING = 0.5  # standard errors within which a refit repeats a fit


def joint_draws(fit: JointFit, count: int = DRAWS, seed: int = 0) -> JointLaw:
    """Laws [count] from the Laplace posterior of a joint fit, correlations between languages included.

    In the logarithms of positive parameters, but in the values of E and of the two terms; see `law_draws`.
    """
    record, rng = fit.record, np.random.default_rng(seed)
    with jax.enable_x64(True):
        factors = jax.tree.map(np.asarray, factor(record.precision))
    shared = np.linalg.solve(factors.schur.T, rng.normal(size=(len(factors.schur), count)))
    own = np.swapaxes(factors.inverse, 1, 2) @ rng.normal(size=(*record.theta.shape, count))
    moved = np.moveaxis(own - factors.coupling @ shared, -1, 0)
    moved[..., [LOG_E, LOG_A, LOG_B]] = linear_in_value(moved[..., [LOG_E, LOG_A, LOG_B]])
    direct = record.direct + shared[: len(record.direct)].T
    return natural_arrays(record.theta + moved, direct, record.units, fit.targets, fit.sources)


def refitted(document: Mapping, runs: Runs) -> JointFit:
    """The joint fit that a fit.json came from, by fitting its runs again: files hold no posterior of all languages.

    Raises:
      UserError: the document is of another law or of other rows, or the runs give other parameters.
    """
    used = int(telling_rows(runs, []).sum())
    if document.get("law") != "atlas" or document.get("n_rows") != used:
        of = f"the {document.get('law')} law and {document.get('n_rows')} rows"
        raise UserError(f"fit.json is of {of}, not of the atlas law and the {used} rows of runs.csv")
    fit = fit_again(document, runs)
    if not _agrees(fit, document["parameters"]):
        raise UserError("fitting runs.csv again gives other parameters than fit.json; write both anew")
    return fit


def fit_again(document: Mapping, runs: Runs) -> JointFit:
    """The joint fit of runs by the options of a fit.json; an older one has the usual ones and a mixing."""
    mixing = "sum" if (document.get("joint_law") or {}).get("eta") is None else "ces"
    options = document.get("options") or labels(runs.languages) | {"mixing": mixing}
    for name, value in options.items():
        if not isinstance(value, _OPTIONS.get(name, ())):
            raise UserError(f"'options' of the fit: {name} is none that a fit leaves; fit its runs again")
    return fit_joint(runs, **options)


def _agrees(fit: JointFit, parameters: Mapping[str, Mapping]) -> bool:
    again = [(fit.parameters.get(name), estimate["value"]) for name, estimate in parameters.items()]
    return all(new is not None and abs(new.value - old) <= _AGREEING * new.se for new, old in again)
