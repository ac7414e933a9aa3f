"""Scaling laws: runs table, laws, fits, held-out scores, practice. Needs jax, numpy and pandas only.

From a table to a law of one language:

    from atlas.scaling import compare, fit, load_runs
    runs = load_runs("runs.csv").where('phase == "cooldown" and language == "fr"')
    law = fit("chinchilla", runs)
    loss, deviation = law.predict(N=1e9, D=1e11)
    print(law.parameters, compare(["chinchilla", "farseer"], runs))

and to the law of all languages:

    from atlas.scaling import fit_joint
    law = fit_joint(load_runs("runs.csv").where('phase == "cooldown"'))
    print(law.transfer_matrix())
    loss, deviation = law.predict(N=1e9, D=[1e10, 2e9], U=[5e9, 2e9], target="fr")
"""

from atlas.scaling.estimates import Estimate
from atlas.scaling.holdout import heldout, heldout_predictions
from atlas.scaling.joint.fit import JointFit, fit_joint
from atlas.scaling.single.bootstrap import bootstrap
from atlas.scaling.single.comparison import compare
from atlas.scaling.single.fit import Fit, fit
from atlas.scaling.table.runs import Runs, load_runs

__all__ = [
    "Estimate",
    "Fit",
    "JointFit",
    "Runs",
    "bootstrap",
    "compare",
    "fit",
    "fit_joint",
    "heldout",
    "heldout_predictions",
    "load_runs",
]
