"""Off-the-shelf weights in our decoder: Hugging Face directories, read; those of a Llama written, too."""

from models.pretrained.checkpoint import Pretrained, load_pretrained, save_pretrained

__all__ = ["Pretrained", "load_pretrained", "save_pretrained"]
