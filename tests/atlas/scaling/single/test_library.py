import pkgutil

import jax
import numpy as np
import pandas as pd
import pytest

from atlas.scaling import Fit, compare, fit, heldout, law_named, load_runs
from atlas.scaling.single import library
from atlas.scaling.single.library import LAWS
from atlas.scaling.single.specification import Law
from atlas.scaling.table.curves import annealing_areas
from checked import UserError

TRUTH = {
    "chinchilla": {"E": 1.7, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37},
    "chinchilla_tied": {"E": 1.7, "A": 480.0, "alpha": 0.35, "B": 1400.0},
    "multilingual_share": {"E": 1.1, "A": 300.0, "alpha": 0.33, "B": 900.0, "beta": 0.32, "gamma": 0.12},
    "parallel": {"E": 1.7, "A": 480.0, "alpha": 0.35, "k": 0.4},
    "overfitting": {
        **{"E": 1.7, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37},
        **{"C": 0.005, "gamma": 1.2, "delta": 0.8, "eta": 2.5},
    },
    "vocabulary": {"E": -6.0, "A": 40.0, "alpha": 0.25, "B": 60.0, "beta": 0.3, "gamma": 0.1, "C": 3.0, "kappa": 0.2},
    "mixture_of_experts": {
        **{"E": 1.7, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37},
        **{"delta": 0.1, "gamma": -0.008, "omega": -0.1, "zeta": 0.006},
    },
    "optimum": {
        **{"E": 1.7, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37, "rate_cost": 0.02, "rate": 2e-3},
        **{"rate_N": -0.7, "rate_D": 0.3, "batch_cost": 0.01, "batch": 3e5, "batch_D": 0.57},
    },
    "annealing": {"E": 2.4, "A": 0.6, "alpha": 0.5, "C": 0.4},
    # As published for the law's own runs, rounded.
    "farseer": {
        **{"s": -0.021, "q": 0.169, "S": 1.2, "B": 88.0, "b": -0.1, "Q": -6.3, "A": -0.124, "a": 0.123, "E": 0.424}
    },
}


# What the runs of a law vary beside sizes and tokens.
VARIED = {
    "overfitting": {"unique_tokens": (1e8, 1e9, 1e10)},
    "parallel": {"parallel_size": (1.0, 2.0, 4.0, 8.0)},
    "vocabulary": {"vocab_size": (4e3, 1.6e4, 6.4e4)},
    "mixture_of_experts": {"experts": (1.0, 4.0, 16.0, 64.0)},
    "optimum": {"learning_rate": (2e-4, 8e-4, 3.2e-3), "batch_size": (1e5, 3e5, 1e6, 3e6)},
}


def runs_of(name: str, sigma: float = 0.0, seed: int = 0):
    """Runs of a law: 6 sizes, 8 token counts, even mixtures of 1, 2 and 4 languages where it asks for them."""
    law, random = LAWS[name], np.random.default_rng(seed)
    N, D = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 1e10, 6), np.geomspace(3e9, 1e12, 8)))
    if name == "annealing":
        step = np.arange(200, 4001, 100)
        rate = np.interp(np.arange(1, 4001), [0, 100, 3000, 4000], [0.0, 1e-3, 1e-3, 1e-4])
        S1, S2 = (area[step - 1] for area in annealing_areas(rate))
        batch, table = {"S1": S1, "S2": S2}, {"step": step, "lr_area": S1, "lr_annealed": S2, "num_params": 1e8}
        table |= {"tokens": step * 1e6, "run": "a"}
    elif name == "multilingual_share":
        K = np.resize([1.0, 2.0, 4.0], N.size)
        batch = {"N": N, "D": D, "p": 1.0 / K}
        others = {f"tokens.l{i}": np.where(i < K, D / K, 0.0) for i in range(1, 4)}
        table = {"num_params": N, "language": "l0", "tokens.l0": D / K} | others
    else:
        varied = {key: random.choice(values, 4 * N.size) for key, values in VARIED.get(name, {}).items()}
        N, D = (np.tile(values, 4 if varied else 1) for values in (N, D))
        table = {"num_params": N, "tokens": D, "row": np.arange(N.size)} | varied
        exact = load_runs(pd.DataFrame(table | {"loss": 1.0}), needs=law.needs)
        batch = {column.name: column.read(exact, "own") for column in law.columns}
    with jax.enable_x64(True):
        loss = np.asarray(law.loss(TRUTH[name], batch))
    noisy = table | {"loss": loss * np.exp(sigma * random.normal(size=loss.size))}
    return load_runs(pd.DataFrame(noisy), needs=law.needs, signed=law.residual == "raw")


