"""Python, the packages that this distribution requires, and those of its extras."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Iterator
from importlib import import_module, metadata

from packaging.requirements import Requirement

from pipeline.core.environment import refuse_what_decides_results
from pipeline.core.errors import UserError
from pipeline.doctor.finding import Finding, fail, note, ok

DISTRIBUTION = "smalti"
_OLDEST_PYTHON = (3, 11)
_FOR = {
    "demo": "configs/openmoji.yaml and the extractor efficientnet-lite0",
    "data": "the Hugging Face source, Parquet tables and s3:// paths",
}
# Those that load a compiled library or much code, and so may be installed and yet broken.
_IMPORTED = ("numpy", "torch", "deepspeed", "accelerate", "transformers", "tokenizers", "webdataset", "mlflow")


def python() -> Iterator[Finding]:
    found, oldest = sys.version_info[:2], ".".join(map(str, _OLDEST_PYTHON))
    where = f"{platform.python_version()}, {sys.executable}"
    if found < _OLDEST_PYTHON:
        yield fail("python", f"expected {oldest} or newer, found {where}: make the environment with a newer Python")
    else:
        yield ok("python", where)


def required() -> Iterator[Finding]:
    """Versions against what the distribution asks for."""
    requirements = _requirements(None)
    wrong = [(requirement, found) for requirement in requirements if (found := _wrong(requirement)) is not None]
    for requirement, found in wrong:
        yield fail(
            "packages",
            f"expected {requirement.name}{requirement.specifier}, found {found}:"
            f" pip install '{requirement.name}{requirement.specifier}'",
        )
    if not wrong:
        yield ok("packages", f"{len(requirements)} as required")


def imported() -> Iterator[Finding]:
    """Whether what is installed can be imported."""
    logging.getLogger("DeepSpeed").addFilter(lambda _record: False)  # it says how it feels about this machine
    versions = []
    for name in _IMPORTED:
        try:
            versions.append(f"{name} {getattr(import_module(name), '__version__', '')}".strip())
        except Exception as error:  # a library that does not match another one raises anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            yield fail("imports", f"expected to import {name}, found: {reason}: pip install --force-reinstall {name}")
    if versions:
        yield ok("versions", ", ".join(versions))


def extras() -> Iterator[Finding]:
    """The optional packages that users need, extra by extra."""
    for extra, purpose in _FOR.items():
        missing = [requirement.name for requirement in _requirements(extra) if _wrong(requirement) is not None]
        if missing:
            yield note(
                f"extra {extra}", f"missing {', '.join(missing)} ({purpose}): pip install '{DISTRIBUTION}[{extra}]'"
            )
        else:
            yield ok(f"extra {extra}", purpose)


def variables() -> Iterator[Finding]:
    """Environment variables that would change results behind the config's back."""
    try:
        refuse_what_decides_results(os.environ)
    except UserError as error:
        yield fail("environment", str(error))
    else:
        yield ok("environment", "no variable that changes results")


def _requirements(extra: str | None) -> list[Requirement]:
    """Of the distribution without extras, or what one extra adds."""
    listed = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    chosen = [r for r in listed if r.marker is None or r.marker.evaluate({"extra": extra or ""})]
    base = {r.name for r in listed if r.marker is None or r.marker.evaluate({"extra": ""})}
    return [r for r in chosen if extra is None or (r.name not in base and r.name != DISTRIBUTION)]


def _wrong(requirement: Requirement) -> str | None:
    """The version found where it does not satisfy the requirement, "none" where there is none; None: all is well."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return "none"
    return None if requirement.specifier.contains(version, prereleases=True) else version
