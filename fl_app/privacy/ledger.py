"""The data owner's ledger: what every account has been charged, on disk before it is trained.

Append-only. A charge is one write and one sync under an exclusive lock. What `Ledger.charge`
returned from is on the disk, and what it did not return from may be: a crash can only over-count.
``PRIVACY.md`` says where ledgers lie and what deleting one means.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from fl_app.privacy.accounting import GaussianEvent
from fl_app.privacy.ledger_file import RESTORE, LedgerFile
from fl_app.privacy.ledger_format import (
    Account,
    Charge,
    Entry,
    LedgerError,
    Position,
    Tally,
    utc_now,
    write_entries,
)

log = logging.getLogger(__name__)

LEDGER_NAME = "ledger.jsonl"
"""Name of the ledger in the folder of a run."""

NOTHING = Tally()
CLOCK_TOLERANCE_S = 300.0
LOCK_TIMEOUT_S = 60.0
_LONGEST_LINE = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What `Ledger.verify` found in order.

    Attributes:
        entries: Whole entries.
        torn_bytes: Bytes after the last line's end, of a charge that was never acknowledged.
        ahead: Entries that the head does not know: a crash came between the two files.
    """

    entries: int
    torn_bytes: int
    ahead: int


@dataclass
class _State:
    """What has been read of the file so far."""

    end: Position = field(default_factory=Position)
    tallies: dict[Account, Tally] = field(default_factory=dict)
    torn_bytes: int = 0
    ahead: int = 0

    def take(self, charge: Charge) -> None:
        before = self.tallies.get(charge.account, NOTHING)
        self.tallies[charge.account] = before.plus(charge.unit, charge.event)


class Ledger:
    """A ledger on disk. Many processes and threads may hold one on the same file.

    Args:
        path: The file; made at the first charge, in a folder that must exist: where a volume is
            not mounted, no budget may begin anew.
        now: The clock, in UTC.
        clock_tolerance_s: How far the clock may lie before the last entry, in seconds.
        lock_timeout_s: How long to wait for another process that holds the ledger.
    """

    def __init__(
        self,
        path: Path,
        *,
        now: Callable[[], datetime] = utc_now,
        clock_tolerance_s: float = CLOCK_TOLERANCE_S,
        lock_timeout_s: float = LOCK_TIMEOUT_S,
    ) -> None:
        self.path = path
        self._files = LedgerFile(path, lock_timeout_s=lock_timeout_s)
        self._now = now
        self._clock_tolerance = timedelta(seconds=clock_tolerance_s)
        self._state = _State()
        self._threads = threading.RLock()

    @property
    def head_path(self) -> Path:
        """Where the head lies."""
        return self._files.head_path

    def charge(self, charges: Sequence[Charge]) -> None:
        """Write charges, all in one write and one sync; when it returns they are on the disk.

        Raises:
            LedgerError: The ledger cannot be locked, read or written, is damaged, or the clock
                went back. The file is as it was, and nothing may be trained.
        """
        with self.exclusively() as page:
            page.append(charges)

    @contextmanager
    def exclusively(self) -> Iterator[Page]:
        """Hold the ledger, with all that others appended read, so that nobody charges meanwhile.

        Raises:
            LedgerError: As `charge`.
        """
        with self._threads:
            self._exists()
            with self._files.for_writing(self._now()) as file:
                self._catch_up(file)
                yield Page(self, file)

    def tallies(self) -> dict[Account, Tally]:
        """Return what each account has been charged by anyone so far.

        Raises:
            LedgerError: The ledger cannot be read or is damaged.
        """
        with self._threads:
            self._refresh()
            return dict(self._state.tallies)

    def tallies_of(self, accounts: Iterable[Account]) -> list[Tally]:
        """Return what each of these accounts has been charged by anyone so far.

        Raises:
            LedgerError: The ledger cannot be read or is damaged.
        """
        with self._threads:
            self._refresh()
            return [self._state.tallies.get(account, NOTHING) for account in accounts]

    def events_of(self, account: Account) -> list[GaussianEvent]:
        """Return the events of an account, one a mechanism; none for one that never paid.

        Raises:
            LedgerError: The ledger cannot be read or is damaged.
        """
        return self.tallies_of([account])[0].events

    def __iter__(self) -> Iterator[Entry]:
        """Yield all entries there are now, in order, one in memory at a time.

        Raises:
            LedgerError: The ledger cannot be read or is damaged; not all that `verify` finds.
        """
        if not self._exists():
            return
        with self._files.for_reading() as file:
            size = _end_of_last_line(file)
            file = os.dup(file)
        try:  # whole lines stay as they are, so nobody needs to wait for the reader
            for entry, _ in self._files.lines(file, Position(), size):
                if entry is not None:
                    yield entry
        finally:
            os.close(file)

    def verify(self) -> Verified:
        """Read the whole file and its head, and return what is there.

        Raises:
            LedgerError: It cannot be read, is damaged, or entries are missing at its end.
        """
        whole = Ledger(self.path)
        if not whole._exists():
            raise LedgerError(f"{self.path} does not exist: nothing has been charged to it.")
        whole._refresh()
        end, state = whole._state.end, whole._state
        return Verified(entries=max(end.seq, 0), torn_bytes=state.torn_bytes, ahead=state.ahead)

    def _exists(self) -> bool:
        if self._files.exists():
            return True
        if self._state.end.seq >= 0:
            raise LedgerError(f"{self.path} is gone, and its head with it. {RESTORE}")
        return False

    def _refresh(self) -> None:
        if self._exists():
            with self._files.for_reading() as file:
                self._catch_up(file)

    def _catch_up(self, file: int) -> None:
        """Read what has been appended since the last time, and compare with the head."""
        state = self._state
        try:
            size, head = os.fstat(file).st_size, self._files.read_head()
            if size < state.end.offset:
                raise LedgerError(self._missing(state.end.seq))
            self._compare(head)
            for entry, after in self._files.lines(file, state.end, size):
                if entry is not None:
                    state.take(entry.charge)
                state.end = after
                self._compare(head)
            if state.end.seq < 0 and not self._files.is_new(file):
                raise LedgerError(
                    f"{self.path} does not begin as a ledger does: name another file for the "
                    "ledger. Nothing was trained and nothing changed."
                )
            if head is not None and head[0] > state.end.seq:
                raise LedgerError(self._missing(head[0]))
            if head is None and state.end.seq > 0:
                raise LedgerError(
                    f"{self.head_path} is gone, and without it nobody can say whether "
                    f"entries are missing at the end of {self.path.name}. {RESTORE}"
                )
            state.torn_bytes = size - state.end.offset
            state.ahead = max(state.end.seq, 0) - (head[0] if head else 0)
        except OSError as error:
            self._state = _State()
            raise LedgerError(
                f"{self.path} or its head cannot be read ({error.strerror}): give this user the "
                "right to read both. Nothing was trained."
            ) from error
        except LedgerError:
            self._state = _State()  # half read: begin again when it has been mended
            raise

    def _compare(self, head: tuple[int, str] | None) -> None:
        end = self._state.end
        if head is not None and head[0] == end.seq and head[1] != end.sha256:
            raise LedgerError(
                f"{self.path}, line {end.seq + 1} is not the one that {self.head_path.name} "
                f"names: the two are not of the same ledger. {RESTORE}"
            )

    def _missing(self, last: int) -> str:
        return (
            f"{self.path}: entries up to number {last} were acknowledged, and the last of them "
            f"are missing at its end. {RESTORE}"
        )


