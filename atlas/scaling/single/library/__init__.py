"""The laws, a file each, listed here."""

from collections.abc import Mapping

from atlas.scaling.single.library import annealing, chinchilla, data_constrained, farseer, multilingual_share
from atlas.scaling.single.specification import Law

_FILES = (chinchilla, data_constrained, multilingual_share, farseer, annealing)
LAWS: Mapping[str, Law] = {law.name: law for file in _FILES for law in file.LAWS}
