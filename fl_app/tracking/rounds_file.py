"""``rounds.jsonl``: one line a round, the record a run writes as it goes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from fl_app.tracking.json_files import JSON, strict_json
from fl_app.types import ConfigError, Failure, FailureKind, RoundReport

_BLOCK_BYTES = 1 << 16


def report_to_json(report: RoundReport) -> dict[str, JSON]:
    """Return the object that stands for ``report``: its fields by name, NaN and inf as None."""
    return {
        "round": report.round,
        "cohort": list(report.cohort),
        "num_updates": report.num_updates,
        "applied": report.applied,
        "failures": [
            {"client": failure.client, "kind": failure.kind.value, "reason": failure.reason}
            for failure in report.failures
        ],
        "metrics": strict_json(report.metrics),
        "client_metrics": strict_json(report.client_metrics),
        "client_accuracy": strict_json(report.client_accuracy),
        "epsilon": strict_json(report.epsilon),
        "epsilon_budget": strict_json(report.epsilon_budget),
        "uplink_bytes": report.uplink_bytes,
        "downlink_bytes": report.downlink_bytes,
        "uplink_uncompressed_bytes": report.uplink_uncompressed_bytes,
        "seconds": strict_json(report.seconds),
    }


def report_from_json(entry: Mapping[str, Any]) -> RoundReport:
    """Return the report that `report_to_json` made ``entry`` of.

    The inverse on all that is finite: a number that was NaN or inf comes back as NaN, and such an
    ``epsilon`` as None.

    Raises:
        ConfigError: A key is missing or holds something of another kind.
    """
    try:
        return RoundReport(
            round=int(entry["round"]),
            cohort=tuple(str(client) for client in entry["cohort"]),
            num_updates=None if entry["num_updates"] is None else int(entry["num_updates"]),
            applied=bool(entry["applied"]),
            failures=tuple(
                Failure(
                    client=str(failure["client"]),
                    kind=FailureKind(failure["kind"]),
                    reason=str(failure["reason"]),
                )
                for failure in entry["failures"]
            ),
            metrics=_numbers(entry["metrics"]),
            client_metrics=_numbers(entry["client_metrics"]),
            client_accuracy=_numbers(entry["client_accuracy"]),
            epsilon=None if entry["epsilon"] is None else float(entry["epsilon"]),
            epsilon_budget=None if (limit := entry["epsilon_budget"]) is None else float(limit),
            uplink_bytes=int(entry["uplink_bytes"]),
            downlink_bytes=int(entry["downlink_bytes"]),
            uplink_uncompressed_bytes=int(entry["uplink_uncompressed_bytes"]),
            seconds=_number(entry["seconds"]),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"not a round as fl-app writes it ({type(error).__name__}: {error}); "
            "use the rounds.jsonl of a run of this version"
        ) from error


def iter_reports(path: Path) -> Iterator[RoundReport]:
    """Yield the rounds in ``path`` in order, one in memory at a time.

    What follows the last line end was torn by a kill and is left out; anything else must be whole.

    Raises:
        ConfigError: A line that ends is not a round; names the file and the line.
    """
    for number, entry in _iter_entries(path):
        try:
            yield report_from_json(entry)
        except ConfigError as error:
            raise ConfigError(f"{path}, line {number}: {error}") from error


def read_rounds(path: Path) -> list[dict[str, Any]]:
    """Return the objects in ``path`` in order; a torn last line, and only that, is left out.

    Raises:
        ConfigError: A line that ends is not a JSON object; names the file and the line.
    """
    return [entry for _, entry in _iter_entries(path)]


class RoundsFile:
    """Appends rounds to a ``rounds.jsonl``. The loop owns it, and its ``OSError`` end the run.

    A checkpoint takes `sync` and then `position`; the run that resumes from it calls `truncate`
    with that position, and so writes each round once however often it was killed.
    """

    def __init__(self, path: Path) -> None:
        """Write to ``path``, which may exist; nothing is touched before the first append."""
        self._path = path
        self._file: BinaryIO | None = None

    @property
    def path(self) -> Path:
        """Where the rounds are."""
        return self._path

    def append(self, report: RoundReport) -> None:
        """Write ``report`` as one line and hand it to the operating system; a torn line goes."""
        if self._file is None:
            if self._path.exists():
                os.truncate(self._path, self.position())
            self._file = self._path.open("ab")
        line = json.dumps(report_to_json(report), allow_nan=False, separators=(",", ":"))
        self._file.write(line.encode("ascii") + b"\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until what was appended is on the disk, and survives a power cut."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def position(self) -> int:
        """Return the byte offset after the last whole line; 0 for a file that is not there."""
        if not self._path.exists():
            return 0
        return _end_of_last_line(self._path, self._path.stat().st_size)

    def truncate(self, position: int) -> None:
        """Cut the file to its whole lines within the first ``position`` bytes.

        Raises:
            ConfigError: The file is shorter than ``position``, so it lacks rounds that belong to
                the checkpoint this position is from.
        """
        size = self._path.stat().st_size if self._path.exists() else 0
        if not 0 <= position <= size:
            raise ConfigError(
                f"{self._path} has {size} bytes, but the checkpoint was taken after byte "
                f"{position}: put the file of that run back, or start a new run"
            )
        self.close()
        if size:
            os.truncate(self._path, _end_of_last_line(self._path, position))

    def close(self) -> None:
        """Close the file; a later append opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _iter_entries(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) of each whole line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                entry = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}, line {number} is not JSON: {error}") from error
            if not isinstance(entry, dict):
                raise ConfigError(f"{path}, line {number} is not a JSON object")
            yield number, entry


def _end_of_last_line(path: Path, limit: int) -> int:
    """Return the offset after the last line end within the first ``limit`` bytes, or 0."""
    with path.open("rb") as file:
        end = limit
        while end > 0:
            start = max(0, end - _BLOCK_BYTES)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): _number(value) for name, value in values.items()}
