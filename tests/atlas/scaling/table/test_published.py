import numpy as np
import pandas as pd
import pytest

from atlas.scaling.table import published
from checked import UserError


@pytest.mark.parametrize("name", published.TABLES)
def test_every_table_reads(name):
    assert isinstance(published.table(name), pd.DataFrame) and len(published.table(name))


def test_matrix_cells():
    scores = published.transfer_scores()
    assert scores.shape == (38, 38) and list(scores.index) == list(scores.columns)
    assert np.isnan(np.diag(scores)).all() and scores.notna().sum().sum() == 1406
    cells = {"es pt": 0.5, "pt es": 0.5, "es fr": 0.4, "fr es": 0.2, "ms id": 0.4, "no sv": 0.3, "no de": 0.1}
    cells |= {"ar he": 0.2, "ru uk": 0.3, "uk ru": 0.3, "zh vi": -1.6, "vi zh": 0.0, "en id": 0.3}
    for cell, value in cells.items():
        assert scores.loc[tuple(cell.split())] == value, cell


def test_shapes_follow_the_parameter_formula():
    shapes = published.table("model_shapes").query("scale < 52")
    width, heads, head = shapes.d_model, shapes.heads, shapes.d_kv
    layer = 4 * width * heads * head + 3 * width * shapes.d_ff + width
    np.testing.assert_array_equal(64512 * width + shapes.layers * layer, shapes.params)


def test_language_laws():
    law = published.language_law("en")
    loss = [law["E"] + law["A"] / 2e9 ** law["alpha"] + law["B"] / D ** law["beta"] for D in (42e9, 1e11, 5e11)]
    np.testing.assert_allclose(loss, [0.913, 0.863, 0.805], atol=6e-4)
    laws = published.table("language_laws")
    assert len(laws) == 18 and (laws.alpha == laws.beta).all()


def test_scripts_cover_every_language():
    mixtures = published.table("capacity_mixtures").languages.str.split()
    named = set(published.transfer_scores().index) | {language for mix in mixtures for language in mix}
    assert named <= set(published.scripts())


def test_unknown_names_are_offered_the_nearest():
    with pytest.raises(UserError, match="did you mean 'transfer_scores'"):
        published.table("transfer_score")
    with pytest.raises(UserError, match="unknown language 'de'"):
        published.language_law("de")
    with pytest.raises(UserError, match="unknown regime"):
        published.language_law("en", "mono")
