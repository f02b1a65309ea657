"""Files that are there whole or not at all, whatever instant a crash picks."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from fl_app.errors import ConfigError


def write_atomically(
    path: Path, content: bytes, *, mode: int = 0o666, owner: tuple[int, int] | None = None
) -> None:
    """Replace ``path`` by ``content``: after a crash the old file or the new one, never a part.

    Written beside it, synced, renamed; then the folder is synced, so that the name lasts too.

    Args:
        path: The file.
        content: All of it.
        mode: Who may use it; the umask takes from that.
        owner: User and group that it is given to, which takes root; None: whoever writes it.

    Raises:
        OSError: The folder is not writable or the disk is full; the old file is untouched.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb", opener=partial(os.open, mode=mode)) as file:
            if owner is not None:
                os.fchown(file.fileno(), *owner)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


@contextmanager
def held(folder: Path, otherwise: str) -> Generator[None, None, None]:
    """Hold a folder, so that no second process works in it.

    Args:
        folder: Which.
        otherwise: What to say if another process holds it.

    Raises:
        ConfigError: One does.
        OSError: The folder cannot be written.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(otherwise) from error
        yield
