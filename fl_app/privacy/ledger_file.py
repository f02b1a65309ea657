"""A ledger's two files: locked, read line by line, written so that a failure changes nothing.

The ledger itself, and beside it its head: 107 bytes that name the last entry. The head is written
after the synced append and is not synced itself, so it may lag behind the ledger and never leads
it; lines that are missing at the end are found by it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from fl_app.files import sync_folder, write_atomically
from fl_app.privacy.ledger_format import (
    DamageError,
    Entry,
    LedgerError,
    NewerVersionError,
    Position,
    header,
    is_begun_header,
    read_entry,
    read_head,
    read_header,
    write_head,
)

log = logging.getLogger(__name__)

RESTORE = (
    "Put ledger and head back from a backup that holds every charge, or close its accounts "
    '(PRIVACY.md, "When a ledger is damaged"). Nothing was trained and nothing changed.'
)
OTHERS_WRITE = 0o022
_MORE_THAN_A_HEADER = 4096


class LedgerFile:
    """Where a ledger lies.

    Opened anew for every use: a lock belongs to what was opened, and so is shared with no thread
    and no forked process, and a file that was moved is noticed.

    Args:
        path: The ledger; its head is beside it.
        lock_timeout_s: How long to wait for another process that holds it.
    """

    def __init__(self, path: Path, *, lock_timeout_s: float) -> None:
        self.path = path
        self.head_path = path.with_name(f"{path.name}.head")
        self._lock_timeout_s = lock_timeout_s

    def exists(self) -> bool:
        """Return whether there is a ledger.

        Raises:
            LedgerError: There is its head alone: it has been lost.
        """
        if self.path.exists():
            return True
        if self.head_path.exists():
            raise LedgerError(f"{self.path} is gone, and {self.head_path.name} is there: {RESTORE}")
        return False

    @contextmanager
    def for_reading(self) -> Iterator[int]:
        """Hold the existing file open while nobody writes it.

        Raises:
            LedgerError: It cannot be opened or locked, or others may write it.
        """
        with self._opened(os.O_RDONLY, fcntl.LOCK_SH) as file:
            yield file

    @contextmanager
    def for_writing(self, now: datetime) -> Iterator[int]:
        """Hold the file open alone; it is made if there is none, in a folder that must exist.

        Raises:
            LedgerError: As `for_reading`; or its head is there alone; or it cannot be written.
        """
        self.exists()
        with self._opened(os.O_RDWR | os.O_CREAT, fcntl.LOCK_EX) as file:
            if not self.head_path.exists():
                self._begin(file, now)
            yield file

    def append(self, file: int, content: bytes, *, before: Position, after: Position) -> None:
        """Write lines at a place, whatever torn bytes lie there, sync them, and move the head.

        Raises:
            LedgerError: The disk is full or fails; both files are as they were.
        """
        with self._or_as_before(file, before):
            os.ftruncate(file, before.offset)
            _write(file, content, before.offset)
            os.fsync(file)
            self._move_head(after)

    def lines(
        self, file: int, start: Position, size: int
    ) -> Iterator[tuple[Entry | None, Position]]:
        """Yield (entry, or None for the header; place after it) of each whole line from a place.

        What follows the last line end within the first ``size`` bytes is left out.

        Raises:
            LedgerError: A line is damaged, or of a newer version.
        """
        position = start
        with os.fdopen(os.dup(file), "rb", buffering=1 << 16) as reader:
            reader.seek(start.offset)
            for line in reader:
                if position.offset + len(line) > size or not line.endswith(b"\n"):
                    return
                number = position.seq + 2
                try:
                    if position.seq < 0:
                        entry, position = None, read_header(line)
                    else:
                        entry, position = read_entry(line, after=position)
                except NewerVersionError as error:
                    raise LedgerError(
                        f"{self.path}, line {number}: {error}. Use the fl-app that wrote it, or a "
                        "later one. Nothing was trained and nothing changed."
                    ) from error
                except DamageError as error:
                    raise LedgerError(
                        f"{self.path}, line {number} is damaged: {error}. {RESTORE}"
                    ) from error
                yield entry, position

    def read_head(self) -> tuple[int, str] | None:
        """Return number and seal of the entry that the head names, or None without a head.

        Raises:
            LedgerError: It is damaged, or others may write it.
            OSError: It cannot be read.
        """
        try:
            with self.head_path.open("rb") as head:
                _check_mode(self.head_path, os.fstat(head.fileno()))
                return read_head(head.read())
        except FileNotFoundError:
            return None
        except DamageError as error:
            raise LedgerError(f"{self.head_path} is damaged: {error}. {RESTORE}") from error

    def is_new(self, file: int) -> bool:
        """Return whether the file is empty, or holds a header or its beginning and no more."""
        first, _, rest = os.pread(file, _MORE_THAN_A_HEADER, 0).partition(b"\n")
        return not rest and is_begun_header(first)

    @contextmanager
    def _opened(self, flags: int, lock: int) -> Iterator[int]:
        try:
            file = os.open(self.path, flags | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise LedgerError(
                f"{self.path} cannot be opened ({error.strerror}): make its folder, or give this "
                "user the right to read and write it. Nothing was trained."
            ) from error
        try:
            self._lock(file, lock)
            self._check_identity(file)
            yield file
        finally:
            os.close(file)  # and so unlocks

    def _lock(self, file: int, lock: int) -> None:
        give_up = time.monotonic() + self._lock_timeout_s
        while True:
            try:
                fcntl.flock(file, lock | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > give_up:
                    raise LedgerError(
                        f"{self.path} has been held by another process for "
                        f"{self._lock_timeout_s:g} s: wait for it, or end it. Nothing was trained."
                    ) from error
                time.sleep(0.002)
            except OSError as error:
                raise LedgerError(
                    f"{self.path} cannot be locked ({error.strerror}): keep it on a file system "
                    "that has locks. Nothing was trained."
                ) from error

    def _check_identity(self, file: int) -> None:
        found = os.fstat(file)
        try:
            named = os.stat(self.path)
        except OSError:
            named = None
        if named is None or (named.st_dev, named.st_ino) != (found.st_dev, found.st_ino):
            raise LedgerError(
                f"{self.path} was moved or replaced while in use: end all that use it, put it back "
                "together with its head, and start again. Nothing was trained."
            )
        _check_mode(self.path, found)

    def _begin(self, file: int, now: datetime) -> None:
        """Make header and head, unless something stands there that no crash in here can leave.

        The head is there before any entry is, so that a ledger with entries and none has lost it.
        """
        if not self.is_new(file):
            return  # whoever reads it says what is wrong
        line, after = header(now)
        with self._or_as_before(file, Position()):
            os.ftruncate(file, 0)
            _write(file, line, 0)
            os.fsync(file)
            self._move_head(after)
            sync_folder(self.path.parent)
        log.info("%s is a new ledger: every budget in it is whole.", self.path)

    def _move_head(self, position: Position) -> None:
        try:
            file = os.open(self.head_path, os.O_WRONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            write_atomically(self.head_path, write_head(position), mode=0o600)
            return
        try:  # in place: these few bytes are in one sector, which changes whole or not at all
            _write(file, write_head(position), 0)
        finally:
            os.close(file)

    @contextmanager
    def _or_as_before(self, file: int, before: Position) -> Iterator[None]:
        """Bring ledger and head back to a place if the block fails."""
        try:
            yield
        except BaseException as error:
            # What cannot be brought back stays and counts, which errs on the safe side. The head
            # goes first, so that it never leads.
            with suppress(OSError):
                if before.seq >= 0:
                    self._move_head(before)
                else:
                    self.head_path.unlink(missing_ok=True)
                os.ftruncate(file, before.offset)
                os.fsync(file)
            if isinstance(error, OSError):
                raise LedgerError(
                    f"{self.path} cannot be written ({error.strerror}): make room on the disk, or "
                    "make it writable. Nothing was trained."
                ) from error
            raise


def _check_mode(path: Path, found: os.stat_result) -> None:
    if found.st_mode & OTHERS_WRITE:
        raise LedgerError(
            f"{path} can be written by other users, who could lower what was spent: "
            f"chmod 600 {path}"
        )


def _write(file: int, content: bytes, offset: int) -> None:
    """Write all of it, normally at once; the system may take less when the disk fills up."""
    while content:
        written = os.pwrite(file, content, offset)
        content, offset = content[written:], offset + written
