"""``fl-app run -m``: every member of a sweep played, and the table of what came of them.

Hydra's launcher may play members in other processes, so what comes of one reaches the others
through `SweepFile` alone.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from fl_app.errors import ConfigError, FlAppError, InterruptedRunError
from fl_app.launch import call_with_hydra, composed_run, objective_of, play
from fl_app.run_config import register
from fl_app.tracking.sweep_file import Member, MemberStatus, SweepFile, common_overrides

log = logging.getLogger(__name__)

_announced: ContextVar[list[Path]] = ContextVar("announced")
"""Where `OneFolder`, which Hydra makes from its name and so can be handed nothing, leaves word."""


def run_sweep(arguments: Sequence[str], *, as_json: bool, launched_at: float) -> None:
    """Play the sweep that Hydra makes of the arguments, and print what came of it.

    Args:
        arguments: Hydra's overrides and flags, without ``-m``.
        as_json: Whether one line of JSON a member is all that goes to stdout.
        launched_at: `time.time` value when the command was started.

    Raises:
        FlAppError: Members failed; a ConfigError if that is what all of them failed of.
        InterruptedRunError: Ctrl-C was pressed.
    """
    folders: list[Path] = []
    token = _announced.set(folders)
    try:
        job = PlayMember(as_json=as_json, launched_at=launched_at, launcher_pid=os.getpid())
        callback = f"+hydra.callbacks.fl_app._target_={__name__}.{OneFolder.__name__}"
        logging.getLogger("hydra").setLevel(logging.WARNING)  # its launchers repeat what we say
        call_with_hydra(job, ["--multirun", *arguments, callback])
    except KeyboardInterrupt:
        message = _conclude(folders, as_json=as_json)
        raise InterruptedRunError(message or "interrupted before a run was done.") from None
    except Exception as error:
        if not _members(folders):  # nothing has begun: the input is at fault
            raise
        message = _conclude(folders, as_json=as_json)
        raise FlAppError(f"the sweep was ended by a {type(error).__name__}. {message}") from error
    finally:
        _announced.reset(token)
    message = _conclude(folders, as_json=as_json)
    failed = [m for m in _members(folders) if m.status is not MemberStatus.OK]
    if failed:
        kind = ConfigError if all(member.exit_code == 2 for member in failed) else FlAppError
        raise kind(message)


class OneFolder(Callback):
    """Settles a sweep's folder once: its members may be of several names, hours and processes."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Make the folder, one that no other sweep has used, and hand it on to all members."""
        try:
            folder = _new_folder(Path(config.hydra.sweep.dir).absolute())
        except (OSError, ValueError, OmegaConfBaseException):
            return  # Hydra meets the same error next, and tells it
        quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
        with read_write(config), open_dict(config):
            config.hydra.sweep.dir = str(folder)
            # From these Hydra composes each member's configuration anew.
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{quoted}'")
        _announced.get().append(folder)


def _new_folder(wanted: Path) -> Path:
    path, number = wanted, 1
    while True:
        path.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            SweepFile(path).create()
            return path
        number += 1
        path = wanted.with_name(f"{wanted.name}_{number}")


