"""The report: one HTML file that holds everything and asks the network for nothing."""

import base64
import io
import pathlib
import shlex
from collections.abc import Callable
from html import escape

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from atlas.report import decisions, figures, style
from atlas.report.planner import planner
from atlas.report.summary import StudySummary
from atlas.scaling import PUBLISHED_EXPONENTS, JointFit, MixturePlan, expansion_table, latest_scores
from checked import UserError
from checked.files import write_atomically

_DPI = 150  # half as much again as shown: sharp on dense screens, a file of a few megabytes
_WARNINGS = 10  # shown unfolded: more hide the first ones
_PAIRS = 40  # rows of the table of scores; transfer_scores.csv holds them all
_LEAST_SHARE = 0.0005  # of a mixture that a command names
_MULTIPLIERS = (2, 4, 8, 16)  # of the number of languages
_STYLE = (pathlib.Path(__file__).parent / "report.css").read_text()


def write_report(directory: pathlib.Path, study: StudySummary) -> pathlib.Path:
    """Writes directory/report.html, whole in itself, and its figures as PNGs under directory/figures.

    A part that is missing, or that the runs are too few for, leaves a sentence that says so; figures of an
    older report that this one lacks are removed.

    Returns:
      The path of report.html.
    """
    page = _Page(pathlib.Path(directory) / "figures")
    page.add(f"<h1>{escape(study.title)}</h1>", _lead(study))
    _warnings(page, study)
    if study.facts:
        rows = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in study.facts.items())
        page.add(f'<table class="facts">{rows}</table>')
    _curves(page, study)
    page.doubt = "" if study.fit.converged else "the fit did not converge"
    for section in (_accuracy, _law, _transfer, _capacity, _planner, _next):
        section(page, study)
    page.remove_stale()
    path = pathlib.Path(directory) / "report.html"
    head = f'<meta charset="utf-8"><title>{escape(study.title)}</title><style>{_STYLE}</style>'
    body = "\n".join(page.parts)
    write_atomically(path, f"<!doctype html>\n<html lang=en><head>{head}</head><body>{body}</body></html>\n")
    return path


