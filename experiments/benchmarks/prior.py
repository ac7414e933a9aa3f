"""How far the numbers of the joint fit's prior decide its answers: τ and φ when each is halved and doubled."""

import dataclasses
from typing import Any

import numpy as np
from tqdm import tqdm

from atlas.scaling import Hyperprior, fit_joint, labels, load_runs
from experiments.benchmarks import recovery

_STUDY = "S80 rho 0.3"  # of the recovery suite: few enough runs that the prior has a say
_FACTORS = (0.5, 2.0)


def run(table: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row per number and factor; shifts are in standard errors of the fit with the prior as it is.

    Columns: number, value, factor, tau (root mean square shift over pairs), tau_largest, phi, and settled.

    Args:
      table: runs table to fit; "" is a simulated study, whose true families are known.
    """
    if table:
        runs = load_runs(table).comparable()
        options = labels(runs.languages)
    else:
        truth, frame = recovery.simulate(recovery.STUDY_KINDS[_STUDY], seed=0)
        runs, options = load_runs(frame), {"families": truth.families}
    usual, rows = fit_joint(runs, **options), []
    se, pairs = usual.estimates["se"], ~np.eye(len(usual.targets), len(usual.sources), dtype=bool)
    for name, value in tqdm(dataclasses.asdict(Hyperprior()).items(), desc="numbers of the prior", leave=False):
        for factor in _FACTORS:
            moved = fit_joint(runs, hyperprior=Hyperprior(**{name: factor * value}), **options)
            tau = (moved.law.tau - usual.law.tau)[pairs] / se.tau[pairs]
            shift = {
                "tau": float(np.sqrt(np.mean(tau**2))),
                "tau_largest": float(np.abs(tau).max()),
                "phi": float((moved.law.phi - usual.law.phi) / se.phi),
                "settled": moved.converged,
            }
            rows.append({"number": name, "value": value, "factor": factor} | shift)
    facts = {"study": table or _STUDY, "phi": float(usual.law.phi), "converged": usual.converged}
    return rows, facts | {"tau_se": float(np.median(se.tau[pairs]))}
