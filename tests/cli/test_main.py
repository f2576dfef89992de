"""The command line's mistakes and endings: one line, the right exit code, never a traceback."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from pipeline.cli.main import main
from pipeline.core.loopback import free_port
from tests.launch import ROOT, environment

TINY = str(ROOT / "tests" / "configs" / "tiny.yaml")


def smalti(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of the real main(), in this process."""
    monkeypatch.setattr(sys, "argv", ["smalti", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "error: no command 'trian'; did you mean transformer or run?"),
        (["xqz"], "error: no command 'xqz'; expected one of cancel, data, "),
        (["run"], "error: Missing argument 'CONFIG'."),
        (["run", "/nowhere/a.yaml"], "error: no config at /nowhere/a.yaml"),
        (["run", "a" * 5000], "error: no config at"),
        (["run", TINY, "transformer.layers=0", "--print-config"], "error: "),
        (["run", TINY, "runs=/proc"], "error: "),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], line: str
) -> None:
    code, said = smalti(capsys, monkeypatch, *arguments)
    assert code == 2
    assert said.startswith(line)
    assert len(said.splitlines()) == 1, said


def test_what_a_mistake_quotes_cannot_command_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, said = smalti(capsys, monkeypatch, "run", TINY, "--print-config", "zz\x1b[31m=1")
    assert "\x1b" not in said
    assert "\\x1b[31m" in said


def test_a_variable_that_decides_results_is_told_before_the_first_stage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    code, said = smalti(capsys, monkeypatch, "run", TINY, f"runs={tmp_path}")
    assert code == 2
    assert "found ACCELERATE_USE_FSDP=true in the environment" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # many processes
def test_ctrl_c_at_any_moment_of_the_start_says_nothing_but_its_code() -> None:
    for after_s in (0.03, 0.06, 0.1, 0.15, 0.2, 0.3):
        child = subprocess.Popen(
            [sys.executable, "-m", "pipeline", "run", TINY, "--print-config"],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(after_s)
        child.send_signal(signal.SIGINT)
        said = child.communicate()[1]
        if "import_site" not in said and "runpy" not in said:  # Python's own start, before a line of ours runs
            assert child.returncode in (0, 130, -signal.SIGINT), said
            assert not said
        assert "/pipeline/cli/" not in said, said


def test_a_closed_pipe_is_no_crash() -> None:
    command = f"'{sys.executable}' -m pipeline run '{TINY}' --print-config | head -c 10"
    done = subprocess.run(command, shell=True, env=environment(), capture_output=True, text=True)
    assert done.stderr == ""


def _run_with(folder: Path, uri: str) -> Path:
    """A run directory whose metrics are at `uri`."""
    text = subprocess.run(
        [sys.executable, "-m", "pipeline", "run", TINY, "--print-config", f"runs={folder}", f"tracking.uri={uri}"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    run = folder / "tiny"
    run.mkdir()
    (run / "config.yaml").write_text(text)
    (run / "run.json").write_text('{"format": 1, "source": "tiny.yaml"}')
    return run


def test_ui_of_a_run_whose_metrics_are_on_a_server_names_the_server(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = _run_with(tmp_path, "http://tracking.invalid:8080")
    code, said = smalti(capsys, monkeypatch, "ui", str(run))
    assert code == 2
    assert "open http://tracking.invalid:8080 in a browser" in said
    assert len(said.splitlines()) == 1


@pytest.mark.slow
def test_sigterm_to_ui_ends_the_server_and_the_printed_page_was_there(tiny_run: Path, tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "pipeline", "ui", str(tiny_run), "--port", str(port)]
    ui = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    assert ui.stderr is not None
    line = next(text for text in ui.stderr if text.startswith("open "))
    assert f"http://127.0.0.1:{port}/#/experiments/" in line
    deadline = time.monotonic() + 60
    while not _answers(port):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert requests.get(line.split()[1], timeout=10).ok
    ui.terminate()
    ui.wait(timeout=30)
    deadline = time.monotonic() + 20
    while _answers(port):
        assert time.monotonic() < deadline, "the server runs on"
        time.sleep(0.2)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_ui_starts_its_server_leaves_no_server(number: signal.Signals) -> None:
    code = f"""
import os, signal, subprocess
from pipeline.cli import ui
started = subprocess.Popen
def start_and_be_signalled(*args, **kwargs):
    server = started(*args, **kwargs)
    os.kill(os.getpid(), {int(number)})
    return server
subprocess.Popen = start_and_be_signalled
print(ui._serve(["sleep", "60"], dict(os.environ)))
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=50)
    assert done.stdout == "0\n", done.stderr


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
