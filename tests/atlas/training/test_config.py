import dataclasses
import math

import pytest

from atlas.data import DataConfig
from atlas.training.config import MeshConfig, RunConfig, run_id, shape_of
from checked import UserError, overlay
from models.attention import attention_kind, kinds
from models.config import ATTENTION_NAMES
from tests.atlas.data.corpora import write_corpus


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train.learning_rate", math.nan),
        ("train.warmup_steps", -1),
        ("train.beta1", 1.5),
        ("train.steps", ()),
        ("train.steps", (4, 2)),
        ("train.steps", (0,)),
        ("train.steps", ("a",)),
        ("train.cooldown_fraction", 1.0),
        ("train.batch_size", 0),
        ("train.batch_size", True),
        ("mesh.data", 0),
        ("mesh.fsdp", -2),
        ("name", ""),
        ("name", "../x"),
        ("name", "a" * 300),
        ("seed", -1),
        ("seed", 2**31),
        ("model.attention", "gatedsparse"),
    ],
)
def test_settings_that_cannot_train_are_named_in_one_line(field, value):
    with pytest.raises(UserError, match=rf"^{field}=") as error:
        overlay(RunConfig(), {field: value})
    assert "\n" not in str(error.value)


def test_one_axis_of_the_mesh_takes_the_rest():
    with pytest.raises(UserError, match=r"^mesh\.data=-1 can be -1 for one axis only"):
        MeshConfig(fsdp=-1)
    MeshConfig(data=2, fsdp=-1)


def test_windows_hold_whole_blocks():
    blocks = {"model.attention": "sparse", "model.selection": "block", "model.block": 48}
    with pytest.raises(UserError, match=r"data\.window=256 must be a multiple of model\.block=48"):
        overlay(RunConfig(), blocks)
    overlay(RunConfig(), blocks | {"data.window": 96})


@pytest.fixture
def silent():
    """A kind of attention that was added."""
    attention_kind("silent")(lambda q_BTHE, k_BSGE, v_BSGE, reads: None)
    yield
    kinds._ADDED.pop("silent")
    ATTENTION_NAMES.remove("silent")


def test_kinds_that_are_not_decoded_write_no_samples(silent):
    overlay(RunConfig(), {"model.attention": "silent"})
    overlay(RunConfig(), {"model.attention": "dense", "train.sample_tokens": 5})
    with pytest.raises(UserError, match=r"^train\.sample_tokens=5 must be 0 with model\.attention='silent'"):
        overlay(RunConfig(), {"model.attention": "silent", "train.sample_tokens": 5})


def test_identity_ignores_labels_and_where_a_run_is_executed():
    config = RunConfig()
    same = {"mesh": MeshConfig(tensor=2), "group": "x", "train.checkpoint_every": 7, "model.vocab_size": 999}
    assert run_id(overlay(config, same)) == run_id(config)
    other = [{"train.steps": (501,)}, {"data.window": 128}, {"initialize": "a"}, {"model.remat": "full"}]
    assert len({run_id(overlay(config, change)) for change in ({}, *other)}) == 5
    assert run_id(overlay(config, {"name": "b"})) == "b-" + run_id(config).removeprefix("run-")


def test_identity_follows_the_text_and_not_its_place(tmp_path):
    def run(place, *texts):
        root = write_corpus(tmp_path / place, {"en": list(texts)})
        return run_id(RunConfig(data=DataConfig(source="jsonl", input=str(root), languages=("en",))))

    assert run("here", "one", "two") == run("there", "one", "two") != run("elsewhere", "one", "too")


def test_shape_ignores_seed_mixture_and_start_only():
    config = RunConfig()
    other = overlay(config, {"seed": 1, "mixture": "en", "name": "other", "initialize": "x"})
    assert shape_of(other) == shape_of(config)
    assert shape_of(overlay(config, {"train.learning_rate": 1.0})) != shape_of(config)


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().train.batch_size = 3
