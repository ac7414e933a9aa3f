"""What the small studies share: shapes of byte-level decoders, and the runs that make a joint fit well posed."""

import itertools
from collections.abc import Mapping, Sequence

from atlas.data import mixtures
from atlas.training import align, chain, cross, each
from atlas.training.overlays import Overlay
from models import ModelConfig

Sizes = Mapping[str, tuple[int, int]]  # name → model width, layers
_HEAD_WIDTH = 16
_TILE = 32  # queries at a time, where a window has four tiles or more: faster on a CPU than all scores at once


def shape(d_model: int, layers: int) -> dict[str, int]:
    """The model's settings that its size decides."""
    heads = max(d_model // _HEAD_WIDTH, 1)
    kv_heads = heads // 2 if heads % 2 == 0 else heads
    return {"d_model": d_model, "layers": layers, "heads": heads, "kv_heads": kv_heads, "d_ff": 4 * d_model}


def decoder(size: tuple[int, int], window: int, attention: str = "gated_sparse") -> ModelConfig:
    """A decoder; of the sparse kinds, one whose queries select a quarter of the window on average."""
    return ModelConfig(
        **shape(*size),
        head_width=_HEAD_WIDTH,
        attention=attention,
        k_base=window // 4,
        k_min=window // 32,
        k_max=window // 2,
        query_chunk=_TILE if window >= 4 * _TILE else 0,
        scan_layers=False,  # a few layers compile as fast unrolled, and run faster on a CPU
    )


def grid(group: str, sizes: Sizes, mixtures: Sequence[str]) -> list[Overlay]:
    """A group of runs: every size on every mixture."""
    shapes = [
        {"name": name} | {f"model.{key}": value for key, value in shape(*size).items()} for name, size in sizes.items()
    ]
    return cross([{"name": group, "group": group}], shapes, each("mixture", mixtures))


def design(
    languages: Sequence[str], sizes: Sizes, middle: str, uneven: int, pairs: Sequence[tuple[str, str]] = (),
    **subsets: Sequence[Sequence[str]],
) -> list[Overlay]:  # fmt: skip
    """The runs of a study.

    Every size trains each language alone, the even mixtures of `subsets` (group → sets of languages) and that of all;
    the `middle` size trains every pair, or those that are given, and so many `uneven` Dirichlet mixtures, without which
    shares and transfer are confounded. Of two languages the pair is all.
    """
    one = {middle: sizes[middle]}
    pairs = pairs or list(itertools.combinations(languages, 2))
    drawn = [mixtures.dirichlet(languages, seed) for seed in range(uneven)]
    return chain(
        grid("monolingual", sizes, languages),
        grid("bilingual", one, [f"uniform({a},{b})" for a, b in pairs]),
        *(grid(group, sizes, [f"uniform({','.join(names)})" for names in sets]) for group, sets in subsets.items()),
        grid("all", sizes, ["uniform(*)"]),
        align(grid("dirichlet", one, drawn), each("seed", range(uneven))),
    )
