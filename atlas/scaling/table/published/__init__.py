"""The ATLAS paper's own tables (arXiv 2510.22037v2), as published; README.md names the source of each."""

from importlib import resources

import numpy as np
import pandas as pd

from checked import unknown

_FILES = sorted((f for f in resources.files(__package__).iterdir() if f.name.endswith(".csv")), key=lambda f: f.name)
TABLES = {file.name.removeprefix("atlas_").removesuffix(".csv"): file for file in _FILES}
MEASURED = ("en", "ru", "es", "fr", "de", "pt", "zh", "vi", "ja")  # languages whose pairs were all trained


def table(name: str) -> pd.DataFrame:
    """One published table as it lies in the package; `TABLES` lists the names.

    >>> table("crossover_tokens").crossover_tokens.max()
    np.int64(283000000000)
    """
    if name not in TABLES:
        raise unknown("published table", name, TABLES)
    with TABLES[name].open() as file:
        return pd.read_csv(file)


def transfer_scores() -> pd.DataFrame:
    """Bilingual transfer scores [38 targets, 38 sources], one decimal, NaN on the diagonal (Fig. C.2).

    >>> float(transfer_scores().loc["es", "pt"])
    0.5
    """
    scores = table("transfer_scores").set_index("target\\source").rename_axis("target")
    return scores.rename_axis(columns="source").astype(float)


def scripts() -> dict[str, str]:
    """ISO 15924 script code of every language that a published table names.

    >>> scripts()["uk"]
    'Cyrl'
    """
    return dict(table("language_scripts").itertuples(index=False, name=None))


def families() -> dict[str, str]:
    """Branch of the language family (Germanic, Turkic, …) of every language that a published table names.

    >>> families()["uk"]
    'Slavic'
    """
    return dict(table("language_families").itertuples(index=False, name=None))


def measured_scores() -> pd.DataFrame:
    """The 72 cells [9, 9] of `transfer_scores` that were measured; a random forest completed the others (App. B.6).

    Ten languages were paired; the tenth, Hindi, is not in the printed matrix.

    >>> int(measured_scores().notna().sum().sum())
    72
    """
    return transfer_scores().loc[list(MEASURED), list(MEASURED)]


def language_law(language: str, regime: str = "mono_vocab_mono_train") -> dict[str, float]:
    """Printed law of one language (Table C.1): E, A, alpha, B, beta of E + A / N^alpha + B / D^beta.

    The loss unit is not stated in the paper; exponents and E are rounded to two decimals.

    >>> law = language_law("en")
    >>> round(law["E"] + law["A"] / 2e9 ** law["alpha"] + law["B"] / 1e11 ** law["beta"], 3)
    0.863
    """
    laws = table("language_laws")
    if regime not in set(laws.regime):
        raise unknown("regime", regime, set(laws.regime))
    laws = laws[laws.regime == regime].set_index("language")
    if language not in laws.index:
        raise unknown("language", language, laws.index)
    laws = laws.assign(A=np.exp(laws.log_A), B=np.exp(laws.log_B))
    return laws.loc[language, ["E", "A", "alpha", "B", "beta"]].astype(float).to_dict()
