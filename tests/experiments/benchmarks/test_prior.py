import dataclasses

import pytest

from atlas.scaling import Hyperprior
from experiments.benchmarks import prior, recovery


@pytest.mark.thorough
def test_every_number_is_halved_and_doubled(monkeypatch):
    monkeypatch.setitem(recovery.STUDY_KINDS, prior._STUDY, recovery.Study((2, 1, 2, 2), languages=3))
    rows, facts = prior.run("")
    names = [field.name for field in dataclasses.fields(Hyperprior)]
    assert [(row["number"], row["factor"]) for row in rows] == [(name, f) for name in names for f in (0.5, 2.0)]
    by = {(row["number"], row["factor"]): row for row in rows}
    assert by["flat_sd", 2.0]["tau"] == 0.0  # of a prior that this fit does not have
    # What the τ are drawn to moves them; between them a wider spread lets them go further apart.
    assert by["transfer_spread", 0.5]["tau"] > 1e-3 and by["transfer", 2.0]["tau_largest"] > 1e-4
    assert all(row["tau_largest"] >= row["tau"] for row in rows) and facts["tau_se"] > 0
