"""The rows of the counters: which are free, which belong to a generation, which to processes that lost theirs.

A row has one writer. So that of a worker whose generation was killed is free only once the worker has ended as well:
it is the supervisor's child then (`prctl.adopt_orphans`), which hears of its end.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from gateway.observe.counters import CounterMap
from gateway.service.listening import StartError


class Rows:
    """Those of the map but the first, which is the supervisor's own."""

    def __init__(self, map: CounterMap) -> None:
        self._map = map
        self._free = list(range(1, len(map)))
        self.orphans: dict[int, int] = {}
        """Process id of each worker without a generation, and its row."""

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

    def give_back(self, rows: Iterable[int]) -> None:
        """The generation of these has ended. Their counters stay; the next process goes on with them."""
        for index in rows:
            owner = self._map.row(index).owner
            if owner and _is_child(owner):
                self.orphans[owner] = index
            else:
                self._release(index)

    def reaped(self, pid: int) -> None:
        """A child that was no generation has ended."""
        index = self.orphans.pop(pid, None)
        if index is not None:
            self._release(index)

    def _release(self, index: int) -> None:
        self._map.row(index).take(0)
        self._free.append(index)


def _is_child(pid: int) -> bool:
    """Whether it is a child of this process that runs, or is yet to be reaped."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
