import base64
import io
import itertools
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from matplotlib import image

from atlas.report import StudySummary, decisions, figures, style, write_report
from atlas.scaling import CapacityFit, Estimate, MixturePlan, bilingual_transfer_scores, expansion_table, load_runs

VOID = {"meta", "img", "br"}


class _Balanced(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open, self.links, self.images = [], [], []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[name] for name in ("src", "href") if name in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def read(path) -> tuple[str, list[str]]:
    """The text of a report, once it is well-formed and asks for nothing outside itself."""
    text, parser = path.read_text(), _Balanced()
    parser.feed(text)
    assert not parser.open
    assert all(link.startswith("data:image/png;base64,") for link in parser.links)
    assert "@import" not in text and "url(" not in text
    return text, parser.links


def capacity_fit() -> CapacityFit:
    values = {"alpha": 0.35, "beta": 0.28, "phi": 0.1, "psi": -0.04}
    parameters = {name: Estimate.normal(value, 0.01, True) for name, value in values.items()}
    return CapacityFit(parameters, 0.0, True, 0.004, 0.2, 0.99, 100, 20, ("rows were left out",))


def mixture_plan(languages) -> MixturePlan:
    table = pd.DataFrame({"language": languages, "share": np.linspace(0.1, 0.9, len(languages))})
    table["share"] /= table["share"].sum()
    table = table.assign(tokens=2e8 * table.share, epochs=10 * table.share, weight=1.0, loss=1.7, even_loss=1.8)
    return MixturePlan(7e5, 2e8, 1e15, table, 1.7, 1.8, ("held at the floor of their share: de",))


@pytest.fixture(scope="session")
def study(truth) -> StudySummary:
    world = truth()
    runs = load_runs(world.runs())
    fit, held = world.fit(warnings=("lambda is <not> identified",)), runs.comparable().where("num_params > 7e5")
    rows = {"split": "largest_n", "language": np.asarray(held.languages)[held.target], "loss": held.loss}
    return StudySummary(
        title="A study of <six> languages",
        runs=runs,
        fit=fit,
        transfer=bilingual_transfer_scores(runs),
        capacity=capacity_fit(),
        heldout=pd.DataFrame([{"split": "largest_n", "law": "atlas", "r2": 0.99, "are": 0.004}]),
        heldout_rows=pd.DataFrame(rows).assign(predicted=fit.predict_runs(held)[0]),
        relatedness=world.related,
        mixture=mixture_plan(world.languages),
        facts={"hardware": "2 CPU cores"},
        warnings=("the corpus is small",),
    )


def test_a_whole_report(study, tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "old.png").write_bytes(b"")
    path = write_report(tmp_path, study)
    text, links = read(path)
    names = {"loss_curves", "observed_predicted", "residuals", "law", "transfer", "score_drift", "iso_loss", "next"}
    assert {file.stem for file in (tmp_path / "figures").iterdir()} == names
    assert len(links) == len(names)
    for part in ("A study of &lt;six&gt; languages", "the corpus is small", "lambda is &lt;not&gt; identified"):
        assert part in text
    assert "bits per byte" in text and "2 CPU cores" in text
    for words in ("decides predictions, mixtures", "decides what more languages cost", "The two may differ"):
        assert words in text
    assert 'class="missing"' not in text
    pictures = [image.imread(io.BytesIO(base64.b64decode(link.split(",")[1]))) for link in links]
    assert all(picture.shape[1] >= 900 and picture.std() > 0.02 for picture in pictures)


def test_an_empty_study_says_what_is_missing(truth, tmp_path):
    runs = load_runs(truth(2).runs(sizes=(1e5,), phases=("trunk",)))
    text, _ = read(write_report(tmp_path, StudySummary("Nothing", runs, truth(2).fit())))
    for missing in ("No held-out", "No pair has", "No capacity law", "No mixture"):
        assert missing in text


def test_reasons_given_are_shown(truth, tmp_path):
    runs = load_runs(truth(2).runs(sizes=(1e5,), phases=("trunk",)))
    missing = {"transfer": "every run repeats", "capacity": "too few rows"}
    missing |= {f"held-out score of {law} on largest_n": f"{law} has no size to hold out" for law in ("atlas", "other")}
    text, _ = read(write_report(tmp_path, StudySummary("x", runs, truth(2).fit(), missing=missing)))
    assert "every run repeats" in text and "too few rows; what follows is by the law" in text
    for law in ("atlas", "other"):
        assert f"No held-out score of {law} on largest_n: {law} has no size" in text
    assert (tmp_path / "figures" / "loss_curves.png").exists()


@pytest.mark.thorough
def test_one_language_and_one_size(truth, tmp_path):
    world = truth(1)
    runs = load_runs(world.runs(sizes=(1e5,), uneven=0))
    text, _ = read(write_report(tmp_path, StudySummary("one", runs, fit=world.fit())))
    assert "transfer is unknown" in text
    assert not (tmp_path / "figures" / "transfer.png").exists()


def test_a_degenerate_fit_is_announced(truth, tmp_path):
    world = truth(2)
    fit = world.fit(told=False, warnings=tuple(f"parameter {i} is not identified" for i in range(30)))
    text, _ = read(write_report(tmp_path, StudySummary("bad", load_runs(world.runs(sizes=(1e5, 2e5))), fit=fit)))
    assert text.index("did not converge") < text.index("<h2>")
    assert text.index("<h2>How well") < text.index('<img class="doubted"')
    assert "21 more" in text and "parameter 29" in text
    assert "(0.9 [" in text  # a parameter that is not identified stands in brackets


@pytest.mark.thorough
def test_fifty_languages(truth, tmp_path):
    world = truth(50)
    runs = load_runs(world.runs(sizes=(1e5,), pairs=False, uneven=0, phases=("cooldown",)))
    text, _ = read(write_report(tmp_path, StudySummary("many", runs, fit=world.fit())))
    assert "12 languages with the most evaluations of 50" in text


@pytest.mark.thorough
def test_nan_rows_and_diverged_runs(truth, tmp_path):
    world = truth(3)
    runs = world.runs(sizes=(1e5, 2e5))
    runs.loc[::5, "loss"] = np.nan
    runs.loc[1::40, "loss"] = 300.0
    runs = load_runs(runs)
    scores = bilingual_transfer_scores(runs)
    broken = world.fit()
    for law in broken.estimates.values():
        law.tau[0, 1] = law.tau[0, 1] * (False if law.tau.dtype == bool else np.nan)
    study = StudySummary("nan", runs, fit=broken, transfer=scores, mixture=None)
    assert "<img" in write_report(tmp_path, study).read_text()


def test_a_fit_of_other_languages_leaves_a_sentence(truth, tmp_path):
    text, _ = read(
        write_report(tmp_path, StudySummary("x", load_runs(truth(3).runs(sizes=(1e5,))), fit=truth(2).fit()))
    )
    assert "No figure here: unknown source language" in text


def test_bounded_scores_are_shown_as_bounds(truth, tmp_path):
    runs = load_runs(truth(2).runs(sizes=(1e5,), phases=("trunk",), uneven=0))
    scores = bilingual_transfer_scores(runs, anchors=[6e7])
    text, _ = read(write_report(tmp_path, StudySummary("x", runs, truth(2).fit(), transfer=scores)))
    assert "at most" in text


def test_drawing_leaves_the_callers_style_alone(truth):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.loss_curves(load_runs(truth(1).runs(sizes=(1e5,), uneven=0)), "loss")
    decisions.next_run(expansion_table([2, 4]), None)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(("low", "high"), [(1, 1), (1, 1.5), (1.6, 5), (1e5, 8e8), (1e-3, 1e12)])
def test_axes_have_a_few_round_ticks(low, high):
    axes = style.canvas(2).subplots()
    style.log_axis(axes.xaxis, [low, high])
    ticks = axes.get_xticks()
    assert 1 <= len(ticks) <= 6
    assert axes.get_xlim()[0] <= ticks.min() and ticks.max() <= axes.get_xlim()[1]


def test_labels_at_line_ends_do_not_cover_each_other():
    figure = style.canvas(3)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1])
    figure.draw_without_rendering()
    style.label_ends(axes, 1.0, [(0.5, "a", "k"), (0.501, "b", "k"), (0.502, "c", "k"), (float("nan"), "d", "k")])
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert len(boxes) == 3
    assert all(lower.y1 <= upper.y0 + 2 for lower, upper in itertools.pairwise(boxes))