class Page:
    """A ledger that is held: nobody else can charge it now. Made by `Ledger.exclusively`."""

    def __init__(self, ledger: Ledger, file: int) -> None:
        self._ledger = ledger
        self._file = file

    @property
    def tallies(self) -> Mapping[Account, Tally]:
        """What each account has been charged; changes with `append`."""
        return self._ledger._state.tallies

    def append(self, charges: Sequence[Charge]) -> None:
        """Write charges; when it returns they are on the disk. See `Ledger.charge`."""
        ledger, state = self._ledger, self._ledger._state
        if not charges:
            return
        now, before = ledger._now(), state.end
        if before.time is not None and now < before.time - ledger._clock_tolerance:
            raise LedgerError(
                f"the clock says {now:%Y-%m-%d %H:%M:%S} UTC, but the last entry of {ledger.path} "
                f"is of {before.time:%Y-%m-%d %H:%M:%S}: set the clock right. If it is the entry "
                "that is wrong, raise clock_tolerance_s in the policy. Nothing was trained."
            )
        if state.torn_bytes:
            log.warning(
                "%s: %d bytes after entry %d are of a charge that was cut short and never "
                "acknowledged; they are removed.",
                ledger.path,
                state.torn_bytes,
                before.seq,
            )
        content, after = write_entries(charges, after=before, time=now)
        ledger._files.append(self._file, content, before=before, after=after)
        # Interrupted in here, the same charges are read again: they count twice, never not.
        for charge in charges:
            state.take(charge)
        state.end, state.torn_bytes, state.ahead = after, 0, 0


def _end_of_last_line(file: int) -> int:
    size = os.fstat(file).st_size
    start = max(0, size - _LONGEST_LINE)
    return start + os.pread(file, _LONGEST_LINE, start).rfind(b"\n") + 1
