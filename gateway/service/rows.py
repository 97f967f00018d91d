"""The rows of the counters: which are free, which belong to a generation, which to processes that lost theirs.

A row has one writer. So that of a worker whose generation was killed is free only once the worker has ended as well:
it is the supervisor's child then (`prctl.adopt_orphans`), which hears of its end.
"""

from __future__ import annotations

import bisect
import os
import signal
from collections.abc import Iterable

from gateway.observe.counters import CounterMap
from gateway.service.listening import StartError


class Rows:
    """Those of the map but the first, which is the supervisor's own."""

    def __init__(self, map: CounterMap) -> None:
        self._map = map
        self._free = list(range(1, len(map)))
        self.orphans: dict[int, tuple[int, float]] = {}
        """Process id of each worker without a generation, its row, and until when it may live (monotonic clock)."""

    @property
    def free(self) -> int:
        """How many nobody has."""
        return len(self._free)

    def take(self, number: int) -> list[int]:
        """So many of them. Raises StartError."""
        if number > len(self._free):
            raise StartError(f"{number} processes more are too many while older generations end their sessions; wait")
        taken, self._free = self._free[:number], self._free[number:]
        return taken

    def give_back(self, rows: Iterable[int], until: float) -> None:
        """The generation of these has ended. Their counters stay; the next process goes on with them.

        Workers that are left end their sessions until then (monotonic clock).
        """
        for index in rows:
            owner = self._map.row(index).owner
            if owner and _is_child(owner):
                self.orphans[owner] = (index, until)
            else:
                self._release(index)

    def reaped(self, pid: int) -> None:
        """A child that was no generation has ended."""
        orphan = self.orphans.pop(pid, None)
        if orphan is not None:
            self._release(orphan[0])

    def end_orphans(self, now: float | None = None) -> None:
        """Kill those whose time is over at `now`; without it, all.

        Who they are was read from memory that workers write to: only a child is signaled, not who has its number now.
        """
        for pid, (_, until) in tuple(self.orphans.items()):
            if not _is_child(pid):
                self.reaped(pid)
            elif now is None or now >= until:
                os.kill(pid, signal.SIGKILL)

    def _release(self, index: int) -> None:
        self._map.row(index).take(0)
        bisect.insort(self._free, index)  # the lowest first: what has been written to stays in memory, and is read


def _is_child(pid: int) -> bool:
    """Whether it is a child of this process that runs, or is yet to be reaped."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
