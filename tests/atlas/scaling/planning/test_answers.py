import json
import pathlib
import shutil

import numpy as np
import pandas as pd
import pytest

from atlas.scaling import JointLaw, answers, fit, fit_document, fit_joint, load_runs, plan_mixture, simulation
from atlas.scaling.law import data_constrained
from atlas.scaling.planning import fit_file
from checked import UserError

TRUTH = simulation.truth(2, 0)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> str:
    """The workdir of a small study: its table, with a trunk that no law is fitted to, and its fit."""
    folder = tmp_path_factory.mktemp("study")
    plan = simulation.mixtures(2, 4, 4, 2, 0, np.random.default_rng(0))
    frame = simulation.table(TRUTH, plan, 0, checkpoints=4).assign(phase="cooldown")
    frame = pd.concat([frame, frame.assign(phase="trunk", loss=1.1 * frame["loss"])])
    frame.to_csv(folder / "runs.csv", index=False)
    joint = fit_joint(load_runs(folder / "runs.csv").comparable())
    (folder / "fit.json").write_text(json.dumps(joint.to_json(), allow_nan=False))
    return str(folder)


def rewrite(study: str, folder, **changes: object) -> str:
    """A copy of the study with another fit.json."""
    document = answers.Fitted(study).document | changes
    (folder / "fit.json").write_text(json.dumps(document))
    (folder / "runs.csv").write_text(load_runs(study + "/runs.csv").frame.to_csv(index=False))
    return str(folder)


def test_a_study_is_of_the_ends_of_its_cooldowns(study):
    assert set(answers.Fitted(study).runs().phase) == {"cooldown"}


def test_mixture_is_the_plan_of_fit_and_runs_with_bands(study):
    table, facts = answers.mixture(study, 1e21, {"l0": 1.0, "l1": 2.0}, {})
    fitted = answers.Fitted(study)
    plan = plan_mixture(fitted.joint_law(), answers.Fitted(study).runs(), 1e21, {"l0": 1.0, "l1": 2.0})
    pd.testing.assert_frame_equal(table[plan.table.columns], plan.table)
    assert (facts["params"], facts["tokens"], facts["loss"]) == (plan.params, plan.tokens, plan.loss)
    assert facts["bands"].startswith("90 %") and facts["loss_low"] < facts["loss"] < facts["loss_high"]
    assert (table.share_low <= table.share + 1e-6).all() and list(table.language) == ["l0", "l1"]


def test_mixtures_that_leave_no_effective_tokens_are_refused(study, tmp_path):
    law = answers.Fitted(study).document["joint_law"]
    against = rewrite(study, tmp_path, joint_law=law | {"tau": [[1.0, 0.2], [-0.2, 1.0]]})
    with pytest.raises(UserError, match="leaves l1 hardly an effective token"):
        answers.predict(against, 1e9, 1e11, "l1", {"l0": 1.0}, {}, {})
    table, facts = answers.predict(against, 1e9, 1e11, "", {"l0": 1.0}, {}, {})
    assert list(table.language) == ["l0"] and facts["no prediction"].startswith("l1: ")


def test_languages_that_a_mixture_lacks_are_told_by_rows_of_such_runs(tmp_path):
    table = "experiments/results/quickstart/runs.csv"
    found = fit_joint(load_runs(table).comparable())
    (tmp_path / "fit.json").write_text(json.dumps(found.to_json()))
    shutil.copy(table, tmp_path / "runs.csv")
    rows, facts = answers.predict(str(tmp_path), 2e4, 3e5, "", {"a1": 3.0, "a2": 1.0}, {}, {})
    D = 3e5 * np.array([{"a1": 0.75, "a2": 0.25}.get(name, 0.0) for name in found.sources])
    U = [load_runs(table).unique_tokens().get(name, np.inf) for name in found.sources]
    for row in rows.itertuples():
        loss, _ = found.predict(2e4, D, U, row.language)
        assert row.loss == pytest.approx(float(loss), rel=1e-6), row.language
        run = tuple(map(float, found.run_interval(2e4, D, U, row.language)))
        assert (row.run_low, row.run_high) == pytest.approx(run, rel=0.01), row.language
    lacking = set(found.targets) - {"a1", "a2"}
    assert lacking and lacking < set(rows.language)
    assert facts["not in the mixture"].split(":")[0].split(", ") == [n for n in found.targets if n in lacking]


