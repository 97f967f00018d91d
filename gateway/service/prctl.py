"""What a process of the service asks the kernel for: a name that `ps -o comm` and `top` show, its orphans, the age of
others."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Final

_PR_SET_NAME: Final = 15  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER: Final = 36


def set_name(name: str) -> None:
    """The process's name; the kernel keeps 15 octets. Where it cannot be set it stays what it was."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()), *(ctypes.c_ulong(0),) * 3)


def adopt_orphans() -> bool:
    """Become the parent of descendants whose own parent ends, instead of process 1; whether that was done."""
    libc = ctypes.CDLL(None)
    return bool(libc.prctl(_PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(1), *(ctypes.c_ulong(0),) * 3) == 0)


def started_at(pid: int) -> float:
    """When a process began, in seconds since 1970; 0 if there is none of that number (proc_pid_stat(5), starttime)."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0.0
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
