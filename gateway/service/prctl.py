"""What a process of the service asks the kernel for: a name that `ps -o comm` and `top` show, and its orphans."""

from __future__ import annotations

import ctypes
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
