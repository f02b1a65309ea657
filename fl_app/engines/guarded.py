"""Processes that do not outlive this one, however it ends; see `fl_app.engines.warden`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def guarded(
    command: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    output: int | IO[bytes],
) -> Generator[subprocess.Popen[bytes], None, None]:
    """Run a command; when the block ends, however it does, so does all that it started.

    Args:
        command: What to run.
        folder: Removed in the end.
        environment: The command's.
        output: Takes its stdout and stderr, as in `subprocess.Popen`.
    """
    warden = subprocess.Popen(
        [sys.executable, "-m", "fl_app.engines.warden", str(folder), *command],
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a Ctrl-C in the terminal is ours to handle
    )
    try:
        yield warden
    finally:
        end(warden)


def end(warden: subprocess.Popen[bytes]) -> None:
    """Close a warden's stdin and wait until it has ended everything, whatever interrupts."""
    if warden.stdin is not None:
        warden.stdin.close()
    while warden.poll() is None:
        with suppress(KeyboardInterrupt):  # a second Ctrl-C must not leave half of it running
            warden.wait()
