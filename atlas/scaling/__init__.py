"""Scaling laws: runs table, laws, fits, held-out scores, practice. Needs jax, numpy, scipy and pandas only.

From a table to a law of one language:

    from atlas.scaling import compare, fit, load_runs
    runs = load_runs("runs.csv").where('language == "fr"').comparable()
    law = fit("chinchilla", runs)
    loss, deviation = law.predict(N=1e9, D=1e11)
    print(law.parameters, compare(["chinchilla", "farseer"], runs))

and to the law of all languages:

    from atlas.scaling import fit_joint
    law = fit_joint(load_runs("runs.csv").comparable())
    print(law.transfer_matrix())
    loss, deviation = law.predict(N=1e9, D=[1e10, 2e9], U=[5e9, 2e9], target="fr")
"""

from atlas.scaling import simulation
from atlas.scaling.estimates import Z90, Estimate, finite
from atlas.scaling.holdout import heldout
from atlas.scaling.joint import influence
from atlas.scaling.joint.draws import joint_draws
from atlas.scaling.joint.fit import fit_joint
from atlas.scaling.joint.fitted import SUPPORTED, JointFit
from atlas.scaling.joint.prior import LAMBDA_KINDS, MIXINGS, TAU_PRIORS, Hyperprior
from atlas.scaling.law import FLOPS_PER_PARAMETER_TOKEN, JointLaw
from atlas.scaling.planning import answers
from atlas.scaling.planning.documents import fit_document, parameter_tables
from atlas.scaling.planning.expansion import PUBLISHED_EXPONENTS, expansion_table, iso_loss
from atlas.scaling.planning.mixtures import MixturePlan, plan_mixture
from atlas.scaling.single.bootstrap import bootstrap
from atlas.scaling.single.comparison import compare
from atlas.scaling.single.fit import OBJECTIVES, RESIDUALS, fit
from atlas.scaling.single.fitted import Fit
from atlas.scaling.single.library import LAWS, law_named
from atlas.scaling.single.specification import Column, Law, Parameter
from atlas.scaling.table import published
from atlas.scaling.table.labels import labels
from atlas.scaling.table.reading import read_runs
from atlas.scaling.table.runs import COOLDOWN, Runs, load_runs
from atlas.scaling.table.splits import SPLITS
from atlas.scaling.transfer.capacity import CapacityExponents, CapacityFit, fit_capacity
from atlas.scaling.transfer.relatedness import asymmetric_pairs, label_effect
from atlas.scaling.transfer.scores import bilingual_transfer_scores, latest_scores, score_from_tau

__all__ = [
    "COOLDOWN",
    "FLOPS_PER_PARAMETER_TOKEN",
    "LAMBDA_KINDS",
    "LAWS",
    "MIXINGS",
    "OBJECTIVES",
    "PUBLISHED_EXPONENTS",
    "RESIDUALS",
    "SPLITS",
    "SUPPORTED",
    "TAU_PRIORS",
    "Z90",
    "CapacityExponents",
    "CapacityFit",
    "Column",
    "Estimate",
    "Fit",
    "Hyperprior",
    "JointFit",
    "JointLaw",
    "Law",
    "MixturePlan",
    "Parameter",
    "Runs",
    "answers",
    "asymmetric_pairs",
    "bilingual_transfer_scores",
    "bootstrap",
    "compare",
    "expansion_table",
    "finite",
    "fit",
    "fit_capacity",
    "fit_document",
    "fit_joint",
    "heldout",
    "influence",
    "iso_loss",
    "joint_draws",
    "label_effect",
    "labels",
    "latest_scores",
    "law_named",
    "load_runs",
    "parameter_tables",
    "plan_mixture",
    "published",
    "read_runs",
    "score_from_tau",
    "simulation",
]
