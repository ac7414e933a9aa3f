"""Fits of Chinchilla's law to 240 runs, and resamples of them, against SciPy.

The peer is what a careful user of SciPy would write: the same objective with its gradient by hand, log N and log D
centred, L-BFGS-B from the two best points of the same grid; a resample starts at the optimum of all runs, in
coordinates whitened there. The notebooks in circulation take a thousand times longer for want of scaling, not of a
compiler.
"""

import functools
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np
import scipy

from atlas.scaling import Runs, bootstrap, fit, load_runs, simulation
from experiments.benchmarks.timing import seconds

_RUNS = 240  # as many as Hoffmann et al.'s
_ROUNDS = 20
_COLD_ROUNDS = 3
_COLD_RUNS = 81  # of the table that a person fits from a shell, waiting for it
_RESAMPLES, _PEER_RESAMPLES = 4000, 200
_DELTA = 1e-3
_EXPONENTS = np.geomspace(0.05, 1.6, 12)


def run() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows with the columns task, path, seconds, cpu_seconds (a fit, 4,000 resamples, or a process that fits 81 runs
    from a shell), compile_seconds (of the first call), objective, ratio (CPU time of the peer over that of the path).

    Returns:
      The rows, and what was fitted.
    """
    runs = load_runs(simulation.series(_RUNS, 0))
    _, compile_fit = seconds(lambda: fit("chinchilla", runs))
    law = fit("chinchilla", runs)
    _, compile_bootstrap = seconds(lambda: bootstrap(law, 64))
    once, again = seconds(lambda: fit("chinchilla", runs), _ROUNDS), seconds(lambda: bootstrap(law, _RESAMPLES))
    rows = [
        _row("fit", "atlas", once, compile_fit, law.objective),
        _row("4000 resamples", "atlas", again, compile_bootstrap),
        *_from_a_shell(),
    ]
    facts = {"rows": len(runs), "objective": f"sum of huber(log residual), delta {_DELTA}"}
    peer = _Peer(runs)
    resampling = [time * _RESAMPLES / _PEER_RESAMPLES for time in seconds(peer.resample)]
    theirs = {
        "fit": _row("fit", "scipy", seconds(peer.fit, _ROUNDS), objective=peer.fit()[1]),
        "4000 resamples": _row("4000 resamples", "scipy", resampling),
    }
    rows += theirs.values()
    for row in rows:
        row["ratio"] = theirs[row["task"]]["cpu_seconds"] / row["cpu_seconds"] if row["task"] in theirs else None
    return rows, facts | {"peer": f"SciPy {scipy.__version__}, of whose resamples {_PEER_RESAMPLES} were timed"}


def _from_a_shell() -> list[dict[str, Any]]:
    """`experiments.fit` without figures, in a first process and in later ones, which find its compiled programs."""
    with tempfile.TemporaryDirectory() as folder:
        simulation.series(_COLD_RUNS, 0).to_csv(f"{folder}/runs.csv", index=False)
        options = [f"--runs={folder}/runs.csv", "--law=chinchilla", f"--workdir={folder}", "--nofigures"]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/programs"}
        call = functools.partial(
            subprocess.run,
            [sys.executable, "-m", "experiments.fit", *options],
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return [
            _row("first process", "experiments.fit", seconds(call)),
            _row("second process", "experiments.fit", seconds(call, _COLD_ROUNDS)),
        ]


def _row(
    task: str, path: str, times: Iterable[float], compiling: float = 0.0, objective: float | None = None
) -> dict[str, Any]:
    cpu, wall = times
    known = {"task": task, "path": path, "seconds": wall, "cpu_seconds": cpu}
    return known | {"compile_seconds": compiling, "objective": objective}


class _Peer:
    """Chinchilla's law by SciPy, over x = log E, log A, α, log B, β."""

    def __init__(self, runs: Runs) -> None:
        self.loss = np.log(runs.loss)
        self.N, self.D = (np.log(values) - np.log(values).mean() for values in (runs.N, runs.total_tokens))
        self.optimum, self.axes = np.zeros(5), np.eye(5)
        self.optimum = self.fit()[0]
        # Along the new axes the least-squares curvature at the optimum is that of the objective's unit.
        total, slopes = self._law(self.optimum)
        values, vectors = np.linalg.eigh((slopes / total**2) @ slopes.T)
        self.axes = vectors * np.sqrt(_DELTA * len(self.loss) / values)

    def fit(self) -> tuple[np.ndarray, float]:
        ends = [self._descend(start, np.ones(len(self.loss))) for start in self._starts()[:2]]
        best = min(ends, key=lambda end: end.fun)
        return self.optimum + self.axes @ best.x, float(best.fun) * _DELTA * len(self.loss)

    def resample(self) -> None:
        random = np.random.RandomState(0)
        for _ in range(_PEER_RESAMPLES):
            drawn = random.choice(len(self.loss), len(self.loss))
            self._descend(np.zeros(5), np.bincount(drawn, minlength=len(self.loss)).astype(float))

    def _descend(self, start: np.ndarray, weight: np.ndarray):
        options = {"maxiter": 2000, "ftol": 1e-13, "gtol": 1e-9}
        return scipy.optimize.minimize(self._value, start, (weight,), method="L-BFGS-B", jac=True, options=options)

    def _law(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Losses [n] and their derivatives [5, n]."""
        E, A, B = np.full(len(self.N), np.exp(x[0])), np.exp(x[1] - x[2] * self.N), np.exp(x[3] - x[4] * self.D)
        return E + A + B, np.stack([E, A, -A * self.N, B, -B * self.D])

    def _value(self, z: np.ndarray, weight: np.ndarray) -> tuple[float, np.ndarray]:
        """Objective over δn, which gives the optimiser's tolerances a meaning, and its gradient."""
        total, slopes = self._law(self.optimum + self.axes @ z)
        residual, unit = self.loss - np.log(total), _DELTA * len(self.loss)
        clipped = np.clip(residual, -_DELTA, _DELTA)
        value, gradient = weight @ (clipped * (residual - 0.5 * clipped)), slopes @ (-weight * clipped / total)
        return float(value) / unit, self.axes.T @ gradient / unit

    def _starts(self) -> list[np.ndarray]:
        """Points of the grid by rising misfit, E, A and B by least squares on relative residuals."""
        found, inverse = [], np.exp(-self.loss)
        for alpha, beta in itertools.product(_EXPONENTS, repeat=2):
            design = np.stack([np.ones_like(self.N), np.exp(-alpha * self.N), np.exp(-beta * self.D)], 1)
            solved = np.linalg.lstsq(design * inverse[:, None], np.ones_like(inverse), rcond=None)[0]
            E, A, B = np.log(np.maximum(solved, 1e-3))
            found.append(np.array([E, A, alpha, B, beta]))
        return sorted(found, key=lambda x: self._value(x, np.ones_like(inverse))[0])
