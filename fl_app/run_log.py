"""What a ServerApp tells its launcher, as lines of the run's log: nothing else leaves its machine.

Whatever else is logged may quote a client, and so hold anything. Only the last outcome counts,
which the ServerApp writes when nobody else speaks any more, and only files with the digest that it
names.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fl_app.errors import FlAppError
from fl_app.files import write_atomically

RUN_FILES = (
    "config.yaml",
    "rounds.jsonl",
    "summary.json",
    "clients.json",
    "partition.json",
    "report.html",
    "model.safetensors",
)
"""Files of a run that travel, the largest last."""

MOST_BYTES = 64 << 20
"""Bytes of files that a run's log is made to carry, packed and unpacked alike."""

_OUTCOME = "fl-app-outcome "
_FILES = "fl-app-files "
_LINE_BYTES = 48 << 10


class CollectError(FlAppError):
    """The files of a run did not come as they were sent."""


def outcome_line(outcome: Mapping[str, str]) -> str:
    """Return the line that tells what came of a run."""
    return f"{_OUTCOME}{json.dumps(dict(outcome))}"


def pack(run_dir: Path, *, most_bytes: int = MOST_BYTES) -> tuple[bytes, list[str]]:
    """Return the files of a run in one archive, and the names of those it has no room for."""
    left_out, room, content = [], most_bytes, io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz", compresslevel=1) as archive:
        for name in RUN_FILES:
            path = run_dir / name
            if not path.is_file():
                continue
            # Floats hardly shrink, so the archive stays below the limit if the files do.
            if (size := path.stat().st_size) > room:
                left_out.append(name)
                continue
            room -= size
            archive.add(path, arcname=name)
    return content.getvalue(), left_out


def file_lines(archive: bytes) -> Iterator[str]:
    """Yield the lines that carry an archive."""
    digest = digest_of(archive)
    for start in range(0, len(archive), _LINE_BYTES):
        piece = base64.b64encode(archive[start : start + _LINE_BYTES]).decode()
        yield f"{_FILES}{digest} {piece}"


def digest_of(archive: bytes) -> str:
    """Return what an archive is known by."""
    return hashlib.sha256(archive).hexdigest()


@dataclass(kw_only=True)
class Heard:
    """What a launcher has been told so far.

    Attributes:
        outcome: ``run_dir``, and ``digest`` if files were sent; or ``error`` and ``kind``; empty
            if nothing was said.
    """

    outcome: dict[str, str] = field(default_factory=dict)
    _pieces: dict[str, list[str]] = field(default_factory=dict)
    _room: int = 2 * MOST_BYTES

    def take(self, line: str) -> bool:
        """Return whether a line of the log was for the launcher, which then knows what it says."""
        if line.startswith(_FILES):
            digest, _, piece = line.removeprefix(_FILES).rstrip().partition(" ")
            self._room -= len(piece)
            if self._room >= 0:
                self._pieces.setdefault(digest, []).append(piece)
            return True
        if not line.startswith(_OUTCOME):
            return False
        try:
            told = json.loads(line.removeprefix(_OUTCOME))
        except ValueError:
            return False
        if isinstance(told, dict):
            self.outcome = {str(key): str(value) for key, value in told.items()}
        return True

    def unpack(self, folder: Path) -> list[str]:
        """Write the files that came into a folder; return their names.

        Raises:
            CollectError: They are not what was sent, or not what a run leaves.
            OSError: The folder cannot be written.
        """
        digest = self.outcome.get("digest", "")
        try:
            archive = base64.b64decode("".join(self._pieces.get(digest, ())), validate=True)
        except ValueError:
            archive = b""
        if not archive or digest_of(archive) != digest:
            raise CollectError(
                "the run's files did not come whole over its log: they lie in "
                f"{self.outcome.get('run_dir')} on the server's machine. Copy them from there."
            )
        return _unpacked(archive, folder)


def _unpacked(archive: bytes, folder: Path) -> list[str]:
    names, room = [], MOST_BYTES
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as members:
            for member in members:
                # By the very names of a run's files: no path, no link, no device can be one.
                opened = members.extractfile(member) if member.isreg() else None
                if member.name not in RUN_FILES or member.name in names or opened is None:
                    raise CollectError(
                        f"the server sent {member.name!r}, which is no file of a run."
                    )
                room -= member.size
                if room < 0:
                    raise CollectError("the server sent more than a run's files may take.")
                write_atomically(folder / member.name, opened.read())
                names.append(member.name)
    except (tarfile.TarError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CollectError(f"what the server sent is no archive of files ({error}).") from error
    return names
