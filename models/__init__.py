"""Networks: the decoder and its attention variants. Knows nothing of `atlas`."""

from models.attention import RunningVariance
from models.config import ModelConfig, shape, shape_table
from models.conversion import become, can_become
from models.decoder import Decoder, array_shapes, count_params
from models.loss import document_segments, token_losses

__all__ = [
    "Decoder",
    "ModelConfig",
    "RunningVariance",
    "array_shapes",
    "become",
    "can_become",
    "count_params",
    "document_segments",
    "shape",
    "shape_table",
    "token_losses",
]
