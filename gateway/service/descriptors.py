"""The descriptors that a worker keeps back from new clients, for what its sessions open: upstreams, files, stores.

Where none is left, accept(2) itself fails: uvloop then closes clients without a word, asyncio lets them wait in the
backlog. With some kept back, clients are told to come again, and sessions go on. open(2) gives the lowest number that
is free, so the number of a new connection says how many are in use; nothing has to be counted.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from typing import Final

from gateway.observe.logs import get_logger

log = get_logger("gateway.worker")

LEAST: Final = 32
SHARE: Final = 10  # one in so many
RECORD_SECONDS: Final = 10.0


class DescriptorReserve:
    """`limit` is what the process may open (getrlimit(2), RLIMIT_NOFILE), `reserve` what clients do not get of it.

    `clock` gives seconds; `limit` is for tests.
    """

    def __init__(self, pipeline: str, clock: Callable[[], float], limit: int | None = None) -> None:
        if limit is None:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self.limit = limit if limit != resource.RLIM_INFINITY else sys.maxsize
        self.reserve = min(max(LEAST, self.limit // SHARE), self.limit // 2)
        self._highest = self.limit - self.reserve
        self._pipeline = pipeline
        self._clock = clock
        self._refused = 0
        self._next_record = float("-inf")

    def refuses(self, descriptor: int) -> bool:
        """Whether a new connection with this number is one too many; logged, but not once a client."""
        if descriptor < self._highest:
            return False
        self._refused += 1
        now = self._clock()
        if now >= self._next_record:
            self._next_record = now + RECORD_SECONDS
            log.warning(
                "descriptors_short",
                pipeline=self._pipeline,
                limit=self.limit,
                reserve=self.reserve,
                refused=self._refused,
            )
            self._refused = 0
        return True
