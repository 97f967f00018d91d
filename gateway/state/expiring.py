"""A bounded dictionary whose entries expire, without a task that sweeps it.

Expired entries are looked for when entries were added, as many looks as additions, so that the cost of an
addition stays constant on average. When the dictionary is full, the oldest entries make room.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from itertools import islice
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def forget_oldest(entries: dict[K, V], share: int = 64) -> None:
    """Remove the oldest 1/`share` of `entries`, at least one: in bulk, so that a full table stays cheap to fill."""
    for key in list(islice(entries, len(entries) // share + 1)):
        del entries[key]


class ExpiringDict(Generic[K, V]):
    """At most `max_entries` values, each with the time (of the caller's clock) at which it is gone."""

    __slots__ = ("_added", "_entries", "max_entries")

    def __init__(self, max_entries: int) -> None:
        self.max_entries = max_entries
        self._entries: dict[K, tuple[float, V]] = {}
        self._added = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K, now: float) -> V | None:
        """The value of `key`, or None if there is none or its time has come."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry[0] <= now:
            del self._entries[key]
            return None
        return entry[1]

    def put(self, key: K, value: V, expires: float, now: float) -> None:
        """Keep `value` until `expires`; what has expired already only removes the key."""
        entries = self._entries
        entries.pop(key, None)  # so that the dictionary's order is the order of the last put
        if expires <= now:
            return
        self._added += 1
        if self._added > len(entries) or len(entries) >= self.max_entries:
            self._sweep(now)
        entries[key] = (expires, value)

    def items(self, now: float) -> Iterator[tuple[K, V, float]]:
        """Each key with its value and the time at which it is gone, without those that are gone."""
        return ((key, value, expires) for key, (expires, value) in self._entries.items() if expires > now)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()

    def _sweep(self, now: float) -> None:
        self._added = 0
        entries = self._entries
        for key in [key for key, (expires, _) in entries.items() if expires <= now]:
            del entries[key]
        if len(entries) >= self.max_entries:
            forget_oldest(entries)
