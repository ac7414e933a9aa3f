"""What the small studies share: shapes of byte-level decoders, and the runs that make a joint fit well posed."""

import itertools
from collections.abc import Mapping, Sequence

from atlas.data import mixtures
from atlas.training import RunConfig, vary
from models import ModelConfig

Sizes = Mapping[str, tuple[int, int]]  # name → model width, layers


def decoder(d_model: int, layers: int, window: int, attention: str = "gated_sparse") -> ModelConfig:
    """A decoder with heads of width 16 whose queries select a quarter of the window on average."""
    heads = max(d_model // 16, 1)
    return ModelConfig(
        d_model=d_model,
        layers=layers,
        heads=heads,
        kv_heads=heads // 2 if heads % 2 == 0 else heads,
        head_width=16,
        d_ff=4 * d_model,
        attention=attention,
        k_base=window // 4,
        k_min=window // 32,
        k_max=window // 2,
        scan_layers=False,  # a few layers compile as fast unrolled, and run faster on a CPU
    )


def run_of(config: RunConfig, sizes: Sizes, group: str, size: str, mixture: str, **changes: object) -> RunConfig:
    """The base run at a size, on a mixture; window and attention are the base's."""
    model = decoder(*sizes[size], config.data.window, config.model.attention)
    model.dtype, model.scan_layers = config.model.dtype, config.model.scan_layers
    base = {"name": f"{group}-{size}", "group": group, "mixture": mixture, "model": model}
    return vary(config, base | changes)


def design(
    config: RunConfig, sizes: Sizes, middle: str, subsets: Mapping[str, Sequence[Sequence[str]]], uneven: int
) -> list[RunConfig]:
    """The runs of a study.

    Every size trains each language alone, the even mixtures of `subsets` (group → sets of languages) and that of all;
    the `middle` size trains every pair and so many `uneven` Dirichlet mixtures, without which shares and transfer are
    confounded.
    """

    def at(group: str, size: str, mixture: str, **changes: object) -> RunConfig:
        return run_of(config, sizes, group, size, mixture, **changes)

    languages = config.data.languages
    named = [(group, languages_of) for group, sets in subsets.items() for languages_of in sets]
    return [
        *(at("monolingual", size, language) for size in sizes for language in languages),
        *(at("bilingual", middle, f"uniform({a},{b})") for a, b in itertools.combinations(languages, 2)),
        *(at(group, size, f"uniform({','.join(names)})") for size in sizes for group, names in named),
        *(at("all", size, "uniform(*)") for size in sizes),
        *(at("dirichlet", middle, mixtures.dirichlet(languages, seed), seed=seed) for seed in range(uneven)),
    ]
