"""glibc's allocator, told to keep what it has.

A window of 30 s takes buffers of up to some 60 MiB, which by default are mapped anew and given back for each
recognition: half of its CPU went to the kernel's clearing of pages (micro model, windows of 30 s: 132 ms a clip, 65
with this, for 90 MiB more of memory).
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_MIB = 1024 * 1024
MAPPED = 64 * _MIB
"""Only larger pieces are mapped for themselves."""
KEPT = 256 * _MIB
"""So much free memory stays with the process."""


def keep_memory() -> None:
    """For this process, from now on. Does nothing where the C library is another."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_MMAP_THRESHOLD, MAPPED)
    mallopt(_M_TRIM_THRESHOLD, KEPT)
