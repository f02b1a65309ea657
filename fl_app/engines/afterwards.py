"""A small process that runs a command once whoever started it is done, or gone.

    python -m fl_app.engines.afterwards COMMAND [ARGUMENT ...]

It waits until its stdin closes, which the operating system sees to however its parent ends. The
exit code is the command's. Standard library only, so that it starts at once.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys


def main() -> int:
    """Wait for the end of stdin, then run the command."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(sys.stdin.fileno(), 1024):
        pass
    return subprocess.run(
        sys.argv[1:], stdin=subprocess.DEVNULL, check=False, restore_signals=True
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