@pytest.mark.parametrize(
    "name",
    [
        *("chinchilla_tied", "annealing", "parallel"),
        *(
            pytest.param(name, marks=pytest.mark.thorough)
            for name in ("multilingual_share", "vocabulary", "mixture_of_experts", "optimum", "overfitting")
        ),
    ],
)
def test_exact_data_give_each_law_back(name):
    found = fit(name, runs_of(name))
    assert found.converged, found.diagnostics
    # The law's own weak priors hold parameters a little way off.
    assert found.values == pytest.approx(TRUTH[name], rel=2e-3, abs=2e-3)
    assert found.diagnostics.are < 1e-5


def chosen(truth: str, *others: str) -> bool:
    table = compare([truth, *others], runs_of(truth, sigma=0.002))
    return table["law"][0] == truth and table["bic"][0] == 0.0


def test_the_law_that_made_the_data_is_chosen():
    assert chosen("chinchilla_tied", "chinchilla")


@pytest.mark.thorough
@pytest.mark.parametrize("laws", [("farseer", "chinchilla"), ("chinchilla", "farseer")])
def test_a_law_of_nine_parameters_is_chosen_where_it_made_the_data(laws):
    assert chosen(*laws)


MINE = """
from atlas.scaling import Column, Law, Parameter

def loss(p, x):
    return p["E"] + p["A"] * x["N"] ** -p["alpha"] * x["depth"] ** p["gain"] + p["offset"] * x["depth"]

moe = Law(
    "moe",
    "mine",
    loss,
    ["E", "A", Parameter("alpha", role="exponent"), Parameter("gain", positive=False, starts=(-0.3, 0.3)),
     Parameter("offset", positive=False)],
    ["N", Column("depth")],
)
"""


def test_a_law_of_a_users_own_file(tmp_path, monkeypatch):
    path = tmp_path / "my_laws.py"
    path.write_text(MINE)
    law = law_named(f"{path}:moe")
    assert (
        law is law_named(f"{path}:moe") and law.needs == ("num_params", "depth") and law.linear == ("E", "A", "offset")
    )
    random = np.random.default_rng(0)
    table = pd.DataFrame(
        {"num_params": np.repeat(np.geomspace(1e7, 1e9, 8), 5), "depth": random.choice([2.0, 4.0, 8.0, 16.0], 40)}
    )
    truth = {"E": 1.7, "A": 300.0, "alpha": 0.3, "gain": -0.2, "offset": -0.01}
    with jax.enable_x64(True):
        loss = np.asarray(law.loss(truth, {"N": table.num_params.to_numpy(), "depth": table.depth.to_numpy()}))
    runs = load_runs(table.assign(loss=loss), needs=law.needs)
    found = fit(f"{path}:moe", runs)
    assert found.converged and found.values == pytest.approx(truth, rel=1e-3)
    assert heldout(runs, "largest_n", f"{path}:moe")[0]["are"] < 1e-4
    assert Fit.from_json(found.to_json()).predict(N=1e10, depth=8.0)[0] == pytest.approx(
        float(found.predict(1e10, 8.0)[0])
    )
    for name, message in ((f"{path}:mo", "unknown law in"), (f"{path.with_name('x.py')}:moe", "no file")):
        with pytest.raises(UserError, match=message):
            law_named(name)
    path.with_name("broken.py").write_text("1 / 0")
    with pytest.raises(UserError, match="cannot be run: ZeroDivisionError"):
        law_named(f"{path.with_name('broken.py')}:moe")


def test_every_file_of_the_library_is_listed():
    files = {module.name for module in pkgutil.iter_modules(library.__path__)}
    assert files == {file.__name__.rpartition(".")[2] for file in library._FILES}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_specifications_are_consistent(law: Law):
    columns = {column.name for column in law.columns}
    assert law.source and len(columns) == len(law.columns)
    for parameter in law.parameters:
        if parameter.scale:
            assert parameter.scale[0] in columns and parameter.scale[1] in law.names
    assert law.starts or law.linear


def test_a_schedule_in_the_table_gives_the_areas():
    runs = runs_of("annealing")
    rate = np.interp(runs.frame["step"], [0, 100, 3000, 4000], [0.0, 1e-3, 1e-3, 1e-4])
    table = runs.frame.drop(columns=["lr_area", "lr_annealed"]).assign(learning_rate=rate)
    S1, S2 = (column.read(load_runs(table), "own") for column in LAWS["annealing"].columns)
    # The rows begin after the warm-up, which interpolation takes for constant.
    assert np.ptp(S1 - runs.frame["lr_area"]) < 1e-9
    np.testing.assert_allclose(S2, runs.frame["lr_annealed"], atol=1e-9)
    with pytest.raises(UserError, match="'step' and 'learning_rate'"):
        fit("annealing", load_runs(table.drop(columns="learning_rate")))
