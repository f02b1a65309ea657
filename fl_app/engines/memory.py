"""Keeping memory that was freed, for a process that will want it again at once."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_THRESHOLD_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Have the C library keep freed memory up to a GiB for what is allocated next.

    By itself glibc gives a freed block of a few MiB back to the system, and gets another with the
    next step: zeroed, page by page, which takes five times as long as writing to it. Elsewhere
    than on Linux with glibc nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    # Releases before 2.35 take no more than 32 MiB here. Only with it is the other of any use.
    if mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES) or mallopt(_M_MMAP_THRESHOLD, 32 << 20):
        mallopt(_M_TRIM_THRESHOLD, _THRESHOLD_BYTES)
