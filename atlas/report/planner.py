"""Planning in the page itself: sliders for N, D and shares over the fit's own draws of the law, in plain JavaScript."""

import json
import pathlib

import numpy as np

from atlas.scaling import SUPPORTED, JointLaw, Runs

_SCRIPT = (pathlib.Path(__file__).parent / "planner.js").read_text()
_DIGITS = 10  # of a number in the page: what it predicts then agrees with `plan predict` to 1e-6
_REACH = 64  # how far beyond the largest runs the sliders go, in N and in D
_ARRAYS = ("E", "A", "alpha", "B", "beta", "lam", "tau", "phi", "eta")


def planner(law: JointLaw, runs: Runs, draws: JointLaw | None, noise: float) -> str:
    """HTML of the planner: what the law predicts of a run, by language, with 90 % bands.

    It computes `JointLaw.loss`, and with `joint_draws` agrees with `plan predict`.

    Args:
      law: a fitted one.
      runs: that it was fitted to; their unique tokens and ranges are the planner's.
      draws: of the law, for the bands; without them there are none.
      noise: of a new run around the law, as `JointFit.run_noise` has it.
    """
    U, largest = runs.unique_tokens(), (float(runs.N.max()), float(runs.total_tokens.max()))
    document = {
        "targets": law.targets,
        "sources": law.sources,
        "law": _numbers(law),
        "draws": None if draws is None else _numbers(draws),
        "noise": noise,
        "least": (SUPPORTED * law.supported_share(*runs.aligned(law.sources))).tolist(),
        "unique": [None if np.isinf(U.get(name, np.inf)) else U[name] for name in law.sources],
        "N": [float(runs.N.min()), largest[0], largest[0] * _REACH],
        "D": [float(runs.total_tokens.min()), largest[1], largest[1] * _REACH],
        "unit": runs.loss_unit.replace("_", " ") or "loss",
    }
    # Inside a script only "</" could end it.
    data = json.dumps(document, separators=(",", ":")).replace("</", "<\\/")
    return (
        '<div id="planner"></div><noscript>The planner needs JavaScript; plan predict says the same.</noscript>'
        f'<script type="application/json" id="plan">{data}</script><script>{_SCRIPT}</script>'
    )


def _numbers(law: JointLaw) -> dict[str, object]:
    """The arrays of a law or of draws of it, rounded."""

    def rounded(values: object) -> object:
        return [rounded(v) for v in values] if isinstance(values, list) else float(f"{values:.{_DIGITS}g}")

    return {name: rounded(np.asarray(array).tolist()) for name in _ARRAYS if (array := getattr(law, name)) is not None}
