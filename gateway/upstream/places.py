"""The places at a server: how many connections it has from all workers, and that it never gets one too many.

Each worker has a number of its own in the shared counters. It adds its connection first and looks at the sum after
that, so that of two which take the last place at the same time at least one sees the other, and gives it back.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from gateway.observe import metrics

if TYPE_CHECKING:
    from gateway.upstream.server import Server

_stored = threading.Lock()
"""Nobody's lock: to take it is an atomic instruction, before which a processor does not read what comes after it, so
that our own number is in memory when those of others are read."""


class Places:
    """The places at one server.

    `labels` name it in the metrics; what has them in another worker is the same server, unless not `shared`.
    Connections that are kept for reuse hold places too, and are closed where another one is to be opened instead.
    """

    __slots__ = ("_all", "_all_idle", "_own", "_server")

    def __init__(self, server: Server, labels: Mapping[str, str], shared: bool) -> None:
        self._server = server
        self._own = metrics.gauge("gateway_upstream_connections", **labels)
        self._all = metrics.over_all("gateway_upstream_connections", **labels) if shared else None
        self._all_idle = metrics.over_all("gateway_upstream_idle_connections", **labels) if shared else None
        server.idle.number = metrics.gauge("gateway_upstream_idle_connections", **labels)

    def taken(self, here: int) -> int:
        """Connections that sessions hold in all workers; `here` of them in this one."""
        return here if self._all is None else self._all()

    def idle_elsewhere(self) -> bool:
        """Other workers keep connections for reuse."""
        return self._all_idle is not None and self._all_idle() > len(self._server.idle)

    def take(self, limit: int) -> bool:
        """One more place, unless all workers together have `limit`."""
        self._own.add()
        if self._all is None or self._all_idle is None:
            return True  # the caller knows its own number
        with _stored:
            over = self._all() + self._all_idle() - limit
        idle = self._server.idle
        # Who gets the place uses a kept connection, or closes it, so that one of them does not count twice.
        while over > (1 if idle else 0) and len(idle) > 1:
            self._server.close_idle(keep=len(idle) - 1)
            over -= 1
        if over > (1 if idle else 0):
            self._own.add(-1)
            return False
        return True

    def free(self) -> None:
        """The place is given back."""
        self._own.add(-1)


class Waiting:
    """How many sessions are in line for a pool, here and in all workers. `labels` and `shared` as with `Places`."""

    __slots__ = ("_all", "_own")

    def __init__(self, labels: Mapping[str, str], shared: bool) -> None:
        self._own = metrics.gauge("gateway_upstream_waiting", **labels)
        self._all = metrics.over_all("gateway_upstream_waiting", **labels) if shared else None

    @property
    def shared(self) -> bool:
        """Other workers may have sessions in line too."""
        return self._all is not None

    def add(self, n: int) -> None:
        """`n` more, or fewer, wait here."""
        self._own.add(n)

    def total(self, here: int) -> int:
        """Sessions in line in all workers; `here` of them in this one."""
        return here if self._all is None else self._all()
