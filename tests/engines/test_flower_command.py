"""The ``flwr`` command in our hands, played by a script: what it may take, and what it may say."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from fl_app.engines.deployment import _stopped_with
from fl_app.engines.flower_command import FlowerCommand, SuperLinkError, _lines
from fl_app.engines.superlink import wait_for_supernodes
from fl_app.types import InterruptedRunError

HANGS = "sleep 60 & wait"
STOPPED = """echo '{"success": true, "run-id": "7"}'"""
REFUSED = """echo '{"success": false, "error-message": "it has ended"}'"""


def command(folder: Path, script: str) -> FlowerCommand:
    """Return one whose ``flwr`` does what a script says."""
    flwr = folder / "flwr"
    flwr.write_text(f"#!/bin/sh\n{script}\n")
    flwr.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    made = FlowerCommand(
        home=folder / "home", address="there:1", insecure=True, environment=environment
    )
    made.run_id = "7"
    return made


@pytest.fixture(autouse=True)
def _found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`subprocess` looks for a command in this process's own PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_a_question_that_hangs_is_given_up_with_all_that_it_started(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(SuperLinkError, match="flwr ls: no answer in 0 s"):
        command(tmp_path, HANGS).answer("ls", timeout_s=0.3)
    assert time.monotonic() - began < 20


def test_a_superlink_that_hangs_does_not_outlive_the_time_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fl_app.engines.superlink.TIMEOUT_S", 0.3)
    began = time.monotonic()
    with pytest.raises(SuperLinkError, match="flwr supernode: no answer"):
        wait_for_supernodes(command(tmp_path, HANGS), patience_s=0.5)
    assert time.monotonic() - began < 20


def test_a_log_that_says_nothing_any_more_is_ended(tmp_path: Path) -> None:
    process = command(tmp_path, f"echo one; sleep 0.2; echo two; {HANGS}").start("log")
    began = time.monotonic()
    assert list(_lines(process, silent_s=3.0)) == ["one\n", "two\n"]
    assert 3.0 <= time.monotonic() - began < 20
    assert process.returncode == -9


def test_a_run_that_is_interrupted_is_stopped(tmp_path: Path) -> None:
    with (
        pytest.raises(InterruptedRunError, match=r"^interrupted; the run goes on with: .*=here$"),
        _stopped_with(command(tmp_path, STOPPED), "here"),
    ):
        raise KeyboardInterrupt


def test_a_run_that_could_not_be_stopped_is_said_to_go_on(tmp_path: Path) -> None:
    with (
        pytest.raises(
            InterruptedRunError,
            match=r"run 7 was not stopped at there:1 \(flwr stop: it has ended\).*resume=here",
        ),
        _stopped_with(command(tmp_path, REFUSED), "here"),
    ):
        raise KeyboardInterrupt
