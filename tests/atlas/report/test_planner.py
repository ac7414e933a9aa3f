"""The planner in the page against `plan predict`, in a headless browser."""

import json
import re
import shutil
import subprocess

import pytest

from atlas.report.planner import planner
from atlas.scaling import answers, fit_joint, joint_draws, load_runs

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
TABLE = "experiments/results/quickstart/runs.csv"
RUNS = [
    (2e4, 3e5, {"a1": 3.0, "a2": 1.0}),
    (1e6, 5e7, {"a1": 1.0, "a2": 1.0, "b1": 5.0, "b2": 0.5}),  # beyond every run, and many epochs
    (5e3, 1e5, {"b2": 1.0}),
]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium to open the page with")
@pytest.mark.parametrize("mixing", ["sum", pytest.param("ces", marks=pytest.mark.thorough)])
def test_the_page_predicts_what_plan_predict_does(tmp_path, mixing):
    runs = load_runs(TABLE).comparable()
    fit = fit_joint(runs, mixing=mixing)
    (tmp_path / "fit.json").write_text(json.dumps(fit.to_json()))
    shutil.copy(TABLE, tmp_path / "runs.csv")
    found = predicted_in_the_page(tmp_path, planner(fit.law, runs, joint_draws(fit), fit.run_noise))
    for (params, tokens, shares), page in zip(RUNS, found, strict=True):
        table, _ = answers.predict(str(tmp_path), params, tokens, "", shares, {}, {})
        table = table[table.language.isin(shares)]  # the page has no law of languages that a mixture lacks
        rows = table.set_index("language")[["loss", "loss_low", "loss_high", "run_low", "run_high"]]
        told = {name: numbers for name, numbers in zip(fit.targets, page, strict=True) if numbers}
        assert list(told) == list(rows.index)
        for name, numbers in told.items():
            assert numbers == pytest.approx(rows.loc[name].tolist(), rel=1e-6)


def predicted_in_the_page(directory, html):
    """[run][target] (loss, low, high, low and high of a run) as the script of the page computes them."""
    ask = f"""<pre id="answer"></pre><script>
      const asked = {json.dumps([[n, d, shares] for n, d, shares in RUNS])};
      const all = asked.map(([n, d, shares]) => {{
        const weights = planner.sources.map((s) => shares[s] || 0), whole = weights.reduce((a, b) => a + b);
        return planner.targets.map((_, t) => planner.predict(n, weights.map((w) => (d * w) / whole), t));
      }});
      document.getElementById("answer").textContent = JSON.stringify(all);</script>"""
    (directory / "page.html").write_text(f"<!doctype html><html><body>{html}{ask}</body></html>")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", str(directory / "page.html")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=directory).stdout
    return json.loads(re.search(r'<pre id="answer">(.*?)</pre>', shown, re.S)[1])
