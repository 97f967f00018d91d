"""Clients that come when descriptors run short: whether they are refused, and what is logged of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from gateway.observe.logs import get_logger
from gateway.relay import descriptors

log = get_logger("gateway.worker")

RECORD_SECONDS: Final = 10.0


class DescriptorReserve:
    """`limit` is what the process may open, `reserve` what clients do not get of it (`gateway.relay.descriptors`).

    `clock` gives seconds; `limit` is for tests.
    """

    def __init__(self, pipeline: str, clock: Callable[[], float], limit: int | None = None) -> None:
        self.limit = descriptors.limit() if limit is None else limit
        self.reserve = descriptors.reserve(self.limit)
        self._pipeline = pipeline
        self._clock = clock
        self._refused = 0
        self._next_record = float("-inf")

    def refuses(self, descriptor: int) -> bool:
        """Whether a new connection with this number is one too many; logged, but not once a client."""
        if descriptor < self.limit - self.reserve:
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
