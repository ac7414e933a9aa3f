"""The size of the vocabulary (after Tao et al.): more types say more in a token, and need more text to be learnt."""

import numpy as np

from atlas.scaling.single.library.chinchilla import A, B
from atlas.scaling.single.specification import Column, D, Law, N, Parameter

# Of a level that may have any sign and a shallow power, one can take the other's place without end: exponents are drawn
# to published ones.
_EXPONENTS = [Parameter(n, role="exponent", prior=(float(np.log(0.35)), 0.35)) for n in ("alpha", "beta", "kappa")]


def _loss(p, x):
    """E + A/N^α + B·V^γ/D^β + C/V^κ: the best V grows with D."""
    size, text = p["A"] * x["N"] ** -p["alpha"], p["B"] * x["V"] ** p["gamma"] * x["D"] ** -p["beta"]
    return p["E"] + size + text + p["C"] * x["V"] ** -p["kappa"]


def _diagnose(batch):
    if batch["V"].max() < 2.0 * batch["V"].min():
        return dict.fromkeys(("gamma", "C", "kappa"), "vocabularies hardly differ between runs; vary vocab_size")
    return {}


LAWS = (
    Law(
        "vocabulary",
        "after Tao et al., arXiv 2407.13623, Eq. 7: N without embeddings, D characters, losses normalised by unigrams, "
        "which are negative; the cost B·V^gamma of more types is in place of their tokens per character",
        _loss,
        (
            *(Parameter("E", positive=False), A, B, Parameter("C", scale=("V", "kappa")), *_EXPONENTS),
            Parameter("gamma", positive=False, starts=(0.0, 0.2), width=0.3),
        ),
        (N, D, Column("V", lambda runs, tokens: runs.frame["vocab_size"], needs=("vocab_size",))),
        residual="raw",
        diagnose=_diagnose,
    ),
)