def test_predictions_of_a_study_and_of_a_law_of_one_loss(study, tmp_path):
    table, _ = answers.predict(study, 1e9, 1e11, "", {}, {}, {})
    assert (
        list(table.language) == ["l0", "l1"]
        and (table.loss_low < table.loss).all()
        and (table.loss < table.loss_high).all()
    )
    assert (table.run_low < table.loss_low).all() and (table.loss_high < table.run_high).all()
    older, facts = answers.predict(rewrite(study, tmp_path, misfit=None), 1e9, 1e11, "", {}, {}, {})
    assert "run_low" not in older and "of runs none" in facts["bands"]
    law = answers.Fitted(study).joint_law()
    mixed, _ = answers.predict(study, 1e9, 1e11, "l1", {"l0": 1.0, "l1": 3.0}, {"l0": 1e9}, {})
    expected = law.loss(
        1e9, np.array([0.25e11, 0.75e11]), np.array([1e9, answers.Fitted(study).runs().unique_tokens()["l1"]]), 1
    )
    assert mixed.loss[0] == pytest.approx(float(expected)) and len(mixed) == 1
    for arguments in (("l7", {}, {}), ("", {"l7": 1.0}, {}), ("", {}, {"l7": 1.0})):
        with pytest.raises(UserError, match="'l7'"):
            answers.predict(study, 1e9, 1e11, *arguments, {})
    single = fit("chinchilla", load_runs(simulation.series(40, 0)))
    (tmp_path / "fit.json").write_text(json.dumps(single.to_json()))
    row = answers.predict(str(tmp_path), 1e10, 1e12, "", {}, {}, {})[0].iloc[0]
    low, high = single.interval(1e10, 1e12)
    assert (row.loss_low, row.loss_high) == pytest.approx((float(low), float(high)))
    assert row.run_low < row.loss_low < row.loss < row.loss_high < row.run_high
    with pytest.raises(UserError, match="unknown column of the chinchilla law 'X'"):
        answers.predict(str(tmp_path), 1e10, 1e12, "", {}, {}, {"X": 1.0})
    with pytest.raises(UserError, match="alpha is nan, no finite number"):
        plain = single.to_json()
        plain["parameters"]["alpha"]["value"] = float("nan")
        (tmp_path / "fit.json").write_text(json.dumps(plain))
        answers.allocate(1e21, "", str(tmp_path), "", {})


def test_laws_of_one_loss_take_what_they_read_and_no_more(tmp_path):
    (tmp_path / "laws.py").write_text(
        "from atlas.scaling import Law, Parameter\n"
        "loss = lambda p, x: p['E'] + p['A'] * x['num_params'] ** -p['alpha'] * x['depth'] ** 0.1\n"
        "deep = Law('deep', '', loss, ['E', 'A', Parameter('alpha', role='exponent')], ['num_params', 'depth'])\n"
        "loss = lambda p, x: p['E'] + p['A'] * x['N'] ** -p['alpha'] + 2 * p['B'] * x['D'] ** -p['beta']\n"
        "exponents = [Parameter(name, role='exponent') for name in ('alpha', 'beta')]\n"
        "twice = Law('twice', '', loss, ['E', 'A', 'B', *exponents], ['N', 'D'])\n"
    )
    frame = pd.DataFrame({"num_params": np.geomspace(1e6, 1e9, 12), "depth": [2.0, 8.0] * 6, "language": "fr"})
    frame = frame.assign(tokens=frame.num_params * np.tile([20.0, 30.0, 60.0], 4))
    frame["loss"] = 1 + 50 * frame.num_params**-0.3 * frame.depth**0.1 + 300 * frame.tokens**-0.4
    fits = {}
    for name in ("deep", "twice"):
        found = fit(f"{tmp_path}/laws.py:{name}", load_runs(frame))
        fits[name] = str(tmp_path / f"{name}.json")
        pathlib.Path(fits[name]).write_text(json.dumps(found.to_json()))
    table, facts = answers.predict(fits["deep"], 1e8, 1e10, "fr", {}, {}, {"depth": 4.0})
    assert table.loss[0] > 1 and facts["not in the law"] == "tokens" and "tokens" not in table
    assert answers.predict(fits["deep"], 1e8, None, "", {}, {}, {"depth": 4.0})[0].loss[0] == table.loss[0]
    for name, arguments, message in (
        ("deep", (None, None, "", {}, {}, {"depth": 4.0}), "needs num_params to predict"),
        ("twice", (1e8, 1e10, "de", {}, {}, {}), "unknown language of this fit 'de'; .*fr"),
        ("twice", (1e8, 1e10, "", {"fr": 1.0}, {}, {}), "drop --mixture"),
        ("twice", (1e8, 1e10, "", {}, {"fr": 1e9}, {}), "takes no number of unique tokens"),
    ):
        with pytest.raises(UserError, match=message):
            answers.predict(fits[name], *arguments)
    with pytest.raises(UserError, match="twice law is another; use predict"):
        answers.allocate(1e20, "", fits["twice"], "", {})