@dataclass(frozen=True, kw_only=True)
class PlayMember:
    """The job that Hydra's launcher calls once for each member, in this process or in another.

    Attributes:
        as_json: Whether only warnings are shown.
        launched_at: When the command was started, which is when the first member was.
        launcher_pid: Process of the launcher.
    """

    as_json: bool
    launched_at: float
    launcher_pid: int

    def __reduce__(self) -> tuple[Callable[..., PlayMember], tuple[object, ...]]:
        return _in_another_process, (self.as_json, self.launched_at, self.launcher_pid)

    def __call__(self, composed: DictConfig) -> float:
        """Play a member; return its objective, or NaN if it failed, which ends no other."""
        hydra = HydraConfig.get()
        folder, sweep_dir = Path(hydra.runtime.output_dir), Path(hydra.sweep.dir)
        record = SweepFile(sweep_dir)
        member = Member(
            number=int(hydra.job.num),
            overrides=dict(map(_key_and_value, hydra.overrides.task)),
            status=MemberStatus.RUNNING,
            run_dir=str(folder),
        )
        record.put(member)
        try:
            run_dir, summary = self._play(composed, folder, sweep_dir, member)
        except (KeyboardInterrupt, InterruptedRunError):
            record.put(replace(member, status=MemberStatus.INTERRUPTED))
            raise KeyboardInterrupt from None  # no further member begins
        except Exception as error:
            record.put(_failed(member, error, folder))
            return math.nan
        record.put(replace(member, status=MemberStatus.OK, run_dir=str(run_dir), summary=summary))
        if not self.as_json:
            typer.echo(f"Run {member.number} is done: {run_dir}", err=True)
        return objective_of(summary)

    def _play(
        self, composed: DictConfig, folder: Path, sweep_dir: Path, member: Member
    ) -> tuple[Path, dict[str, Any]]:
        elsewhere = os.getpid() != self.launcher_pid
        if not self.as_json:
            typer.echo(f"Run {member.number}: {_words(member)}", err=True)
        config = _grouped(composed_run(composed, folder), sweep_dir.name)
        if elsewhere:  # several bars would write over one another
            config["progress"] = "none"
        first = member.number == 0 and not elsewhere
        return play(
            config,
            launched_at=self.launched_at if first else time.time(),
            quiet=self.as_json,
            mark=f"run {member.number}: " if elsewhere else "",
        )


def _in_another_process(as_json: bool, launched_at: float, launcher_pid: int) -> PlayMember:
    """Return the job where a launcher has sent it, once Hydra can compose our files there too."""
    register()
    return PlayMember(as_json=as_json, launched_at=launched_at, launcher_pid=launcher_pid)


def _key_and_value(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def _words(member: Member, *, but: Mapping[str, str] | None = None) -> str:
    """Return a member's overrides as they were typed, but for those of some keys."""
    chosen = member.overrides.items()
    return " ".join(f"{key}={value}" for key, value in chosen if key not in (but or {}))


def _grouped(config: dict[str, Any], group: str) -> dict[str, Any]:
    """Return the configuration with its tracker told to show the members of a sweep together."""
    tracking = config["tracking"]
    if tracking and "group" in tracking and tracking["group"] is None:
        return {**config, "tracking": {**tracking, "group": group}}
    return config


def _failed(member: Member, error: Exception, folder: Path) -> Member:
    """Return a member that failed, after saying so; what is no error of ours with a traceback."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    ours = isinstance(error, FlAppError)
    message = str(error) if ours else f"{type(error).__name__}: {error}"
    typer.echo(f"Error: run {member.number}: {message}", err=True)
    if not ours:
        log.error("run %d failed in a way that nobody foresaw", member.number, exc_info=error)
    return replace(
        member,
        status=MemberStatus.FAILED,
        error=message,
        exit_code=2 if isinstance(error, ConfigError) else 1,
        run_dir=str(folder) if folder.is_dir() else "",
    )


def _members(folders: Sequence[Path]) -> list[Member]:
    return SweepFile(folders[0]).members() if folders else []


def _conclude(folders: Sequence[Path], *, as_json: bool) -> str:
    """Print the table of a sweep, and return in words what went wrong, or ""."""
    members = _members(folders)
    if not members:
        return ""
    record = SweepFile(folders[0])
    for index, member in enumerate(members):
        if member.status is MemberStatus.RUNNING:  # its process was ended
            members[index] = replace(member, status=MemberStatus.INTERRUPTED)
            record.put(members[index])
    if as_json:
        for member in members:
            typer.echo(json.dumps(member.to_json()))
    else:
        from fl_app.tracking.console import print_sweep

        print_sweep(members)
        typer.echo(record.csv_path)
    return _what_went_wrong(members)


def _what_went_wrong(members: Sequence[Member]) -> str:
    sentences = []
    common = common_overrides(members)
    failed = [m for m in members if m.status is MemberStatus.FAILED]
    if failed:
        which = ", ".join(f"{m.number} ({_words(m, but=common)})" for m in failed)
        sentences.append(f"{len(failed)} of {len(members)} runs failed: {which}; see above.")
    sentences += [
        f"Run {m.number} was interrupted; if it had begun, it goes on with: "
        f"fl-app run resume={m.run_dir}"
        for m in members
        if m.status is MemberStatus.INTERRUPTED
    ]
    return " ".join(sentences)
