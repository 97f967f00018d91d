"""How the descriptors of a process are shared out: the last ones are not for everybody.

Where none is left, accept(2) itself fails: uvloop then closes clients without a word, asyncio lets them wait in the
backlog. So clients leave some to what sessions open (upstreams, files), and both leave some to those connections that
are only accepted to be refused. open(2) gives the lowest number that is free, so the number of a new descriptor says
how many are in use; nothing has to be counted.
"""

from __future__ import annotations

import resource
import sys
from typing import Final

LEAST: Final = 32
SHARE: Final = 5  # one in so many
MOST_REFUSED: Final = 256  # at a time: they are accepted together, and closed together


def limit() -> int:
    """Descriptors that the process may open (getrlimit(2), RLIMIT_NOFILE)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def reserve(limit: int) -> int:
    """How many of so many clients do not get."""
    return min(max(LEAST, limit // SHARE), limit // 2)


def too_high(descriptor: int) -> bool:
    """Whether a connection that a session opened has taken one of the last, which are for refusing clients."""
    most = limit()
    return descriptor >= most - min(reserve(most) // 2, MOST_REFUSED)
