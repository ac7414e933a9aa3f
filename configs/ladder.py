"""Shapes of small byte-level decoders, from which the sweeps take their sizes N."""

from models import ModelConfig


def decoder(d_model: int, layers: int, window: int, attention: str = "gated_sparse") -> ModelConfig:
    """A decoder with heads of width 16 whose queries select a quarter of the window on average."""
    heads = max(d_model // 16, 1)
    return ModelConfig(
        d_model=d_model,
        layers=layers,
        heads=heads,
        kv_heads=max(heads // 2, 1) if heads % 2 == 0 else heads,
        head_width=16,
        d_ff=4 * d_model,
        attention=attention,
        k_base=window // 4,
        k_min=window // 32,
        k_max=window // 2,
        scan_layers=False,  # a few layers compile as fast unrolled, and run faster on a CPU
    )
