import numpy as np
import pandas as pd
import pytest

from atlas.scaling import load_runs
from checked import UserError


def single(**columns) -> pd.DataFrame:
    N, D = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(1e9, 1e11, 5)))
    base = {"run": [f"r{n:.0f}" for n in N], "num_params": N, "tokens": D, "loss": 1.8 + 400 / N**0.35 + 900 / D**0.35}
    return pd.DataFrame(base).assign(**columns)


def mixed(**columns) -> pd.DataFrame:
    table = single().rename(columns={"tokens": "tokens.fr"})
    base = {"tokens.de": table["tokens.fr"], "unique_tokens.fr": 1e10, "unique_tokens.de": 1e10, "language": "fr"}
    return table.assign(**base | columns)


def notes(table: pd.DataFrame) -> str:
    return "\n".join(load_runs(table).warnings)


def test_a_sound_table_raises_no_suspicion():
    assert notes(single()) == ""
    assert notes(single(unique_tokens=1e10)) == ""
    only = "languages in mixtures without evaluations, kept as sources only: de"
    assert notes(mixed()) == only
    assert notes(pd.concat([mixed(), mixed(language="de")])) == ""


@pytest.mark.parametrize(
    "table, message",
    [
        (single().rename(columns={"run": "runs"}), "column 'runs' is not read; did you mean 'run'?"),
        (single(langauge="fr"), "column 'langauge' is not read; did you mean 'language'?"),
        (single(uniqe_tokens=1e9), "did you mean 'unique_tokens'?"),
        (mixed(**{"token.it": 0.0}), "column 'token.it' is not read; did you mean 'tokens.it'?"),
        (mixed(tokens_it=0.0).assign(language=["it"] * 2 + ["fr"] * 18), "did you mean 'tokens.it'?"),
        (
            mixed().rename(columns={"unique_tokens.de": "unique_token.de"}),
            "column 'unique_token.de' is not read; did you mean 'unique_tokens.de'?",
        ),
        (mixed(**{"tokens.de": 0.0}), "no run trains on de"),
        (mixed(**{"unique_tokens.fr": 1e6}), "'fr' is repeated up to 1e+05 times"),
        (mixed(**{"unique_tokens.fr": 1e16}), "unique tokens of 'fr' reach 1e+16, more than all text"),
        (
            mixed(**{"unique_tokens.fr": [1e10] * 19 + [np.nan]}),
            "unique tokens of 'fr' are missing in 1 of the 20 rows that train on it",
        ),
        (
            mixed(**{"unique_tokens.fr": [1e10] * 19 + [2e10]}),
            "unique tokens of 'fr' change within 1 runs, such as r1000000000",
        ),
        (pd.concat([single(), single(loss=2.5).iloc[:3]]), "3 rows repeat another one but for the loss"),
        (single(num_params=np.geomspace(0.07, 13, 20)), "num_params begin at 0.07: are they in millions or billions?"),
        (single(tokens=np.geomspace(2, 1400, 20)), "tokens begin at 2: are they in millions or billions?"),
        (single(loss=np.geomspace(60, 8, 20)), "losses reach 60: are they perplexities? --columns='loss=log(loss)'"),
        (pd.concat([single(), single()]).assign(row=range(40)), "20 rows repeat another one in all that laws read"),
        (single(State=["finished"] * 18 + ["crashed", "running"]), "2 rows are of runs that have not finished"),
        (single(initialize=["p"] * 4 + [""] * 16), "4 of 20 rows are of runs that continue another one"),
    ],
)
def test_what_looks_wrong_is_a_warning(table, message):
    assert message in notes(table)


def test_few_tokens_beside_many_are_no_other_unit():
    """The first evaluation of a run that mixes a language in thinly has seen a window of it."""
    assert "millions" not in notes(single(tokens=np.geomspace(128, 4e5, 20)))


def test_rows_that_another_column_tells_apart_are_no_contradiction():
    twice = pd.concat([single(corpus="a"), single(corpus="b", loss=2.5)])
    assert "repeat another one" not in notes(twice)


def test_losses_in_two_units_are_noticed():
    bits = single().assign(loss=lambda t: t.loss * np.where(np.arange(20) % 3 == 0, 1 / np.log(2), 1.0))
    assert "a factor 1.43 apart" in notes(bits)
    again = single().assign(run=lambda t: t.run + "again", loss=lambda t: 1.4 * t.loss)
    assert "a factor 1.40 apart" in notes(pd.concat([single(), again]))
    assert "apart" not in notes(bits.assign(loss_unit="nats"))


def test_noise_and_stray_rows_are_not_another_unit():
    rng = np.random.default_rng(0)
    noisy = pd.concat(
        [single(run=f"s{i}", loss=lambda t: t.loss * np.exp(0.05 * rng.normal(size=20))) for i in range(9)]
    )
    assert "apart" not in notes(noisy)
    wide = np.exp(0.3 * rng.normal(size=20))
    assert "apart" not in notes(single(loss=lambda t: t.loss * wide))
    stray = single()
    stray.loc[7, "loss"] *= 1.6
    assert "apart" not in notes(stray)


@pytest.mark.parametrize(
    "table, message",
    [
        (single(unique_tokens=-np.inf), "unique tokens of 'all' must be positive"),
        (mixed(**{"unique_tokens.xx": 1e9}), "unknown language in column unique_tokens.<language>: 'xx'"),
        (single(num_params=-np.inf), "'num_params' must be positive"),
        (single(tokens=np.inf), "'tokens' is infinite in all 20"),
        (mixed().rename(columns={"language": "langauge"}), "did you mean --columns=language=langauge?"),
        (single().rename(columns={"tokens": "tokns"}), "did you mean --columns=tokens=tokns?"),
        (single(val_loss=1.0, test_loss=2.0).drop(columns="loss"), "loss could be 'val_loss' or 'test_loss'"),
        (pd.DataFrame({"Step": [1], "a - val/loss": [2.0], "a - val/loss__MIN": [2.0]}), "a chart exported from W&B"),
    ],
)
def test_what_cannot_be_is_refused(table, message):
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        load_runs(table)
    assert message in str(error.value)
