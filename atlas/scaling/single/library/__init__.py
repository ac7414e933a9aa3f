"""The laws, a file each: every module here defines `LAWS`, a tuple of `atlas.scaling.single.specification.Law`."""

import importlib
import pkgutil
from collections.abc import Mapping

from atlas.scaling.single.specification import Law


def _found() -> dict[str, Law]:
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    laws = [law for name in modules for law in importlib.import_module(f"{__name__}.{name}").LAWS]
    return {law.name: law for law in laws}


LAWS: Mapping[str, Law] = _found()