def test_names_are_checked_before_anything_is_fitted(study, monkeypatch):
    monkeypatch.setattr(fit_file, "refitted", None)
    monkeypatch.setattr(answers, "fit_again", None)
    for call in (
        lambda: answers.mixture(study, 1e21, {}, {"l7": 1.0}),
        lambda: answers.mixture(study, 1e21, {"l7": 1.0}, {}),
        lambda: answers.further_runs(study, "l0", 1e9, 1e11, {"l7": 1.0}, {}, None, 2),
        lambda: answers.further_runs(study, "l7", 1e9, 1e11, {}, {}, None, 2),
        lambda: answers.allocate(1e21, "l0", study, "", {"l7": 1.0}),
    ):
        with pytest.raises(UserError, match="l7"):
            call()


def test_bands_are_missing_where_the_fit_is_of_other_rows(study, tmp_path):
    table, facts = answers.mixture(rewrite(study, tmp_path, n_rows=3), 1e21, {}, {})
    assert facts["bands"].startswith("none: fit.json is of the atlas law and 3 rows") and "loss_low" not in facts
    assert table.share.sum() == pytest.approx(1)


def test_allocate_by_the_law_of_one_of_the_languages(study):
    table, facts = answers.allocate(1e21, "l1", study, "", {"l1": 1e9})
    row = table.iloc[0]
    assert 6 * row.params * row.tokens == pytest.approx(1e21) and row.epochs > 1
    assert row.params_low < row.params < row.params_high and facts["source"] == study
    assert facts["train"].startswith("--config.mixture=l1, with about ")
    with pytest.raises(UserError, match="give --language, one of l0, l1"):
        answers.allocate(1e21, "", study, "", {})


def test_allocate_refuses_a_law_without_an_optimum_and_names_what_is_open(study, tmp_path):
    document = answers.Fitted(study).document
    flat = rewrite(study, tmp_path, joint_law=document["joint_law"] | {"alpha": [1e-7, 0.3], "beta": [1e-8, 0.3]})
    with pytest.raises(UserError, match=r"optimum beyond all numbers \(alpha = 1e-07"):
        answers.allocate(1e21, "l0", flat, "", {})
    estimates = document["parameters"]
    estimates["alpha[l0]"]["identified"] = estimates["beta[l1]"]["identified"] = False
    vague = rewrite(study, tmp_path, parameters=estimates)
    once, again = (answers.allocate(1e21, "l0", vague, "", unique) for unique in ({"l0": 1e15}, {}))
    assert once[1]["not identified"] == "alpha[l0]" and once[0].epochs[0] < 1
    assert again[1]["not identified"] == "alpha[l0], lambda[l0]" and again[0].epochs[0] > 1


