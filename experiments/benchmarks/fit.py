"""Fits of Chinchilla's law to 240 runs, and resamples of them, against SciPy.

The peer is what a careful user of SciPy would write: the same objective with its gradient by hand, log N and log D
centred, L-BFGS-B from the two best points of the same grid; a resample starts at the optimum of all runs, in
coordinates whitened there. The notebooks in circulation take a thousand times longer for want of scaling, not of a
compiler.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from atlas.scaling import Runs, bootstrap, fit, load_runs, simulation
from experiments.benchmarks.timing import seconds

_RUNS = 240  # as many as Hoffmann et al.'s
_ROUNDS = 20
_COLD_ROUNDS = 3
# What a person waits for who opens a shell and fits one law.
_COLD = f"""
import sys
from atlas.scaling import fit, load_runs, simulation
fit("chinchilla", load_runs(sys.argv[1] if len(sys.argv) > 1 else simulation.series({_RUNS}, 0)))
"""
_RESAMPLES, _PEER_RESAMPLES = 4000, 200
_DELTA = 1e-3
_EXPONENTS = np.geomspace(0.05, 1.6, 12)


def run(table: str = "") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows with the columns task, path, seconds, cpu_seconds (a fit, 4,000 resamples, or a process that imports and
    fits once), compile_seconds (of the first call), objective, ratio (CPU time of the peer over that of the path).

    Args:
      table: a runs table of about 240 rows; by default 240 simulated runs of the published law.

    Returns:
      The rows (SciPy's are left out where it is not installed), and what was fitted.
    """
    runs = load_runs(table or simulation.series(_RUNS, 0))
    _, compile_fit = seconds(lambda: fit("chinchilla", runs))
    law = fit("chinchilla", runs)
    _, compile_bootstrap = seconds(lambda: bootstrap(law, 64))
    rows = [
        _row("fit", "atlas", lambda: fit("chinchilla", runs), _ROUNDS, compiling=compile_fit, objective=law.objective),
        _row("4000 resamples", "atlas", lambda: bootstrap(law, _RESAMPLES), compiling=compile_bootstrap),
        _row("cold start", "atlas", lambda: _start_cold([table] if table else []), _COLD_ROUNDS),
    ]
    try:
        import scipy.optimize
    except ImportError:
        return rows, _facts(runs, "none: SciPy is not installed")
    peer = _Peer(runs, scipy.optimize.minimize)
    rows += [
        _row("fit", "scipy", peer.fit, _ROUNDS, objective=peer.fit()[1]),
        _row("4000 resamples", "scipy", peer.resample, scale=_RESAMPLES / _PEER_RESAMPLES),
    ]
    theirs = {row["task"]: row["cpu_seconds"] for row in rows if row["path"] == "scipy"}
    for row in rows:
        row["ratio"] = theirs[row["task"]] / row["cpu_seconds"] if row["task"] in theirs else None
    return rows, _facts(runs, f"SciPy {scipy.__version__}, of whose resamples {_PEER_RESAMPLES} were timed")


def _facts(runs: Runs, peer: str) -> dict[str, Any]:
    return {"rows": len(runs), "objective": f"sum of huber(log residual), delta {_DELTA}", "peer": peer}


def _start_cold(arguments: list[str]) -> None:
    """A fresh process without a cache of compiled programs."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    subprocess.run([sys.executable, "-c", _COLD, *arguments], env=environment, check=True)


def _row(
    task: str,
    path: str,
    function: Callable[[], Any],
    rounds: int = 1,
    *,
    scale: float = 1.0,
    compiling: float = 0.0,
    objective: float | None = None,
) -> dict[str, Any]:
    """Medians over the rounds, times `scale`."""
    cpu, wall = (scale * np.median([seconds(function) for _ in range(rounds)], 0)).tolist()
    known = {"task": task, "path": path, "seconds": wall, "cpu_seconds": cpu}
    return known | {"compile_seconds": compiling, "objective": objective}


class _Peer:
    """Chinchilla's law by SciPy."""

    def __init__(self, runs: Runs, minimize: Callable[..., Any]) -> None:
        self.minimize, self.loss = minimize, np.log(runs.loss)
        self.N, self.D = (np.log(values) - np.log(values).mean() for values in (runs.N, runs.total_tokens))
        self.optimum = np.zeros(5)
        self.axes = np.eye(5)
        self.optimum = self.fit()[0]
        self.axes = self._whiten()

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
        return self.minimize(self._value, start, (weight,), method="L-BFGS-B", jac=True, options=options)

    def _whiten(self) -> np.ndarray:
        """Axes along which the least-squares curvature at the optimum is that of the objective's unit."""
        x = self.optimum
        terms = np.exp(x[0]), np.exp(x[1] - x[2] * self.N), np.exp(x[3] - x[4] * self.D)
        columns = np.stack([np.full_like(self.N, terms[0]), terms[1], -terms[1] * self.N, terms[2], -terms[2] * self.D])
        values, vectors = np.linalg.eigh((columns / sum(terms) ** 2) @ columns.T)
        return vectors * np.sqrt(_DELTA * len(self.loss) / values)

    def _value(self, z: np.ndarray, weight: np.ndarray) -> tuple[float, np.ndarray]:
        """Objective over δn, which gives the optimiser's tolerances a meaning, and its gradient."""
        x = self.optimum + self.axes @ z
        E, A, B = np.exp(x[0]), np.exp(x[1] - x[2] * self.N), np.exp(x[3] - x[4] * self.D)
        total = E + A + B
        residual = self.loss - np.log(total)
        size = np.abs(residual)
        value = np.where(size <= _DELTA, 0.5 * residual**2, _DELTA * (size - 0.5 * _DELTA))
        slope = -weight * np.clip(residual, -_DELTA, _DELTA) / total
        gradient = np.array([slope.sum() * E, slope @ A, -slope @ (A * self.N), slope @ B, -slope @ (B * self.D)])
        unit = _DELTA * len(self.loss)
        return float(weight @ value) / unit, self.axes.T @ gradient / unit

    def _starts(self) -> list[np.ndarray]:
        """Points of the grid by rising misfit, E, A and B by least squares on relative residuals."""
        found, inverse = [], np.exp(-self.loss)
        for alpha in _EXPONENTS:
            for beta in _EXPONENTS:
                design = np.stack([np.ones_like(self.N), np.exp(-alpha * self.N), np.exp(-beta * self.D)], 1)
                solved = np.linalg.lstsq(design * inverse[:, None], np.ones_like(inverse), rcond=None)[0]
                E, A, B = np.log(np.maximum(solved, 1e-3))
                x = np.array([E, A, alpha, B, beta])
                found.append((self._value(x, np.ones_like(inverse))[0], len(found), x))
        return [x for _, _, x in sorted(found)]
