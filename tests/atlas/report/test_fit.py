import dataclasses
import warnings

import numpy as np
import pandas as pd

from atlas import report
from atlas.scaling import load_runs


def test_runs_without_effective_tokens_leave_the_figures_of_a_joint_fit_whole(truth):
    known = truth(2)
    fit, frame = known.fit(), known.runs()
    law = dataclasses.replace(fit.law, tau=np.array([[1.0, -1.5], [0.1, 1.0]]))
    untrained = frame.iloc[:1].assign(language=known.languages[1], loss=9.0)
    untrained[f"tokens.{known.languages[1]}"] = 0.0
    runs = load_runs(pd.concat([frame, untrained]))
    assert (law.effective_share(*runs.aligned(fit.sources), runs.target) < 0).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # of logarithms
        drawn = report.draw_fit(dataclasses.replace(fit, law=law), runs)
    assert set(drawn) == {"observed.png", "residuals.png", "law.png"}
