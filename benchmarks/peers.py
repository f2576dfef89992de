"""The systems that the benchmarks stand beside, in one process with ours.

    pip install -e '.[bench]' && pip install --no-deps --no-build-isolation dalle-pytorch==1.6.6

`dalle-pytorch` asks for packages that no longer install (taming-transformers, youtokentome, torchvision,
setuptools' pkg_resources). It needs none of them for `DALLE` and `DiscreteVAE`, so `dalle_pytorch()`
puts empty modules in their places for as long as its import takes.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

_STAND_INS = {
    "pkg_resources": ("get_distribution",),
    "taming": (),
    "taming.models": (),
    "taming.models.vqgan": ("VQModel", "GumbelVQ"),
    "youtokentome": (),
    "torchvision": ("transforms",),
}


def dalle_pytorch() -> ModuleType | None:
    """The module `dalle_pytorch`, or None where it is not installed."""
    added = [name for name in _STAND_INS if name not in sys.modules]
    for name in added:
        stand_in = ModuleType(name)
        for attribute in _STAND_INS[name]:
            setattr(stand_in, attribute, object)
        sys.modules[name] = stand_in
    try:
        return importlib.import_module("dalle_pytorch")
    except ModuleNotFoundError as error:
        print(f"dalle-pytorch is left out ({error}); see benchmarks/peers.py", file=sys.stderr)
        return None
    finally:
        for name in added:
            del sys.modules[name]
