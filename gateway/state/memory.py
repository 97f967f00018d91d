"""The store of a single worker: dictionaries of this process, gone with it.

Rates need no expiry: the counters of a period live in two dictionaries, the running bucket and the one before
it, and when a bucket ends its whole dictionary becomes "before" and the older one is dropped. No task runs in
the background, and memory is bounded: a table that is full forgets its oldest entries (who is forgotten starts
from zero, which errs on the side of the client).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from gateway.state.expiring import ExpiringDict, forget_oldest
from gateway.state.store import MAX_VALUE, Hit, ImmediateStore, Lease, Window

_UNCOUNTED = Hit(True, 0.0, ())
_ROUNDING = 1e-9  # a hit exactly at its retry_after must not fail for a last binary digit


class _Buckets:
    """The counters of one period: the running bucket and the one before it."""

    __slots__ = ("before", "ends", "period", "running")

    def __init__(self, period: float, now: float) -> None:
        if not period > 0:
            raise ValueError(f"a window's period is {period!r}, not a positive number of seconds")
        self.period = period
        self.ends = (now // period + 1) * period
        self.running: dict[str, int] = {}
        self.before: dict[str, int] = {}

    def turn(self, now: float) -> None:
        """Begin the bucket that `now` lies in."""
        self.before = self.running if now < self.ends + self.period else {}
        self.running = {}
        self.ends = (now // self.period + 1) * self.period

    def wait(self, key: str, limit: int, n: int, share: float) -> float:
        """Seconds until `n` more hits fit, when `share` of the earlier bucket still counts and nobody else hits."""
        if n > limit:
            return math.inf
        running = self.running.get(key, 0)
        before = self.before.get(key, 0)
        if running + n <= limit:
            return (share - (limit - running - n) / before) * self.period
        return (share + max(0.0, 1.0 - (limit - n) / running)) * self.period


class _FreeLease:
    """The lease of an empty key: nothing is counted."""

    __slots__ = ()

    def release(self) -> None:
        return


class _CountedLease:
    __slots__ = ("_held", "_key")

    def __init__(self, held: dict[str, int], key: str) -> None:
        self._held: dict[str, int] | None = held
        self._key = key

    def release(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            if held[self._key] > 1:
                held[self._key] -= 1
            else:
                del held[self._key]


_FREE = _FreeLease()


class MemoryStore:
    """A `Store` and `ImmediateStore` in this process's memory.

    `clock` gives seconds that never run backwards (the loop's time). `max_entries` bounds the keys of each
    bucket, `max_values` the values put; leases are as many as their holders.
    """

    def __init__(self, clock: Callable[[], float], *, max_entries: int = 200_000, max_values: int = 10_000) -> None:
        self._clock = clock
        self._max_entries = max_entries
        self._buckets: dict[float, _Buckets] = {}
        self._held: dict[str, int] = {}
        self._values: ExpiringDict[str, bytes] = ExpiringDict(max_values)

    @property
    def immediate(self) -> ImmediateStore | None:
        return self

    def hit_now(self, key: str, windows: Sequence[Window], n: int = 1) -> Hit:
        if not key or not windows:
            return _UNCOUNTED
        now = self._clock()
        refused, wait = False, 0.0
        estimates: list[float] = []
        for limit, period in windows:
            buckets = self._buckets.get(period)
            if buckets is None:
                buckets = self._buckets[period] = _Buckets(period, now)
            elif now >= buckets.ends:
                buckets.turn(now)
            share = (buckets.ends - now) / period
            estimate = buckets.running.get(key, 0) + buckets.before.get(key, 0) * share
            estimates.append(estimate)
            if estimate + n > limit + _ROUNDING:
                refused = True
                wait = max(wait, buckets.wait(key, limit, n, share))
        if refused:
            return Hit(False, wait, tuple(estimates))
        if len(windows) == 1:
            self._count(windows[0].period, key, n)
        else:  # each period once: two windows of one period share their counters
            for period in {window.period for window in windows}:
                self._count(period, key, n)
        return Hit(True, 0.0, tuple([estimate + n for estimate in estimates]))

    def _count(self, period: float, key: str, n: int) -> None:
        running = self._buckets[period].running
        if key in running:
            running[key] += n
            return
        if len(running) >= self._max_entries:
            forget_oldest(running)
        running[key] = n

    def hold_now(self, key: str, limit: int) -> Lease | None:
        if not key:
            return _FREE
        taken = self._held.get(key, 0)
        if taken >= limit:
            return None
        self._held[key] = taken + 1
        return _CountedLease(self._held, key)

    def get_now(self, key: str) -> bytes | None:
        return self._values.get(key, self._clock())

    def put_now(self, key: str, value: bytes, ttl: float) -> None:
        if len(value) > MAX_VALUE:
            raise ValueError(f"a value of {len(value)} octets for {key!r}; the store takes {MAX_VALUE}")
        now = self._clock()
        self._values.put(key, value, now + ttl, now)

    async def hit(self, key: str, windows: Sequence[Window], n: int = 1) -> Hit:
        return self.hit_now(key, windows, n)

    async def hold(self, key: str, limit: int) -> Lease | None:
        return self.hold_now(key, limit)

    async def get(self, key: str) -> bytes | None:
        return self.get_now(key)

    async def put(self, key: str, value: bytes, ttl: float) -> None:
        self.put_now(key, value, ttl)

    async def close(self) -> None:
        self._buckets.clear()
        self._values.clear()
