import collections
import importlib
import pathlib

import jax
import pytest

from atlas.training import RunConfig, check_runs
from checked import UserError, leaves, overlay
from models import count_params

ROOT = pathlib.Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if "def get_config" in path.read_text())
SWEEPS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if "def get_sweep" in path.read_text())
SETTINGS = [key for key in leaves(RunConfig()) if key not in ("name", "group")]

# Another value of every setting that a number one larger, or the opposite, would not be.
OTHER = {
    "mixture": "temperature(*)",
    "initialize": "another",
    "data.source": "text",
    "data.input": "elsewhere",
    "data.languages": ("a9", "b9", "c9"),
    "data.tokenizer": "bpe",
    "data.tasks": ("multikey",),
    "model.attention": "sparse",
    "model.output_gate": "headwise",
    "model.value_gate": "none",
    "model.k_rule": "inverse",
    "model.selection": "block",
    "model.dtype": "float64",
    "model.remat": "dots",
    "model.kv_heads": 1,
    "model.head_width": 48,
    "model.block": 8,
    "model.local_share": 0.25,
    "model.indexer_rotary_width": 8,
    "model.variance_decay": 0.5,
    "model.architecture.family": "llama",
    "model.architecture.rope_scaling.kind": "linear",
    "model.architecture.full_layers": (0,),
    "model.architecture.unrotated_layers": (0,),
    "model.architecture.rotary_width": 16,
    "model.architecture.rope_scaling.factors": (2.0,) * 8,
    "train.steps": (7, 9),
    "train.cooldown_fraction": 0.5,
    "train.beta1": 0.5,
    "train.beta2": 0.5,
    "mesh.data": 2,
}
# What the value needs beside it.
WITH = {
    "data.source": {"data.input": "elsewhere"},
    "data.input": {"data.source": "text"},
    "data.languages": {"data.source": "synthetic", "data.input": ""},
    "model.heads": {"model.kv_heads": 1},
    "model.head_width": {"model.d_ff": 1024},  # gates of wide heads take their parameters from it
    "data.tasks": {"data.tokenizer": "bytes"},
    "model.architecture.rope_scaling.factors": {
        "model.architecture.rotary_width": 16,
        "model.architecture.rope_scaling.kind": "longrope",
    },
}
# Sparse attention knows neither; a test of them turns it off, where the sweep lets it.
DENSE = ("model.architecture.window", "model.architecture.attention_softcap")


def load(name: str):
    return importlib.import_module(f"configs.{name}")


def base_of(module) -> RunConfig:
    """The file's config; where the text's place is to tell the languages, with some."""
    base = module.get_config()
    unread = base.data.source != "synthetic" and not base.data.languages
    return overlay(base, {"data.languages": ("da", "nb", "sv")}) if unread else base


def other(key: str, value):
    if key in OTHER and OTHER[key] != value:
        return OTHER[key]
    return not value if isinstance(value, bool) else value + 1


@pytest.mark.parametrize("name", NAMES)
def test_config_says_how_it_is_run_how_long_and_to_what_end(name):
    module = load(name)
    assert isinstance(module.get_config(), RunConfig)
    for words in (f"--config=configs/{name}.py", "Time", "xpect"):
        assert words in module.__doc__


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep_lists_different_runs_that_fit(name):
    module = load(name)
    check_runs(module.get_sweep(base_of(module)).plan)


@pytest.fixture(name="wide")
def allow_float64():
    with jax.enable_x64(True):
        yield


# A sweep of 774 runs takes a third of a second a setting: the rest of it is thorough.
CASES = [(name, SETTINGS) for name in SWEEPS if name != "atlas_paper"]
CASES += [("atlas_paper", SETTINGS[::6]), pytest.param("atlas_paper", SETTINGS, marks=pytest.mark.thorough)]


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_whatever_is_set_on_the_base_is_found_in_every_run_or_refused_by_name(name, settings):
    module = load(name)
    plain, found = base_of(module), 0
    for key in settings:
        changes = {key: other(key, leaves(plain)[key])} | WITH.get(key, {})
        changes |= {"model.attention": "dense"} if key in DENSE else {}
        try:
            base = overlay(plain, changes)
            study = module.get_sweep(base)
            study.check_overrides([key])
            runs = study.plan
        except UserError as error:
            assert key in str(error), error
            continue
        found += 1
        assert {leaves(run)[key] for run in runs} == {leaves(base)[key]} != {leaves(plain)[key]}, key
    assert found > 0.55 * len(settings)


def paper() -> list[RunConfig]:
    module = load("atlas_paper")
    return module.get_sweep(module.get_config()).plan


def test_paper_has_774_runs_in_its_nine_groups():
    """140 + 20 + 70 + 50 + 90 + 150 + 120 + 50 + 84, arXiv 2510.22037 Table B.1."""
    counts = collections.Counter(config.group for config in paper())
    assert list(counts.values()) == [140, 20, 70, 50, 90, 150, 120, 50, 84]
    assert sum(counts.values()) == 774


def test_paper_finetunes_continue_runs_of_their_own_size():
    runs = paper()
    named = {config.name: config for config in runs if config.group == "unimax"}
    finetunes = [config for config in runs if config.initialize]
    assert len(finetunes) == 134
    for config in finetunes:
        parent = named[config.initialize]
        assert parent.mixture.startswith("unimax")
        assert count_params(parent.model) == count_params(config.model)


def test_paper_trains_as_published():
    by_scale = {config.name: config for config in paper()}
    assert count_params(by_scale["unimax-34"].model)["total"] == 2_034_422_912
    assert [by_scale[f"unimax-{scale}"].train.batch_size for scale in (4, 8, 28, 34)] == [256, 256, 1024, 2048]
    assert by_scale["monolingual-0"].data.languages == ("yo",)


@pytest.fixture(name="own_text")
def text_of_three_languages(tmp_path):
    for name in ("cym_Latn", "bre_Latn", "ell_Grek"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("words")
    return overlay(load("own_text").get_config(), {"data.source": "text", "data.input": str(tmp_path)})


def test_own_text_is_a_study_of_the_languages_that_are_there(own_text):
    runs = load("own_text").get_sweep(own_text).plan
    groups = collections.Counter(run.group for run in runs)
    assert groups == {
        "monolingual": 9, "bilingual": 6, "all": 3, "dirichlet": 12, "lopsided": 3, "seeds": 4, "repeated": 3
    }  # fmt: skip
    pairs = {run.mixture for run in runs if run.group == "bilingual"}
    assert pairs == {"uniform(bre_Latn,cym_Latn)", "uniform(bre_Latn,ell_Grek)", "uniform(cym_Latn,ell_Grek)"}
    assert {run.data.max_train_windows for run in runs} == {0, 1600}


def test_own_text_of_one_language_is_refused(own_text):
    with pytest.raises(UserError, match="bre_Latn only"):
        load("own_text").get_sweep(overlay(own_text, {"data.languages": ("bre_Latn",)}))


def test_many_languages_share_the_pairs_evenly():
    names = tuple(f"l{i}" for i in range(30))
    runs = load("own_text").get_sweep(overlay(load("own_text").get_config(), {"data.languages": names})).plan
    pairs = [run.mixture for run in runs if run.group == "bilingual" and run.name.endswith("small")]
    counts = collections.Counter(name for mixture in pairs for name in mixture[8:-1].split(","))
    assert len(pairs) == len(set(pairs)) == 45
    assert max(counts.values()) - min(counts.values()) <= 2
