"""The warden ends what it started, however whoever started it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flower_process import processes_of
from helpers import environment

pytestmark = pytest.mark.slow

# A process whose child, in a session of its own, outlives it.
ORPHANING = (
    "import subprocess, sys, time;"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'],"
    " start_new_session=True);"
    "print('up', flush=True); {rest}"
)


def start(folder: Path, rest: str) -> subprocess.Popen[str]:
    folder.mkdir()
    command = [sys.executable, "-c", ORPHANING.format(rest=rest)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fl_app.engines.warden", str(folder), *command],
        env={**environment(), "FLWR_HOME": str(folder)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def assert_gone(folder: Path) -> None:
    deadline = time.monotonic() + 20
    while processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_of(folder)
    assert not folder.exists()


def test_closing_its_stdin_ends_the_command_and_orphans_in_sessions_of_their_own(
    tmp_path: Path,
) -> None:
    warden = start(tmp_path / "home", "time.sleep(600)")
    assert len(processes_of(tmp_path / "home")) == 3
    warden.send_signal(signal.SIGTERM)  # no way to end it
    warden.communicate(timeout=30)
    assert warden.returncode == 0
    assert_gone(tmp_path / "home")


def test_a_command_that_ends_by_itself_gives_its_exit_code_and_leaves_no_orphan(
    tmp_path: Path,
) -> None:
    warden = start(tmp_path / "home", "sys.exit(3)")
    assert warden.wait(timeout=30) == 3
    assert_gone(tmp_path / "home")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_outlives_a_parent_that_is_killed_and_clears_up(number: int, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "import subprocess, sys, time;"
        f"subprocess.Popen([sys.executable, '-m', 'fl_app.engines.warden', {str(home)!r},"
        " sys.executable, '-c', 'import time; time.sleep(600)'], stdin=subprocess.PIPE,"
        " start_new_session=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], env={**environment(), "FLWR_HOME": str(home)}
    )
    while len(processes_of(home)) < 3:
        time.sleep(0.05)
    os.kill(parent.pid, number)
    parent.wait()
    assert_gone(home)
