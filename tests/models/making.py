"""Decoders for tests, made by one compiled program instead of one for every shape of an array."""

from flax import nnx

from models import Decoder, ModelConfig


def make_decoder(config: ModelConfig, seed: int = 0) -> Decoder:
    return nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(seed)))()


def make_graphdef(config: ModelConfig) -> nnx.GraphDef:
    """Of a decoder of which no array is made."""
    return nnx.graphdef(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