def test_allocate_has_bands_where_the_fit_has_a_covariance(tmp_path):
    values = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}
    matrix = np.zeros((5, 5))
    matrix[1, 1] = 0.05**2
    covariance = {"coordinates": [f"log {name}" for name in values], "matrix": matrix.tolist()}
    covariance |= {"centre": {"N": 1e9, "D": 1e11}, "freedom": 1e6}
    parameters = {name: {"value": value} for name, value in values.items()}
    document = {"law": "chinchilla", "parameters": parameters, "covariance": covariance}
    (tmp_path / "fit.json").write_text(json.dumps(document))
    table, facts = answers.allocate(1e21, "", str(tmp_path), "", {})
    row = table.iloc[0]
    # log N* = log A / (alpha + beta) + …, and A alone is uncertain.
    assert row.params_high / row.params_low == pytest.approx(np.exp(2 * 1.645 * 0.05 / 0.72), rel=0.05)
    assert row.tokens_low < row.tokens < row.tokens_high and row.loss_low < row.loss < row.loss_high
    assert 0 < row.regret_high < 1e-3 and "over 1000 laws" in facts["bands"]
    with pytest.raises(UserError, match="is no law of all languages"):
        answers.mixture(str(tmp_path), 1e21, {}, {})


def test_plans_of_a_joint_fit_have_the_unique_tokens_of_its_runs(study, tmp_path):
    known = answers.Fitted(study).runs().unique_tokens()
    table, facts = answers.allocate(1e22, "l1", study, "", {})
    assert table.epochs[0] > 1 and facts["unique tokens"] == f"{known['l1']:.4g}, as in the runs"
    pd.testing.assert_frame_equal(table, answers.allocate(1e22, "l1", study, "", {"l1": known["l1"]})[0])
    assert "unique tokens" not in answers.predict(study, 1e9, 1e11, "", {}, {}, {})[1]
    shutil.copy(f"{study}/fit.json", tmp_path)
    table, facts = answers.allocate(1e22, "l1", str(tmp_path), "", {})
    assert table.epochs[0] == 0 and facts["unique tokens"].startswith("taken as unlimited for l1: ")
    assert "runs.csv" in facts["unique tokens"] and facts["unique tokens"].endswith("--unique=l1:TOKENS gives them")


def test_unique_tokens_that_the_runs_do_not_state_are_said_to_be_unlimited(study, tmp_path, monkeypatch):
    monkeypatch.setattr(answers.Fitted, "refitted", lambda self: (None, "none"))
    shutil.copy(f"{study}/fit.json", tmp_path)
    frame = pd.read_csv(f"{study}/runs.csv").drop(columns="unique_tokens.l1")
    frame.to_csv(tmp_path / "runs.csv", index=False)
    both = {"l0": 1.0, "l1": 1.0}
    for _, facts in (
        answers.allocate(1e21, "l1", str(tmp_path), "", {}),
        answers.predict(str(tmp_path), 1e9, 1e11, "l0", both, {}, {}),
        answers.mixture(str(tmp_path), 1e21, {}, {}),
        answers.further_runs(str(tmp_path), "l0", 1e9, 1e11, both, {}, None, 1),
    ):
        assert facts["unique tokens"].startswith("taken as unlimited for l1: the runs do not state them")
    assert "unique tokens" not in answers.predict(str(tmp_path), 1e9, 1e11, "l0", {}, {}, {})[1]
    assert "unique tokens" not in answers.predict(str(tmp_path), 1e9, 1e11, "l0", both, {"l1": 1e9}, {})[1]