class _Page:
    """The HTML so far, and the folder for its pictures."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.parts, self.pictures = folder, [], set()
        self.doubt = ""  # of the figures from here on, which then are grey and say so

    def add(self, *parts: str) -> None:
        self.parts.extend(parts)

    def missing(self, text: str) -> None:
        self.add(f'<p class="missing">{escape(text)}</p>')

    def figure(self, name: str, caption: str, draw: Callable[[], Figure]) -> None:
        """Draws, saves and embeds a figure; a user's error becomes the sentence in its place."""
        try:
            figure = draw()
        except UserError as error:
            self.missing(f"No figure here: {error}")
            return
        png = io.BytesIO()
        if self.doubt:
            style.doubted(figure, self.doubt)
        figure.savefig(png, dpi=_DPI, metadata={"Software": None})
        write_atomically(self.folder / f"{name}.png", png.getvalue())
        self.pictures.add(f"{name}.png")
        data = base64.b64encode(png.getvalue()).decode()
        width = round(100 * figure.get_figwidth())
        grey = ' class="doubted"' if self.doubt else ""
        image = f'<img{grey} alt="{escape(caption)}" style="max-width:{width}px" src="data:image/png;base64,{data}">'
        self.add(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")

    def remove_stale(self) -> None:
        for picture in self.folder.glob("*.png"):
            if picture.name not in self.pictures:
                picture.unlink()


def _lead(study: StudySummary) -> str:
    runs = study.runs
    counts = [
        (len(runs.run_ids), "run"),
        (len(runs), "evaluation"),
        (len(runs.targets), "language"),
        (len(np.unique(runs.N)), "model size"),
    ]
    words = ", ".join(f"{n} {noun}{'s' if n != 1 else ''}" for n, noun in counts)
    sizes = f"N from {style.short(runs.N.min())} to {style.short(runs.N.max())} parameters"
    tokens = f"up to {style.short(runs.total_tokens.max())} training tokens"
    return f'<p class="lead">{words}; {sizes}; {tokens}; loss in {escape(study.loss_unit)}.</p>'


def _warnings(page: _Page, study: StudySummary) -> None:
    found = [("", warning) for warning in study.warnings]
    for name, part in (("law: ", study.fit), ("capacity law: ", study.capacity), ("mixture: ", study.mixture)):
        found += [(name, warning) for warning in (part.warnings if part else ())]
    if not study.fit.converged:
        found.insert(0, ("law: ", "the fit did not converge; none of its numbers, grey below, can be trusted"))
    if found:
        items = [f"<li>{escape(name + warning)}</li>" for name, warning in found]
        first, rest = "".join(items[:_WARNINGS]), "".join(items[_WARNINGS:])
        more = f"<details><summary>{len(items) - _WARNINGS} more</summary><ul>{rest}</ul></details>" if rest else ""
        page.add(f'<div class="warn"><b>Read this first</b><ul>{first}</ul>{more}</div>')


def _curves(page: _Page, study: StudySummary) -> None:
    page.add("<h2>Loss curves</h2>")
    caption = "Loss of each language in every run that trained on it. Dots are cooled-down checkpoints."
    caption += _chosen(style.MAX_PANELS, study.runs.targets)
    page.figure("loss_curves", caption, lambda: figures.loss_curves(study.runs, study.loss_unit))


def _chosen(most: int, languages: tuple[str, ...]) -> str:
    """What a caption adds where a figure shows some languages only."""
    return f" The {most} languages with the most evaluations of {len(languages)}." if len(languages) > most else ""


def _accuracy(page: _Page, study: StudySummary) -> None:
    page.add("<h2>How well the law describes the runs</h2>")
    caption = "Every dot is an evaluation; the grey band is ±2 %. Held-out rows were predicted unseen."
    page.figure("observed_predicted", caption, lambda: _observed(study))
    caption = "What the law leaves over. Black: medians with their central 90 %. A trend here is misfit."
    page.figure("residuals", caption, lambda: figures.residuals(study.fitted, study.fit))
    for name, reason in study.missing.items():
        if name.startswith("held-out"):
            page.missing(f"No {name}: {reason}")
    if study.heldout.empty:
        page.missing("No held-out evaluation was made.")
        return
    names = {"r2": "R², mean of languages", "are": "mean absolute relative error", "rmse_log": "RMSE of log loss"}
    names |= {"n_train": "rows fitted", "n_heldout": "rows held out"}
    page.add("<h3>Held-out scores</h3>", _table(study.heldout.rename(columns=names)))


def _observed(study: StudySummary) -> Figure:
    rows = study.fitted.evaluations().assign(predicted=study.fit.predict_runs(study.fitted)[0], split="")
    if study.heldout_rows is not None:
        rows = pd.concat([rows, study.heldout_rows], ignore_index=True)
    return figures.observed_and_predicted(rows, study.loss_unit)


def _law(page: _Page, study: StudySummary) -> None:
    form = f"<code>L = E + A·K^φ / N^α + B / D_eff^β</code>, in {escape(study.loss_unit)}"
    rest = "D_eff sums the tokens of all languages, weighted by transfer τ and discounted by repetition λ."
    page.add("<h2>The law</h2>", f"<p>{form}; {rest}</p>")
    caption = "Monolingual loss by the law, with 90 % intervals; dots: runs, moved along the law."
    caption += _chosen(style.MAX_SERIES, study.fit.targets)
    page.figure("law", caption, lambda: figures.law(study.fitted, study.fit, study.loss_unit))
    page.add(_table(_parameters(study.fit), "wide"), "<p>Value and 90 % interval; in brackets: not identified.</p>")
    noise = f"Noise of log loss σ = {100 * study.fit.sigma:.2g} %, correlated {study.fit.rho:.2g} in a run"
    missed = f"of runs of most compute or most languages the law misses {100 * study.fit.misfit:.2g} % more"
    page.add(f"<p>{noise}; {missed}.</p>", *(f"<p>{escape(text)}</p>" for text in study.phi_in_words()))


def _parameters(fit: JointFit) -> pd.DataFrame:
    """A row a target: its name and the estimates of its own law."""
    symbols = {"E": "E", "A": "A", "alpha": "α", "B": "B", "beta": "β", "lambda": "λ"}
    rows = []
    for target in fit.targets:
        columns = [fit.estimates[field].language(target) for field in ("value", "low", "high", "identified")]
        texts = {symbol: _interval(*(column[name] for column in columns)) for name, symbol in symbols.items()}
        rows.append({"language": target} | texts)
    return pd.DataFrame(rows)


def _interval(value: float, low: float, high: float, identified: bool) -> str:
    text = f"{_number(value)} [{_number(low)}, {_number(high)}]"
    return text if identified else f"({text})"


def _transfer(page: _Page, study: StudySummary) -> None:
    page.add("<h2>Transfer between languages</h2>")
    scores = study.transfer
    latest = None if scores is None or scores.empty else latest_scores(scores)
    measured = None if latest is None else latest.pivot(index="target", columns="source", values="score")
    if len(study.fit.sources) == 1 and measured is None:
        why = "One language, and no bilingual runs: transfer is unknown."
        page.missing(study.missing.get("transfer", why))
        return
    caption = "Rows are targets, columns sources. Bold: the 90 % interval of τ excludes 0. Hatched: prior only."
    name = study.relatedness_name
    page.figure("transfer", caption, lambda: decisions.transfer(study.fit, measured, study.relatedness, name))
    page.add(*(f"<p>{escape(text)}</p>" for text in study.conclusions))
    if not study.relatedness:
        page.missing("How these languages are related is not known: nothing to compare.")
    if measured is None:
        why = "No pair has a monolingual and a 50/50 bilingual run of one size: no bilingual transfer scores."
        page.missing(study.missing.get("transfer", why))
        return
    page.add("<h3>Bilingual transfer scores</h3>")
    caption = "Score over its anchor, with 90 % intervals; triangles: at most. 0: neutral."
    page.figure("score_drift", caption, lambda: decisions.score_drift(scores))
    page.add(_table(_score_table(latest.head(_PAIRS))))


def _score_table(latest: pd.DataFrame) -> pd.DataFrame:
    low, score, high = (latest[name].map(_number) for name in ("low", "score", "high"))
    measured = np.isfinite(latest.low) & np.isfinite(latest.high)
    columns = {
        "target": latest.target,
        "source": latest.source,
        "N": latest.num_params.map(style.short),
        "anchor, tokens": latest.anchor_tokens.map(style.short),
        "score": score.mask(latest.censored == "at most", "at most " + high).mask(
            latest.censored == "at least", "at least " + low
        ),
        "90 % interval": ("[" + low + ", " + high + "]").where(measured, "–"),
        "τ it implies": latest.tau.map(_number),
    }
    return pd.DataFrame(columns)


def _capacity(page: _Page, study: StudySummary) -> None:
    page.add("<h2>The cost of more languages</h2>")
    page.add("<p><code>L = E + A·K^φ / N^α + B·K^ψ / D_t^β</code> for K evenly sampled languages.</p>")
    fit = study.capacity
    if fit is None:
        why = study.missing.get("capacity", "No capacity law was fitted.")
        page.missing(f"{why.rstrip('.')}; what follows is by the law that ATLAS published.")
    law, origin = (PUBLISHED_EXPONENTS, "ATLAS as published") if fit is None else (fit.exponents, "fitted here")
    caption = "From a compute-optimal baseline: all pairs of N and total tokens with its loss. Grey: equal compute."
    page.figure("iso_loss", caption, lambda: decisions.iso_loss_curves(law, origin))
    if fit is not None:
        shared = {symbol: fit.parameters[n] for n, symbol in zip(("alpha", "beta", "phi", "psi"), "αβφψ", strict=True)}
        cells = {symbol: _interval(e.value, e.low, e.high, e.identified) for symbol, e in shared.items()}
        page.add(_table(pd.DataFrame([cells])))
        page.add(f"<p>{fit.n_runs} runs, {fit.n_rows} rows; R² {fit.r2:.3f}; ATLAS prints φ = 0.11, ψ = −0.04.</p>")


def _planner(page: _Page, study: StudySummary) -> None:
    page.add("<h2>Plan a run</h2>", "<p>What the law expects of a run of this size, these tokens and these shares:</p>")
    if page.doubt:
        page.missing(f"Do not trust these numbers: {page.doubt}.")
    page.add(planner(study.fit.law, study.fitted, study.draws, study.fit.run_noise))


def _next(page: _Page, study: StudySummary) -> None:
    page.add("<h2>What to train next</h2>")
    law = PUBLISHED_EXPONENTS if study.capacity is None else study.capacity.exponents
    table = expansion_table(_MULTIPLIERS, law)
    caption = "Multiples of a compute-optimal baseline" + ("" if study.capacity else ", by the published law") + "."
    if study.mixture is not None:
        caption += " Right: shares of the best mixture inside the region that the runs support."
    page.figure("next", caption, lambda: decisions.next_run(table, study.mixture))
    names = {
        "multiplier": "times as many languages",
        "tokens_per_language": "tokens per language",
        "tokens_same_params": "tokens, if N stays",
        "params_same_tokens": "N, if tokens stay",
    }
    page.add(_table(table.rename(columns=names)))
    if study.mixture is None:
        page.missing(study.missing.get("mixture", "No mixture was planned: that needs a joint fit."))
        return
    plan = study.mixture
    gain = f"predicted loss {plan.loss:.4f} against {plan.even_loss:.4f} for an even mixture at its own best N"
    size = f"N = {style.short(plan.params)}, D = {style.short(plan.tokens)} tokens"
    page.add(f"<p>For {style.short(plan.flops)} FLOPs: {size}; {gain} ({escape(study.loss_unit)}).</p>")
    page.add(f"<pre>{escape(_commands(study, plan))}</pre>")
    shown = plan.table.assign(
        share=(100 * plan.table.share).map("{:.1f} %".format), tokens=plan.table.tokens.map(style.short)
    )
    page.add(_table(shown))


def _commands(study: StudySummary, plan: MixturePlan) -> str:
    """What trains the planned mixture, as the study was started, and what draws its bands."""
    start = shlex.split(str(study.facts.get("command", "")))
    config = [word for word in start if word.startswith("--config")] or ["--config=FILE"]
    shares = ",".join(f"{row.language}:{row.share:.3g}" for row in plan.table.itertuples() if row.share > _LEAST_SHARE)
    train = ["python", "-m", "experiments.train", *config, f"--config.mixture={shares}"]
    if step := study.facts.get("tokens a step"):
        train.append(f"--config.train.steps=({max(round(plan.tokens / float(str(step))), 1)},)")
    bands = f"python -m experiments.plan mixture --fit=WORKDIR --flops={plan.flops:.3g}"
    return f"{shlex.join(train)} --workdir=NEXT\n{bands}"


def _table(table: pd.DataFrame, kind: str = "") -> str:
    text = table.map(lambda x: _number(x) if isinstance(x, float | np.floating) else str(x))
    return f'<div class="scroll {kind}">{text.to_html(index=False, border=0, escape=True)}</div>'


def _number(value: float) -> str:
    """Three digits; a dash for what is unknown.

    >>> _number(0.12345), _number(float("nan")), _number(-1234567.0)
    ('0.123', '–', '−1.23M')
    """
    if not np.isfinite(value):
        return "–" if np.isnan(value) else ("∞" if value > 0 else "−∞")
    return style.short(float(value)).replace("-", "−")
