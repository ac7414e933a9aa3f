"""Off-the-shelf weights in our decoder: Hugging Face directories, read and written."""

from models.pretrained.checkpoint import Pretrained, load_pretrained, save_pretrained

__all__ = ["Pretrained", "load_pretrained", "save_pretrained"]