def test_plans_of_a_law_of_one_language_have_the_unique_tokens_of_its_runs(tmp_path):
    N, D = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 1e10, 5), np.geomspace(1e9, 3e11, 6)))
    frame = pd.DataFrame({"num_params": N, "tokens": D, "unique_tokens": 1e10, "language": "fr"})
    frame["loss"] = data_constrained(N, D, 1e10, 1.7, 480.0, 0.35, 2100.0, 0.37, 15.0, 5.0)
    fits = {name: str(tmp_path / f"{name}.json") for name in ("chinchilla", "data_constrained", "older")}
    for law in ("chinchilla", "data_constrained"):
        pathlib.Path(fits[law]).write_text(json.dumps(fit_document(load_runs(frame), law, {})[0]))
    document = json.loads(pathlib.Path(fits["data_constrained"]).read_text())
    assert document.pop("unique_tokens") == {"fr": 1e10}
    pathlib.Path(fits["older"]).write_text(json.dumps(document))

    def predicted(name, unique):
        table, facts = answers.predict(fits[name], 1e9, 1e11, "", {}, unique, {})
        return table.loss[0], facts.get("unique tokens", "")

    loss, said = predicted("data_constrained", {})
    assert said == "1e+10, as in the runs" and predicted("data_constrained", {"fr": 1e10}) == (loss, "")
    more, said = predicted("older", {})
    assert more < loss and said.startswith("taken as unlimited for fr: the fit does not tell them; fit the runs again")
    assert predicted("data_constrained", {"fr": 1e12})[0] == pytest.approx(more)
    assert predicted("chinchilla", {})[1] == ""
    # Below one epoch the law is one that allocate knows, and beyond it another.
    table, facts = answers.allocate(1e19, "fr", fits["data_constrained"], "", {})
    assert 0 < table.epochs[0] < 1 and facts["unique tokens"] == "1e+10, as in the runs"
    assert answers.allocate(1e22, "fr", fits["data_constrained"], "", {"fr": 1e13})[0].epochs[0] < 1
    with pytest.raises(UserError, match=r"where it repeats 1e\+10 tokens .*, or give more by --unique"):
        answers.allocate(1e22, "", fits["data_constrained"], "", {})
    table, facts = answers.allocate(1e22, "", fits["older"], "", {})
    assert table.epochs[0] == 0 and facts["unique tokens"].startswith("taken as unlimited for fr: ")
    assert "unique tokens" not in answers.allocate(1e22, "", fits["chinchilla"], "", {})[1]


def test_a_law_of_one_language_plans_no_other(tmp_path):
    rows = load_runs(simulation.series(40, 0)).frame.assign(language="fr")
    (tmp_path / "fit.json").write_text(json.dumps(fit("chinchilla", load_runs(rows)).to_json()))
    _, facts = answers.allocate(1e21, "fr", str(tmp_path), "", {})
    assert facts["train"].startswith("--config.mixture=fr, with about ")
    for call in (
        lambda: answers.allocate(1e21, "sw", str(tmp_path), "", {}),
        lambda: answers.predict(str(tmp_path), 1e9, 1e11, "sw", {}, {}, {}),
    ):
        with pytest.raises(UserError, match="unknown language of this fit 'sw'; valid: fr"):
            call()


def test_further_runs_of_a_study(study):
    table, facts = answers.further_runs(study, "l0", 1e10, 4e11, {}, {}, 1e22, 2)
    assert 1 <= len(table) <= 2 and table.flops.sum() <= facts["budget"] == 1e22
    assert table.deviation.iloc[-1] < facts["deviation_before"]


def test_crossover_from_runs(tmp_path):
    tokens = np.geomspace(1e9, 1e12, 20)
    columns = {"num_params": 2e9, "language": "es", "tokens.es": tokens}
    parts = [
        pd.DataFrame(columns | {"run": name, "initialize": parent, "loss": 0.8 + 0.5 * (tokens / 4e10) ** slope})
        for name, parent, slope in (("scratch", "", -0.3), ("continued", "unimax", -0.1))
    ]
    pd.concat(parts).to_csv(tmp_path / "runs.csv", index=False)
    table, _ = answers.crossover(None, "es", str(tmp_path / "runs.csv"))
    row = table.iloc[0]
    assert row.tokens == pytest.approx(4e10, rel=0.02) and row.low <= row.tokens <= row.high
    with pytest.raises(UserError, match="unknown language of this answer 'fr'"):
        answers.crossover(None, "fr", str(tmp_path / "runs.csv"))


def test_transfer_of_a_published_language_and_of_a_fit(tmp_path):
    table, facts = answers.transfer("es")
    best = table.iloc[0]
    assert (best.source, best.score, best.measured) == ("pt", 0.5, True)
    assert len(table) == 37 and table.measured.sum() == 8
    assert 0.4 < facts["skill_centred_r2"] < facts["skill_r2"]
    names = tuple("abcd")
    tau = np.where(np.eye(4), 1.0, np.random.default_rng(0).normal(0.3, 0.1, (4, 4)))
    law = JointLaw(names, names, *[np.ones(4)] * 5, np.ones((4, 1)), tau, np.float64(0.0))
    parameters = {
        name: {"value": float(value), "identified": name != "tau[a<-b]"} for name, value in law.named().items()
    }
    (tmp_path / "fit.json").write_text(json.dumps({"parameters": parameters, "joint_law": law.to_json()}))
    table, _ = answers.transfer("a", str(tmp_path))
    told = table.set_index("source")
    assert not told.measured["b"] and told.measured[["c", "d"]].all() and told.score["c"] == pytest.approx(tau[0, 2])


