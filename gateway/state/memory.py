"""The store of a single worker: dictionaries of this process, gone with it.

Rates need no expiry: the counters of a period live in two dictionaries, the running bucket and the one before
it, and when a bucket ends its whole dictionary becomes "before" and the older one is dropped. No task runs in
the background, and memory is bounded: a table that is full forgets its oldest entries (who is forgotten starts
from zero, which errs on the side of the client).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter

from gateway.state.expiring import ExpiringDict, forget_oldest
from gateway.state.sliding import ROUNDING, bucket, share_inside, wait
from gateway.state.store import MAX_VALUE, Entry, Hit, ImmediateStore, Lease, Window

_UNCOUNTED = Hit(True, 0.0, ())


class _Buckets:
    """The counters of one period: the running bucket and the one before it."""

    __slots__ = ("before", "ends", "number", "period", "running")

    def __init__(self, period: float, now: float) -> None:
        self.number = bucket(now, period)
        self.period = period
        self.ends = (self.number + 1) * period
        self.running: dict[str, int] = {}
        self.before: dict[str, int] = {}

    def turn(self, now: float) -> None:
        """Begin the bucket that `now` lies in, if that is a later one."""
        number = bucket(now, self.period)
        if number > self.number:
            self.before = self.running if number == self.number + 1 else {}
            self.running = {}
            self.number, self.ends = number, (number + 1) * self.period


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
        refused, longest = False, 0.0
        estimates: list[float] = []
        for limit, period in windows:
            buckets = self._buckets.get(period)
            if buckets is None:
                buckets = self._buckets[period] = _Buckets(period, now)
            elif now >= buckets.ends:
                buckets.turn(now)
            share = share_inside(buckets.number, period, now)
            running, before = buckets.running.get(key, 0), buckets.before.get(key, 0)
            estimate = running + before * share
            estimates.append(estimate)
            if estimate + n > limit + ROUNDING:
                refused = True
                longest = max(longest, wait(limit, n, running, before, share, period))
        if refused:
            return Hit(False, longest, tuple(estimates))
        if n == 0:
            return Hit(True, 0.0, tuple(estimates))
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

    def entries_now(self, prefix: str, limit: int = 1000) -> list[Entry]:
        """What `entries` of `Store` gives."""
        now = self._clock()
        found: list[Entry] = []
        for period, buckets in self._buckets.items():
            buckets.turn(now)
            share = share_inside(buckets.number, period, now)
            for key in buckets.running.keys() | buckets.before.keys():
                if key.startswith(prefix):
                    running, before = buckets.running.get(key, 0), buckets.before.get(key, 0)
                    rest = (buckets.number + (2 if running else 1)) * period - now
                    found.append(Entry(key, "rate", running + before * share, None, rest))
        found += [Entry(key, "held", n, None, None) for key, n in self._held.items() if key.startswith(prefix)]
        for key, value, expires in self._values.items(now):
            if key.startswith(prefix):
                found.append(Entry(key, "value", 0, value, expires - now))
        return sorted(found, key=attrgetter("key"))[:limit]

    def clear_now(self, key: str) -> bool:
        """What `clear` of `Store` does."""
        found = self._values.get(key, self._clock()) is not None
        self._values.put(key, b"", 0.0, 0.0)
        for buckets in self._buckets.values():
            buckets.turn(self._clock())
            for counters in (buckets.running, buckets.before):
                found = counters.pop(key, 0) > 0 or found
        return found

    async def hit(self, key: str, windows: Sequence[Window], n: int = 1) -> Hit:
        return self.hit_now(key, windows, n)

    async def hold(self, key: str, limit: int) -> Lease | None:
        return self.hold_now(key, limit)

    async def get(self, key: str) -> bytes | None:
        return self.get_now(key)

    async def put(self, key: str, value: bytes, ttl: float) -> None:
        self.put_now(key, value, ttl)

    async def entries(self, prefix: str, limit: int = 1000) -> list[Entry]:
        return self.entries_now(prefix, limit)

    async def clear(self, key: str) -> bool:
        return self.clear_now(key)

    async def close(self) -> None:
        self._buckets.clear()
        self._values.clear()
