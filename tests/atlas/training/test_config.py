import pytest

from atlas.errors import UserError
from atlas.training.config import MeshConfig, RunConfig, TrainConfig, run_id, shape_key, vary


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", ()), ("steps", (4, 2)), ("steps", (0,)), ("cooldown_fraction", 1.0), ("batch_size", 0)],
)
def test_settings_that_cannot_train(field, value):
    with pytest.raises(UserError, match=f"train.{field}="):
        TrainConfig(**{field: value}).validate()


def test_model_errors_become_user_errors():
    with pytest.raises(UserError, match=r"model\.attention"):
        vary(RunConfig(), {"model.attention": "gatedsparse"}).validate()


def test_identity_ignores_where_a_run_is_executed():
    config = RunConfig()
    assert run_id(vary(config, {"mesh": MeshConfig(tensor=2), "group": "x", "train.checkpoint_every": 7})) == run_id(
        config
    )
    assert run_id(vary(config, {"train.steps": (501,)})) != run_id(config)


def test_shape_ignores_seed_and_mixture_only():
    config = RunConfig()
    assert shape_key(vary(config, {"seed": 1, "mixture": "en", "name": "other"})) == shape_key(config)
    assert shape_key(vary(config, {"train.learning_rate": 1.0})) != shape_key(config)


def test_vary_copies():
    config = RunConfig()
    vary(config, {"train.batch_size": 99})
    assert config.train.batch_size != 99
