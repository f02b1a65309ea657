"""A small process that takes down everything below it once whoever started it is gone.

Flower and Ray start processes that start processes, some of them in sessions of their own, and
what is killed cannot clear up after itself. The warden can: it runs the command it is given, adopts
what below it loses its parent, and ends all of it when its stdin closes, which the operating system
sees to however its parent ends.

    python -m fl_app.engines.warden FOLDER COMMAND [ARGUMENT ...]

FOLDER is removed at the end. The exit code is the command's, or 0 if it had to be ended. Standard
library only, so that it starts at once.
"""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

POLL_S = 0.1
"""Seconds between two looks at whether the command has ended by itself."""

PATIENCE_S = 10.0
"""Seconds in which killed processes must be gone: a kill takes effect at once, unless a process
hangs in the operating system."""

_PR_SET_CHILD_SUBREAPER = 36


def main() -> int:
    """Run the command until it ends or stdin closes, and leave nothing of it behind."""
    folder, *command = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the one way to end a warden is to close its stdin
    _adopt_orphans()
    try:
        # Not waited for by this object: `_reap` does that, for all processes alike.
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, restore_signals=True).pid
        code = _watch(child)
    finally:
        end_all(os.getpid())
        shutil.rmtree(folder, ignore_errors=True)
    return code


def _adopt_orphans() -> None:
    """Become the parent of whatever below this process loses its own; Linux only."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _watch(child: int) -> int:
    """Return the child's exit code, or 0 if stdin closed before it ended."""
    while True:
        ended = _reap()
        if child in ended:
            return ended[child]
        readable, _, _ = select.select([sys.stdin], [], [], POLL_S)
        if readable and not os.read(sys.stdin.fileno(), 1024):
            return 0


def _reap() -> dict[int, int]:
    """Return the exit codes of children that have ended since the last look."""
    ended: dict[int, int] = {}
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended[found[0]] = os.waitstatus_to_exitcode(found[1])
    return ended


def end_all(root: int) -> None:
    """Kill every process below ``root``, those included that are started meanwhile."""
    deadline = time.monotonic() + PATIENCE_S
    while (below := descendants(root)) and time.monotonic() < deadline:
        for process in below:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        _reap()
        time.sleep(0.02)


def descendants(root: int) -> list[int]:
    """Return the processes below ``root``, parents first."""
    children = defaultdict(list)
    for process, parent in _parents():
        children[parent].append(process)
    found = list(children[root])
    for process in found:  # grows as it goes
        found.extend(children[process])
    return found


def _parents() -> list[tuple[int, int]]:
    """Return (process, parent) of all processes that run; zombies are no processes any more."""
    if not Path("/proc/self/stat").exists():
        listed = subprocess.run(
            ["ps", "-axo", "pid=,ppid=,comm="], capture_output=True, text=True, check=False
        ).stdout
        rows = (line.split(None, 2) for line in listed.splitlines())
        return [(int(row[0]), int(row[1])) for row in rows if row[2:] != ["ps"]]
    pairs = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The name, in parentheses, may hold anything; after it come state and parent.
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state not in "ZX":
                pairs.append((int(path.parent.name), int(parent)))
    return pairs


if __name__ == "__main__":
    sys.exit(main())
