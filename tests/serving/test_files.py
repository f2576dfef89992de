"""What is handed over with the server: systemd takes its unit without a word."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch import ROOT


@pytest.mark.machine
def test_systemd_takes_the_unit_without_a_word(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze")
    unit = (ROOT / "configs" / "serving" / "smalti.service").read_text()
    command = "/opt/smalti/.venv/bin/smalti"
    assert command in unit
    (tmp_path / "smalti.service").write_text(unit.replace(command, shutil.which("true") or "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / "smalti.service")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
