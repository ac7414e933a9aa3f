"""Off-the-shelf weights in our decoder: Hugging Face directories read and written, and gated sparse attention added."""

from models.pretrained.checkpoint import Pretrained, load_pretrained, save_pretrained
from models.pretrained.conversion import to_gated_sparse

__all__ = ["Pretrained", "load_pretrained", "save_pretrained", "to_gated_sparse"]
