"""Whether what torch.compile calls is there: triton, a compiler, Python's headers."""

from __future__ import annotations

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile needs for `device` and does not find; None: nothing."""
    if device.type == "cuda" and find_spec("triton") is None:
        return "triton, which compiles for GPUs"
    if device.type == "cuda" and not _found("CC", "gcc", "clang", "cc"):
        return "a C compiler (gcc, clang, or $CC), which triton calls"
    if device.type == "cpu" and not _found("CXX", "g++", "clang++", "c++"):
        return "a C++ compiler (g++, clang++, or $CXX)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return None if header.exists() else f"Python's headers for the compiler, {header} (python3-dev or python3-devel)"


def _found(variable: str, *commands: str) -> bool:
    named = os.environ.get(variable)
    return any(shutil.which(command) for command in ([named.split()[0]] if named else commands))
