import pytest

from atlas.training import RunConfig, Study, align, chain, cross, each, run_id
from checked import UserError

SEEDS = each("seed", range(2))
SIZES = [{"name": "small", "model.layers": 1}, {"name": "large", "model.layers": 2}]


def test_combinators():
    assert cross(SEEDS, each("mixture", "ab")) == [
        {"seed": 0, "mixture": "a"},
        {"seed": 0, "mixture": "b"},
        {"seed": 1, "mixture": "a"},
        {"seed": 1, "mixture": "b"},
    ]
    assert align(SEEDS, each("mixture", "ab")) == [{"seed": 0, "mixture": "a"}, {"seed": 1, "mixture": "b"}]
    assert chain(SEEDS, SEEDS[:1]) == [{"seed": 0}, {"seed": 1}, {"seed": 0}]
    assert [overlay["name"] for overlay in cross([{"name": "all"}], SIZES, SEEDS)] == [
        "all-small",
        "all-small",
        "all-large",
        "all-large",
    ]
    with pytest.raises(ValueError, match="zip"):
        align(SEEDS, each("mixture", "abc"))
    with pytest.raises(UserError, match="two parts of a sweep set seed"):
        cross(SEEDS, SEEDS)


def test_a_run_whose_settings_do_not_fit_is_named():
    with pytest.raises(UserError, match=r"run large: unknown setting 'model\.layer'"):
        _ = Study("", RunConfig(), [{"name": "large", "model.layer": 1}]).plan
    with pytest.raises(UserError, match=r"run run: model\.layers=0"):
        _ = Study("", RunConfig(), [{"model.layers": 0}]).plan


def test_what_the_sweep_varies_cannot_be_set_on_its_base():
    study = Study("", RunConfig(), chain(SIZES, SEEDS, [{"data": {"seed": 2}}]))
    study.check_overrides(["model.layer", "model.heads", "train.steps"])
    with pytest.raises(UserError, match=r"^model\.layers is varied by the sweep itself, in 2 of its 5 runs"):
        study.check_overrides(["mixture", "model.layers"])
    with pytest.raises(UserError, match=r"^data\.seed is varied .* in 1 of its 5 runs"):
        study.check_overrides(["data.seed"])


def test_a_run_continues_another_by_name():
    plan = [{"name": "parent"}, {"name": "child", "initialize": "parent"}, {"name": "other", "initialize": "child"}]
    parent, child, other = Study("", RunConfig(), plan).runs
    assert (child.initialize, other.initialize) == (run_id(parent), run_id(child))
    parents = [plan[0], plan[0] | {"seed": 1}]
    *_, second, child = Study("", RunConfig(), [*parents, plan[1] | {"seed": 1}]).runs
    assert child.initialize == run_id(second)
    with pytest.raises(UserError, match="'parent' names several runs"):
        _ = Study("", RunConfig(), [*parents, plan[1] | {"seed": 2}]).runs


def test_ids_are_of_the_run_alone():
    """A run of a sweep has the id that it would have on its own, however the study is called and executed."""
    base = RunConfig(group="base")
    alone = run_id(RunConfig(seed=3))
    for study in (Study("one", base, [{"seed": 3}]), Study("other", base, [{"group": "x", "seed": 3}], population=8)):
        assert [run_id(run) for run in study.runs] == [alone]
