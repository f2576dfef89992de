"""Namespaces of a test's own: file systems and process numbers that nobody else sees."""

from __future__ import annotations

import shutil
import subprocess
import tempfile

import pytest


def namespaces(*options: str) -> list[str]:
    """What starts a command with mounts of its own, and what `options` of unshare add. Where users may not: a skip."""
    unshare = ["unshare", "--user", "--map-root-user", "--mount", *options]
    probe = [*unshare, "mount", "-t", "tmpfs", "none", tempfile.gettempdir()]
    if not shutil.which("unshare") or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("this system lets users make no namespaces with mounts of their own (unshare, of util-linux)")
    return unshare
