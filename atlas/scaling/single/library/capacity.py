"""The curse of multilinguality for one target language: capacity shared among K languages."""

from atlas.scaling.estimates import diagnose_sizes
from atlas.scaling.single.library.chinchilla import ALPHA, BETA, GRID, A, B, E
from atlas.scaling.single.specification import LANGUAGES, D, Law, N, Parameter


def capacity(N, K, D, E, A, alpha, B, beta, phi, psi):
    """Loss E + A·K^φ/N^α + B·K^ψ/D^β (ATLAS, arXiv 2510.22037, Eq. 7), D being tokens of the target language.

    φ > 0: every added language costs capacity; ψ < 0: added languages carry over to the target. K = 1 is Chinchilla's
    law; the data term equals B·K^(ψ+β)/D_tot^β in the total tokens D_tot = K·D of an even mixture. Broadcasts, and
    works in the arrays of its arguments.

    >>> capacity(1e8, 1, 1e9, 1.0, 400.0, 0.4, 300.0, 0.3, 0.1, -0.05) == 1.0 + 400.0 / 1e8**0.4 + 300.0 / 1e9**0.3
    True
    """
    return E + A * K**phi / N**alpha + B * K**psi / D**beta


def _diagnose(batch):
    found = diagnose_sizes(batch)
    if batch["K"].max() < 1.5 * batch["K"].min():
        reason = f"every run trains about {batch['K'].mean():.0f} languages; vary their number"
        found |= {"phi": reason, "psi": reason}
    return found


LAWS = (
    Law(
        "capacity",
        "ATLAS, arXiv 2510.22037, Eq. 7: E + A·K^phi/N^alpha + B·K^psi/D^beta, D of the language, K = exp entropy",
        lambda p, x: capacity(x["N"], x["K"], x["D"], *(p[name] for name in LAWS[0].names)),
        (
            *(E, A, ALPHA, B, BETA),
            Parameter("phi", positive=False, prior=(0.0, 0.3), width=0.15),
            Parameter("psi", positive=False, prior=(0.0, 0.3), width=0.15),
        ),
        (N, D, LANGUAGES),
        grid=GRID,
        linear=("E", "A", "B"),
        diagnose=_diagnose,
    ),
)
