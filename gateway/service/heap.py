"""The C library's heap, told to keep what a relay takes and gives back with every block.

Without it glibc may return the top of the heap to the kernel after each block of a TLS stream and fault it in again
with the next, for as long as the process lives: up to three times the CPU (docs/performance.md).
"""

from __future__ import annotations

import ctypes
import os

# mallopt(3): parameter and value in octets, and the variable with which an administrator decides it.
SETTINGS = (
    (-1, 32 << 20, "MALLOC_TRIM_THRESHOLD_"),
    (-2, 1 << 20, "MALLOC_TOP_PAD_"),
    (-3, 4 << 20, "MALLOC_MMAP_THRESHOLD_"),
)


def keep_heap() -> bool:
    """Set what the environment does not; whether this C library knows how (glibc)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(parameter, value) for parameter, value, name in SETTINGS if name not in os.environ)
