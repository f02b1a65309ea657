"""The bytes of a ledger: one JSON object a line, each sealed by a hash over all lines before it.

Pure: nothing here opens a file. The seal of a line is the SHA-256 of the seal before it and of
the line's own bytes, so that an edit, a reordering or a gap breaks every seal that follows. No
key is involved: it finds accidents and hand edits, not an owner who recomputes the whole file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypeAlias

from fl_app.privacy.accounting import GaussianEvent
from fl_app.types import ClientId, FlAppError, PrivacyUnit

FORMAT, VERSION = "fl-app privacy ledger", 1
_HEAD = re.compile(rb"fl-app ledger head 1 (\d{20}) ([0-9a-f]{64})\n")
_SEAL = b',"sha256":"%s"}\n'
_SEAL_BYTES = len(_SEAL % (b"0" * 64))

Mechanism: TypeAlias = tuple[float, float]
"""What is applied, without how often: noise multiplier and sample rate."""


class LedgerError(FlAppError):
    """A ledger cannot be read or written, or is not what was written. Nothing may be trained."""


class DamageError(ValueError):
    """A line is not what was written; says what is wrong with it, not where."""


class NewerVersionError(DamageError):
    """A ledger is of a version that this code does not know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """Whose budget: the records that one client holds in one data set."""

    client: ClientId
    data_set: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Charge:
    """What one round costs one account.

    Attributes:
        account: Who pays.
        unit: Whose presence the event hides.
        run: Name of the run it is for, the same after a resume.
        round: Number of the round, from 1.
        event: What is released.
    """

    account: Account
    unit: PrivacyUnit
    run: str
    round: int
    event: GaussianEvent

    def __post_init__(self) -> None:
        # What is sealed must be readable again: a line that is not would close the whole ledger.
        if type(self.round) is not int or self.round < 1 or not isinstance(self.run, str):
            raise ValueError(f"round={self.round!r} of run={self.run!r} cannot be charged")

    def fields(self) -> dict[str, Any]:
        """Return what a line of a ledger says of it, in the order in which lines are sealed."""
        return {
            "client": self.account.client,
            "data_set": self.account.data_set,
            "unit": self.unit.value,
            "run": self.run,
            "round": self.round,
            "noise_multiplier": self.event.noise_multiplier,
            "sample_rate": self.event.sample_rate,
            "count": self.event.count,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A charge as it stands in a ledger: its number, from 1, and when it was made, in UTC."""

    seq: int
    time: datetime
    charge: Charge


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """What an account has been charged so far, composed in whatever order.

    Attributes:
        counts: Mechanism -> applications.
        units: The units of its charges; more than one only in a file that was put together.
        rounds: Charges.
    """

    counts: Mapping[Mechanism, int] = field(default_factory=dict)
    units: frozenset[PrivacyUnit] = frozenset()
    rounds: int = 0

    @property
    def events(self) -> list[GaussianEvent]:
        """One event a mechanism."""
        return [
            GaussianEvent(noise_multiplier=noise_multiplier, sample_rate=sample_rate, count=count)
            for (noise_multiplier, sample_rate), count in self.counts.items()
        ]

    def plus(self, unit: PrivacyUnit, event: GaussianEvent) -> Tally:
        """Return the tally after one more charge."""
        mechanism = mechanism_of(event)
        count = self.counts.get(mechanism, 0) + event.count
        return Tally(
            counts={**self.counts, mechanism: count},
            units=self.units | {unit},
            rounds=self.rounds + 1,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """A place between two lines of a ledger.

    Attributes:
        seq: Number of the last entry before it; 0 after the header, -1 at the very beginning.
        sha256: Seal of the line before it.
        offset: In bytes.
        time: When the last entry was made, or None if there is none.
    """

    seq: int = -1
    sha256: str = ""
    offset: int = 0
    time: datetime | None = None


def mechanism_of(event: GaussianEvent) -> Mechanism:
    """Return what an event applies, without how often."""
    return event.noise_multiplier, event.sample_rate


def header(created: datetime) -> tuple[bytes, Position]:
    """Return the first line of a ledger, and the place after it."""
    line = _dumps({"format": FORMAT, "version": VERSION, "created": _stamp(created)}) + b"\n"
    return line, Position(seq=0, sha256=_seal("", line), offset=len(line))


def is_begun_header(content: bytes) -> bool:
    """Return whether this is the beginning of a header of this version, or all of it."""
    whole = header(utc_now())[0][:-1]
    fixed = whole[: whole.index(b'"created":') + len(b'"created":')]
    return len(content) <= len(whole) and content.startswith(fixed[: len(content)])


def read_header(line: bytes) -> Position:
    """Return the place after the first line of a ledger.

    Raises:
        NewerVersionError: Its version is not known here.
        DamageError: It is not a ledger's first line.
    """
    content = _loads(line)
    if content.get("format") != FORMAT or not isinstance(content.get("version"), int):
        raise DamageError("it does not begin as a ledger does")
    if content["version"] > VERSION:
        raise NewerVersionError(
            f"it is of version {content['version']}, and this fl-app knows {VERSION}"
        )
    if content.keys() != {"format", "version", "created"} or content["version"] != VERSION:
        raise DamageError("it does not begin as a ledger does")
    return Position(seq=0, sha256=_seal("", line), offset=len(line))


def write_entries(
    charges: Sequence[Charge], *, after: Position, time: datetime
) -> tuple[bytes, Position]:
    """Return the lines of charges that follow a place, and the place after them."""
    lines, seal, seq = [], after.sha256, after.seq
    for charge in charges:
        seq += 1
        body = _dumps(
            {
                "seq": seq,
                "time": _stamp(time),
                **charge.fields(),
            }
        )[:-1]
        seal = _seal(seal, body)
        lines.append(body + _SEAL % seal.encode())
    content = b"".join(lines)
    return content, Position(seq=seq, sha256=seal, offset=after.offset + len(content), time=time)


def read_entry(line: bytes, *, after: Position) -> tuple[Entry, Position]:
    """Return the entry in a line, which ends, and the place after it.

    Raises:
        DamageError: One byte of it is not what was written, or another line should stand here.
    """
    body = line[:-_SEAL_BYTES]
    seal = _seal(after.sha256, body)
    if line[-_SEAL_BYTES:] != _SEAL % seal.encode():
        raise DamageError("its seal does not fit: it, or the line before it, was changed or lost")
    content = _loads(body + b"}")
    try:
        entry = Entry(
            seq=_whole(content.pop("seq")),
            time=datetime.fromisoformat(content.pop("time")),
            charge=Charge(
                account=Account(
                    client=_text(content.pop("client")), data_set=_text(content.pop("data_set"))
                ),
                unit=PrivacyUnit(content.pop("unit")),
                run=_text(content.pop("run")),
                round=_whole(content.pop("round")),
                event=GaussianEvent(
                    noise_multiplier=float(content.pop("noise_multiplier")),
                    sample_rate=float(content.pop("sample_rate")),
                    count=_whole(content.pop("count")),
                ),
            ),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DamageError(f"it is not an entry ({type(error).__name__}: {error})") from error
    if content or entry.seq != after.seq + 1 or entry.time.tzinfo is None:
        raise DamageError("it is not the entry that should stand here")
    offset = after.offset + len(line)
    return entry, Position(seq=entry.seq, sha256=seal, offset=offset, time=entry.time)


def write_head(position: Position) -> bytes:
    """Return the content of a head file, always as many bytes: the last entry and its seal."""
    return b"fl-app ledger head 1 %020d %s\n" % (position.seq, position.sha256.encode())


def read_head(content: bytes) -> tuple[int, str]:
    """Return number and seal of the entry that a head file names.

    Raises:
        DamageError: It is not a head file.
    """
    match = _HEAD.fullmatch(content)
    if match is None:
        raise DamageError("it is not the head of a ledger")
    return int(match[1]), match[2].decode()


def utc_now() -> datetime:
    """Return the time of this machine's clock."""
    return datetime.now(UTC)


def _stamp(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="milliseconds")


def _seal(before: str, body: bytes) -> str:
    return hashlib.sha256(before.encode() + body).hexdigest()


def _dumps(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def _loads(line: bytes) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise DamageError(f"it is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise DamageError("it is not a JSON object")
    return content


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no whole number")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
