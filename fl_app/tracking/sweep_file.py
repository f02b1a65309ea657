"""``sweep.jsonl`` and ``sweep.csv``: what came of each member of a sweep.

Members write them as they begin and end, from whichever process they run in, so that they tell
all there is to tell whenever the sweep is ended, and by whatever means.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from fl_app.files import write_atomically
from fl_app.tracking.json_files import JSON, strict_json

_LAST = ("rounds_played", "seconds", "model_hash", "run_dir")


class MemberStatus(StrEnum):
    """Where a member of a sweep stands; one that is found RUNNING once all is over was killed."""

    RUNNING = "running"
    OK = "ok"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One run of a sweep.

    Attributes:
        number: Its place in the sweep, from 0.
        overrides: All that was chosen for it: key -> value, both as they were written.
        status: Where it stands.
        error: The message it failed with, or "".
        exit_code: What a command that had played it alone would have ended with.
        run_dir: Folder of the run, or "" if it left none.
        summary: Content of its ``summary.json``; empty unless it is OK.
    """

    number: int
    overrides: Mapping[str, str]
    status: MemberStatus
    error: str = ""
    exit_code: int = 0
    run_dir: str = ""
    summary: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, JSON]:
        """Return one object: the summary's own keys, and beside them what this class adds."""
        own = {k: v for k, v in asdict(self).items() if k != "summary"}
        return {name: strict_json(value) for name, value in {**own, **self.summary}.items()}


class SweepFile:
    """The record of a sweep in its folder. Several processes may write to it at a time."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "sweep.jsonl"
        self.csv_path = folder / "sweep.csv"

    def create(self) -> None:
        """Begin the record.

        Raises:
            FileExistsError: The folder has the record of another sweep.
        """
        self._path.open("x").close()

    def put(self, member: Member) -> None:
        """Record where a member stands, in place of what was recorded of it before.

        Raises:
            OSError: The folder cannot be written.
        """
        with self._locked():
            others = [other for other in self.members() if other.number != member.number]
            members = sorted([*others, member], key=lambda one: one.number)
            lines = [json.dumps(strict_json(asdict(one))) + "\n" for one in members]
            write_atomically(self._path, "".join(lines).encode())
            write_atomically(self.csv_path, _to_csv(members).encode())

    def members(self) -> list[Member]:
        """Return all members recorded so far, by number."""
        if not self._path.exists():
            return []
        entries = [json.loads(line) for line in self._path.read_text().splitlines()]
        return [Member(**{**entry, "status": MemberStatus(entry["status"])}) for entry in entries]

    @contextmanager
    def _locked(self) -> Generator[None, None, None]:
        with (self._path.parent / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _to_csv(members: Sequence[Member]) -> str:
    """Return one row a member; a cell is empty where a member has no such figure."""
    chosen = dict.fromkeys(key for member in members for key in member.overrides)
    figures = dict.fromkeys(name for member in members for name in figures_of(member))
    columns = dict.fromkeys(["number", *chosen, "status", "error", *figures, *_LAST])
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    for member in members:
        own = {"number": member.number, "status": str(member.status), "error": member.error}
        writer.writerow({**figures_of(member), **own, **_last(member), **member.overrides})
    return text.getvalue()


def common_overrides(members: Sequence[Member]) -> dict[str, str]:
    """Return the overrides that all members share, in the order in which they were given."""
    first, *others = members
    return {
        key: value
        for key, value in first.overrides.items()
        if all(other.overrides.get(key) == value for other in others)
    }


def figures_of(member: Member) -> dict[str, float]:
    """Return what was measured: metrics, fairness, and epsilon if there is a guarantee."""
    summary = member.summary
    fairness = {k: v for k, v in summary.get("fairness", {}).items() if k != "clients"}
    epsilon = summary.get("privacy", {}).get("epsilon_max")
    figures = {**summary.get("metrics", {}), **fairness, "epsilon": epsilon}
    return {name: value for name, value in figures.items() if value is not None}


def _last(member: Member) -> dict[str, object]:
    summary = member.summary
    return {
        # Not "rounds": that is the column of the override of this name.
        "rounds_played": summary.get("rounds", ""),
        "seconds": summary.get("time_s", {}).get("total", ""),
        "model_hash": summary.get("model_hash", ""),
        "run_dir": member.run_dir,
    }