def test_expansion_by_a_fit(tmp_path):
    values = {"alpha": 0.4, "beta": 0.3, "phi": 0.2, "psi": 0.0}
    path = tmp_path / "capacity.json"
    path.write_text(json.dumps({"parameters": {name: {"value": value} for name, value in values.items()}}))
    table, facts = answers.expand([4.0], str(path))
    assert table.params[0] == pytest.approx(4**0.5) and facts["source"] == str(path)
    assert answers.expand([4.0], str(tmp_path))[0].equals(table)
    path.write_text(json.dumps({"parameters": {"alpha": {"value": 0.4}}}))
    with pytest.raises(UserError, match="no fit of the capacity law: it lacks 'beta'"):
        answers.expand([4.0], str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no fit at"),
        ("{", "is no fit: Expecting"),
        ("[1, 2]", "no JSON object"),
        ('{"parameters": 3}', "no 'parameters'"),
        ('{"parameters": {}, "joint_law": {"targets": ["a"]}}', "no law of all languages: 'E'"),
    ],
)
def test_files_that_a_person_edited_are_one_line(tmp_path, content, message):
    if content is not None:
        (tmp_path / "fit.json").write_text(content)
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        answers.mixture(str(tmp_path), 1e21, {}, {})
    assert message in str(error.value) and "again" in str(error.value) and "fit.json" in str(error.value)


@pytest.fixture(scope="module")
def single():
    """A fit of one law."""
    return fit("chinchilla", load_runs(simulation.series(40, 0)))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((("parameters", "alpha"), value) for value in (None, 3, {})),
        (("parameters", "alpha", "value"), "0.3"),
        *((("covariance",), value) for value in ("abc", 3)),
        *((("covariance", "matrix"), value) for value in (None, 3, [], [[1.0]])),
        *((("covariance", "freedom"), value) for value in (None, "many", 0.5)),
        *((("covariance", "centre"), value) for value in (None, [1.0])),
        (("diagnostics", "sigma"), "loud"),
        *((("law",), value) for value in (None, 3, "chinchila")),
        *((("unique_tokens",), value) for value in (None, [1.0], {"all": -1.0}, {"all": "many"})),
        (("reading",), [1.0]),
        (("warnings",), "none"),
    ],
)
def test_what_a_person_made_of_a_fit_is_one_line(tmp_path, place, value, single):
    plain = json.loads(json.dumps(single.to_json()))
    inner = plain
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    (tmp_path / "fit.json").write_text(json.dumps(plain))
    calls = {"predict": lambda: answers.predict(str(tmp_path), 1e9, 1e11, "", {}, {}, {})}
    calls["allocate"] = lambda: answers.allocate(1e21, "", str(tmp_path), "", {})
    calls.pop({"diagnostics": "allocate", "centre": "predict"}.get(place[-1] if "centre" in place else place[0]), None)
    for call in calls.values():
        with pytest.raises(UserError, match=r"^[^\n]+$"):
            call()


def test_every_answer_from_a_fit_that_did_not_converge_says_so_first(study, tmp_path):
    folder = rewrite(study, tmp_path, converged=False, warnings=["the fit did not settle; add runs"])
    capacity = {"parameters": {n: {"value": 0.3} for n in ("alpha", "beta", "phi", "psi")}, "converged": False}
    (tmp_path / "capacity.json").write_text(json.dumps(capacity))
    found = [
        answers.expand([2.0], folder),
        answers.allocate(1e21, "l0", folder, "", {}),
        answers.mixture(folder, 1e21, {}, {}),
    ]
    for _, facts in found:
        assert next(iter(facts)) == "do not trust this" and "did not converge" in facts["do not trust this"]
    assert "add runs" in found[1][1]["do not trust this"]
    assert not answers.Fitted(study).caution
