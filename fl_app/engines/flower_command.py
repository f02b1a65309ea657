"""The ``flwr`` command, at home in a folder of its own: submits a run, follows it, judges it.

The connections of whoever runs this stay as they are, and so does what they have configured.
Flower's word on a run and the run's own must agree: `flwr run` exits with 0 for a run that failed,
and one whose clients never answered counts as completed there.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from fl_app.config import to_json
from fl_app.run_log import Heard
from fl_app.types import ConfigError, FlAppError

log = logging.getLogger(__name__)

CONNECTION = "federation"
"""Name of the SuperLink among the connections of the `flwr` command."""

POLL_S = 1.0
"""Seconds between two looks at a run whose log has ended, or cannot be had."""

ANSWER_S = 60.0
"""Seconds that a question may take, the start of the command included."""

SILENT_S = 600.0
"""Seconds without a line after which a log is asked for anew: its link may be dead."""

_LAST_LINES = 15

_STARTED = re.compile(r"Successfully started run (\d+)")
_STREAM_BEGINS = "Starting logstream for run_id"

# What Flower says of its own doings; the rest of a run's log is worth a person's time.
_CHATTER = re.compile(
    r"(\x1b\[\d+m)?(INFO|DEBUG)\b|.*default simulated SuperNodes changed|Using SuperLink|"
    r"Successfully (started|installed)|"
    # A library of the ServerApp's that logs through absl has set up a handler for all.
    r"\d\d/\d\d/\d{4} [\d:]+:(DEBUG|INFO):|.*Manually terminating ClientAppActor|\s*$"
)

_APP = {
    # Whatever is installed or on sys.path where it runs is what runs: nothing of it is copied.
    "pyproject.toml": """
        [project]
        name = "fl-app"
        version = "0"
        description = "What this installation of fl-app has to run."
        license = "Apache-2.0"
        [tool.flwr.app]
        publisher = "fl-app"
        fab-include = ["entry_server.py", "entry_client.py"]
        [tool.flwr.app.components]
        serverapp = "entry_server:app"
        clientapp = "entry_client:app"
        [tool.flwr.app.config]
        config-json = ""
        launched-at = 0.0
        collect = false
    """,
    # Apart, since each message to a client costs the import of what its side names.
    "entry_server.py": "from fl_app import server_app\n\napp = server_app.app",
    "entry_client.py": "from fl_app import client_app\n\napp = client_app.app",
}


class FlowerRunError(FlAppError):
    """Flower did not complete a run."""


class SuperLinkError(FlAppError):
    """A SuperLink refused what was asked of it, or gave no answer."""


def flower_environment() -> dict[str, str]:
    """Return the environment of Flower's processes: they import what can be imported here."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    return {
        **os.environ,
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "PATH": path,
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
        "PYTHONUNBUFFERED": "1",  # the log is followed as it is written
    }


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a run ended.

    Attributes:
        status: Flower's word, such as ``finished:completed``.
        heard: The run's own.
        lines: The last of its log, chatter aside.
    """

    status: str
    heard: Heard
    lines: Sequence[str]


@dataclass(kw_only=True)
class FlowerCommand:
    """The ``flwr`` command and one SuperLink.

    Attributes:
        home: Its FLWR_HOME, a folder that is this object's alone.
        address: ``host:port`` of the SuperLink.
        root_certificates: The CA that vouches for it; None for those that the system trusts.
        insecure: Whether it speaks no TLS.
        environment: Of all that is started.
        patience_s: Seconds without an answer after which a SuperLink is given up that has answered.
        run_id: Of the run that was submitted, once one was.
    """

    home: Path
    address: str
    root_certificates: Path | None = None
    insecure: bool = False
    environment: Mapping[str, str] = field(default_factory=flower_environment)
    patience_s: float = 0.0
    run_id: str | None = None

    def __post_init__(self) -> None:
        self.home.mkdir(exist_ok=True)
        lines = [f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]']
        lines.append(f"address = {json.dumps(self.address)}")
        if self.insecure:
            lines.append("insecure = true")
        elif self.root_certificates is not None:
            lines.append(f"root-certificates = {json.dumps(str(self.root_certificates.resolve()))}")
        (self.home / "config.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
        app = self.home / "app"
        app.mkdir(exist_ok=True)
        for name, content in _APP.items():
            lines = [line.strip() for line in content.strip().splitlines()]
            (app / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start the command; Ctrl-C does not reach it."""
        return subprocess.Popen(
            ["flwr", *arguments],
            env={**self.environment, "FLWR_HOME": str(self.home)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )

    def answer(self, *arguments: str, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """Return what ``flwr <arguments>`` answers.

        Raises:
            SuperLinkError: It is no answer, came too late, or says that it failed.
        """
        process = self.start(*arguments, "--format", "json")
        with process:
            try:
                printed, _ = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired as error:
                raise SuperLinkError(
                    f"flwr {arguments[0]}: no answer in {timeout_s:.0f} s"
                ) from error
            finally:
                _kill(process)
        told: dict[str, Any] = {}
        with suppress(ValueError):
            told = json.loads(printed[printed.find("{") :])
        if not told.get("success", bool(told)):
            reason = told.get("error-message") or plain(printed)
            raise SuperLinkError(f"flwr {arguments[0]}: {reason}")
        return told

    def play(
        self,
        config: Mapping[str, Any],
        *,
        launched_at: float,
        options: Sequence[str] = (),
        collect: bool = False,
        submitted: Callable[[], None] = lambda: None,
    ) -> Ended:
        """Submit a run and follow it to its end, and through restarts of the SuperLink.

        Args:
            config: What the ServerApp is to play.
            launched_at: `time.time` value when the command was started.
            options: Further ones of ``flwr run``.
            collect: Whether the ServerApp is to send the run's files along.
            submitted: Called once the SuperLink has taken the run.

        Raises:
            SuperLinkError: It did not take the run, or was lost on the way.
        """
        run_config = self.home / "run.toml"  # a file, so that no shell and no parser eats quotes
        run_config.write_text(
            # A JSON string is a TOML string.
            f"config-json = {json.dumps(to_json(config))}\nlaunched-at = {float(launched_at)!r}\n"
            f"collect = {'true' if collect else 'false'}\n",
            encoding="utf-8",
        )
        submit = ["run", str(self.home / "app"), CONNECTION, "--run-config", str(run_config)]
        shown, self.run_id = _Shown(), None
        for line in _lines(self.start(*submit, *options, "--stream")):
            shown.take(line)
            if self.run_id is None and (found := _STARTED.search(line)):
                self.run_id = found[1]
                submitted()
        if self.run_id is None:
            raise SuperLinkError(f"the run was not taken: {plain(' '.join(shown.all_kept))}")
        return Ended(status=self._followed(shown), heard=shown.heard, lines=list(shown.kept))

    def _followed(self, shown: _Shown) -> str:
        """Show the rest of the run's log, however often it breaks off; return the run's status."""
        lost_at = None
        while True:
            try:
                status = self.status()
                lost_at = None
            except SuperLinkError as error:
                status = "lost"
                lost_at = time.monotonic() if lost_at is None else lost_at
                if time.monotonic() - lost_at >= self.patience_s:
                    raise SuperLinkError(
                        f"the SuperLink at {self.address} does not answer any more ({error}). A "
                        "SuperLink that is started again with its database goes on with the run."
                    ) from error
                log.info("The SuperLink does not answer: waiting for it.")
            if status.startswith("finished"):
                if not shown.heard.outcome:  # the log broke off before its end
                    self._read_on(shown)
                return status
            if status != "lost":
                self._read_on(shown)
            time.sleep(POLL_S)

    def _read_on(self, shown: _Shown) -> None:
        shown.begin_again()
        for line in _lines(self.start("log", str(self.run_id), CONNECTION, "--stream")):
            shown.take(line)

    def status(self) -> str:
        """Return Flower's word on the run, such as ``running`` or ``finished:completed``."""
        told = self.answer("ls", CONNECTION, "--run-id", str(self.run_id))
        try:
            return str(told["runs"][0]["status"])
        except (LookupError, TypeError) as error:
            raise SuperLinkError(f"flwr ls knows nothing of run {self.run_id}.") from error

    def stop(self) -> None:
        """Have the run ended, if it has begun.

        Raises:
            SuperLinkError: It was not, as far as can be told.
        """
        if self.run_id is not None:
            self.answer("stop", self.run_id, CONNECTION)


def judge(ended: Ended, what: str, *, folder: object = None) -> Mapping[str, str]:
    """Return the outcome of a run that was completed.

    Args:
        ended: How it ended.
        what: Who played it, for the message.
        folder: The run's, if it can go on from what it left.

    Raises:
        ConfigError: The ServerApp says that it cannot be run.
        FlowerRunError: It failed, by Flower's word or by its own.
    """
    raise_for(ended.heard.outcome, ended.lines)
    if ended.status != "finished:completed" or "run_dir" not in ended.heard.outcome:
        goes_on = "" if folder is None else f"; it goes on with: fl-app run resume={folder}"
        message = f"{what} ended as {ended.status}{goes_on}"
        raise FlowerRunError(with_last_lines(message, ended.lines))
    return ended.heard.outcome


def summarised(run_dir: Path, ended: Ended) -> Path:
    """Return a run's folder, in which it says what came of it.

    Raises:
        FlowerRunError: It does not.
    """
    if not (run_dir / "summary.json").is_file():
        message = f"{run_dir} holds no summary.json, though the run ended as {ended.status}"
        raise FlowerRunError(with_last_lines(message, ended.lines))
    return run_dir


def raise_for(outcome: Mapping[str, str], lines: Sequence[str]) -> None:
    """Raise what the ServerApp raised, if it did, in words for the person at the terminal."""
    kind, error = outcome.get("kind"), outcome.get("error", "")
    if kind == "config":
        raise ConfigError(error)
    if kind == "known":
        raise FlowerRunError(error)
    if kind is not None:
        raise FlowerRunError(with_last_lines(f"the run failed with {kind}: {error}", lines))


def with_last_lines(message: str, lines: Sequence[str]) -> str:
    """Return a message and the last lines of a log."""
    last = [line for line in lines if line.strip()][-_LAST_LINES:]
    return "\n".join([f"{message}; the last lines of its log:", *last]) if last else f"{message}."


def plain(printed: str) -> str:
    """Return in one line what Flower prints, without frames and colours."""
    return " ".join(re.sub(r"\x1b\[\d*m|[│╭╮╰╯─]", " ", printed).split())


@dataclass(kw_only=True)
class _Shown:
    """The log of a run: shown if logs are, remembered for messages, and never shown twice."""

    heard: Heard = field(default_factory=Heard)
    kept: deque[str] = field(default_factory=lambda: deque(maxlen=200))
    all_kept: deque[str] = field(default_factory=lambda: deque(maxlen=50))
    _seen: int = 0
    _skip: int = 0
    _streaming: bool = False

    def begin_again(self) -> None:
        """Expect a log that begins with all that has been seen."""
        self._skip, self._streaming = self._seen, False

    def take(self, line: str) -> None:
        self.all_kept.append(line)
        if not self._streaming:
            self._streaming = _STREAM_BEGINS in line
            return
        if self._skip:
            self._skip -= 1
            return
        self._seen += 1
        if self.heard.take(line) or _CHATTER.match(line):
            return
        self.kept.append(line.rstrip())
        if log.isEnabledFor(logging.INFO):
            typer.echo(line.rstrip(), err=True)


def _lines(process: subprocess.Popen[str], *, silent_s: float = SILENT_S) -> Iterator[str]:
    """Yield what a process prints until it ends; it ends with whoever stops asking.

    It is ended, too, once it has printed nothing for some time.
    """
    ended, heard_at = threading.Event(), time.monotonic()

    def watch() -> None:
        while not ended.wait(max(0.0, heard_at + silent_s - time.monotonic())):
            if time.monotonic() - heard_at >= silent_s:
                _kill(process)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    with process:
        watcher.start()
        try:
            for line in process.stdout or ():
                heard_at = time.monotonic()
                yield line
        finally:
            ended.set()
            watcher.join()
            _kill(process)


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process that `FlowerCommand.start` has started, and all that it started."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
