"""A language's loss by its share of the mixture (He et al.)."""

from atlas.scaling.estimates import diagnose_sizes
from atlas.scaling.single.library import chinchilla
from atlas.scaling.single.library.chinchilla import ALPHA, BETA, A, B, E
from atlas.scaling.single.specification import SHARE, D, Law, N, Parameter


def _diagnose(batch):
    found = diagnose_sizes(batch)
    if batch["p"].max() < 1.05 * batch["p"].min():
        found["gamma"] = f"its share is {batch['p'].mean():.2f} in every run; vary it"
    return found


LAWS = (
    Law(
        "multilingual_share",
        "He et al., arXiv 2410.12883: (E + A/N^alpha + B/D^beta)·p^-gamma, D over all languages",
        lambda p, x: chinchilla.loss(p, x) * x["p"] ** -p["gamma"],
        (E, A, ALPHA, B, BETA, Parameter("gamma", positive=False, prior=(0.0, 1.0), starts=(0.0, 0.1, 0.3), width=0.3)),
        (N, D, SHARE),
        diagnose=_diagnose,
        tokens="total",
    ),
)
