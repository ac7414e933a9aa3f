import sys

import pytest

from checked import UserError
from experiments.benchmarks import train


def test_the_peer_has_our_parameters_and_trains_as_we_do():
    pytest.importorskip("torch")
    peer, ours = train.compare((16, 1), kinds=("dense",), rounds=2)
    assert (peer["path"], ours["path"], peer["ratio"]) == ("torch", "dense", 1.0)
    assert peer["params"] == ours["params"]
    assert ours["loss_gap"] < 1e-5
    assert ours["low"] <= ours["ratio"] <= ours["high"]


def test_without_torch_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "experiments.benchmarks.torch_decoder", None)
    with pytest.raises(UserError, match=r"needs torch: pip install -e '\.\[peers\]'"):
        train.run()
