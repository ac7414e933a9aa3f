"""The curse of multilinguality for one target language: capacity shared among K languages."""

from atlas.scaling.law import chinchilla
from atlas.scaling.single.library.chinchilla import ALPHA, BETA, A, B, E
from atlas.scaling.single.specification import EXPONENTS, LANGUAGES, D, Law, N, Parameter, diagnose_power_laws


def _diagnose(batch):
    found = diagnose_power_laws(batch)
    if batch["K"].max() < 1.5 * batch["K"].min():
        reason = f"every run trains about {batch['K'].mean():.0f} languages; vary their number"
        found |= {"phi": reason, "psi": reason}
    return found


LAWS = (
    Law(
        "capacity",
        "ATLAS, arXiv 2510.22037, Eq. 7: E + A·K^phi/N^alpha + B·K^psi/D^beta, D of the language, K = exp entropy",
        lambda p, x: chinchilla(
            x["N"],
            x["D"],
            p["E"],
            p["A"] * x["K"] ** p["phi"],
            p["alpha"],
            p["B"] * x["K"] ** p["psi"],
            p["beta"],
        ),
        (
            *(E, A, ALPHA, B, BETA),
            Parameter("phi", positive=False, prior=(0.0, 0.3), width=0.15),
            Parameter("psi", positive=False, prior=(0.0, 0.3), width=0.15),
        ),
        (N, D, LANGUAGES),
        grid={"alpha": EXPONENTS, "beta": EXPONENTS},
        linear=("E", "A", "B"),
        diagnose=_diagnose,
    ),
)
