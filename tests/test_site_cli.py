"""``fl-app site``: starts a worker, or says in one message why it cannot."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import environment, fl_app
from site_client import OPEN_POLICY, PRIVATE_POLICY


def policy_file(folder: Path, text: str = OPEN_POLICY) -> Path:
    path = folder / "policy.yaml"
    path.write_text(text)
    path.chmod(0o600)
    (folder / "state").mkdir(exist_ok=True)
    return path


def started(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fl_app", "site", "--policy", str(folder / "policy.yaml")]
    paths = ["--socket", str(folder / "socket"), "--state", str(folder / "state")]
    return subprocess.Popen(
        [*command, *paths], env=environment(), stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        (OPEN_POLICY, ["--state", "nowhere"], "state=nowhere cannot be written by this user"),
        (OPEN_POLICY + "data: gone.csv\n", [], "gone.csv of the policy is not there: mount"),
        (OPEN_POLICY + "budget: 3\n", [], "budget is not a key of a policy"),
        (
            PRIVATE_POLICY.format(epsilon=1, unit="record").replace("ledger.j", "gone/ledger.j"),
            [],
            "gone cannot be written by this user",
        ),
    ],
)
def test_what_a_worker_cannot_do_is_said_before_it_listens(
    tmp_path: Path, text: str, options: list[str], words: str
) -> None:
    policy = policy_file(tmp_path, text)
    paths = ["--socket", str(tmp_path / "socket"), "--state", str(tmp_path / "state")]
    done = fl_app("site", "--policy", str(policy), *paths, *options, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "socket").exists()


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    done = fl_app("site", cwd=tmp_path)
    assert done.returncode == 2
    assert "--policy FILE, --socket PATH and --state FOLDER" in done.stderr
    done = fl_app("site", "health", "--socket", str(tmp_path / "none"), cwd=tmp_path)
    assert done.returncode == 1
    assert "nobody answers at" in done.stderr


@pytest.mark.slow
def test_a_worker_serves_until_it_is_ended_and_shares_its_state_with_no_other(
    tmp_path: Path,
) -> None:
    policy_file(tmp_path)
    worker = started(tmp_path)
    try:
        deadline = time.monotonic() + 60
        while fl_app(
            "site", "health", "--socket", str(tmp_path / "socket"), cwd=tmp_path
        ).returncode:
            assert worker.poll() is None and time.monotonic() < deadline
        second = started(tmp_path)
        assert second.wait(60) == 2
        assert second.stderr is not None and "another worker is using it" in second.stderr.read()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(20) == 0
        assert not (tmp_path / "socket").exists()
    finally:
        worker.kill()
        worker.wait()
