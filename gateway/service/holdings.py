"""What the supervisor holds for all generations: listening sockets, counters, embedded servers.

A generation says what its configuration wants (`Wish`) and is handed it. What a generation got that then failed, or
what the next one does not want any more, is let go with `keep`.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

from gateway.admin import place
from gateway.observe.counters import CounterMap
from gateway.pipeline.plan import ListenerPlan
from gateway.service import systemd
from gateway.service.channel import Json, Message
from gateway.service.control_sockets import Access, ControlSockets
from gateway.service.embedded import Account, EmbeddedServers, Key
from gateway.service.held import HeldSockets
from gateway.service.listening import StartError, look_up, plan_of
from gateway.service.rows import Rows


@dataclass(frozen=True)
class Wish:
    """What one configuration wants, of its message `open`."""

    listeners: list[ListenerPlan]
    admin: str  # unix:/path, host:port, or empty
    admin_is_default: bool
    metrics: str
    access: Access
    embedded: list[str]
    account: Account
    rows: int
    files: list[str]
    drain: float  # seconds

    @classmethod
    def of(cls, message: Message) -> Wish:
        """Raises KeyError, TypeError and ValueError for a message that is none."""
        identity = cast("list[int] | None", message["identity"])
        is_default = bool(message["admin_default"])
        admin = f"unix:{place.default_socket()}" if is_default else str(message["admin"] or "")
        return cls(
            listeners=[plan_of(one) for one in cast("list[Message]", message["listeners"])],
            admin=admin,
            admin_is_default=is_default,
            metrics=str(message["metrics"] or ""),
            access=Access(int(str(message["admin_mode"])), None if identity is None else (identity[0], identity[1])),
            embedded=list(map(str, cast("list[str]", message["embedded"]))),
            account=None if identity is None else (identity[0], identity[1], tuple(identity[2:])),
            rows=int(str(message["rows"])),
            files=list(map(str, cast("list[str]", message["files"]))),
            drain=float(str(message["drain"])),
        )

    @property
    def control(self) -> dict[str, Access]:
        """The addresses of the admin API and of the metrics."""
        return {address: self.access for address in (self.admin, self.metrics) if address}

    @property
    def servers(self) -> list[Key]:
        """The embedded servers."""
        return [(url, self.account) for url in self.embedded]


NOTHING = Wish([], "", False, "", Access(0o600, None), [], None, 0, [], 0.0)


@dataclass
class Handed:
    """What a generation got: sockets, the message that says which is which, and rows of the counters."""

    message: Message
    sockets: list[socket.socket]
    rows: list[int] = field(default_factory=list)


class Holdings:
    """Made once, by the supervisor. Raises systemd.ActivationError."""

    def __init__(self) -> None:
        self.counters = CounterMap.create(256)  # 64 workers: three generations
        self.rows = Rows(self.counters)
        self.embedded = EmbeddedServers()
        self._from_manager = systemd.inherited_sockets()
        self._listeners = HeldSockets(self._inherited)
        self._control = ControlSockets()
        self._secret = secrets.token_bytes(32)

    async def hand_over(self, wish: Wish, still_wanted: Callable[[], bool]) -> Handed:
        """Bind and start what is wished and not there yet. Raises StartError.

        `still_wanted` is asked once everything that takes time is done.
        """
        new = [plan for plan in self._listeners.missing(wish.listeners) if plan.host]
        addresses = await asyncio.to_thread(look_up, new) if new else {}
        embedded: dict[str, Json] = {url: await self.embedded.get(url, wish.account) for url in wish.embedded}
        if not still_wanted():
            raise StartError("the process that asked is gone")
        groups = self._listeners.get(wish.listeners, owner=wish.access.owner, addresses=addresses)
        notes: list[Json] = []
        groups.append(self._admin(wish, notes))
        groups.append([self._bound(wish.metrics, wish.access)] if wish.metrics else [])
        rows = self.rows.take(wish.rows)
        message: Message = {
            "op": "opened",
            "sockets": [len(group) for group in groups],
            "rows": list(rows),
            "embedded": embedded,
            "notes": notes,
            "secret": self._secret.hex(),
        }
        return Handed(message, [sock for group in groups for sock in group], rows)

    def keep(self, current: Wish) -> None:
        """Only the sockets that the configuration that serves wants, with its options."""
        self._listeners.keep(current.listeners)
        self._control.keep(current.control)

    def close_listeners(self) -> None:
        """Nobody listens any more."""
        self._listeners.close()

    async def close(self) -> None:
        """Everything."""
        self._listeners.close()
        self._control.close()
        await self.embedded.keep(())

    def _admin(self, wish: Wish, notes: list[Json]) -> list[socket.socket]:
        """The default place of the admin API is done without where it cannot be had."""
        if not wish.admin:
            return []
        try:
            return [self._bound(wish.admin, wish.access)]
        except StartError as error:
            if not wish.admin_is_default:
                raise
            notes.append(f"no admin API: {error}; write `admin: unix:/path` or `admin: off` below `process`")
            return []

    def _bound(self, address: str, access: Access) -> socket.socket:
        try:
            return self._control.get(address, access)
        except OSError as error:
            raise StartError(f"{address}: cannot listen: {error.strerror or error}") from None

    def _inherited(self, plan: ListenerPlan) -> list[socket.socket]:
        found = systemd.match(self._from_manager, plan.host, plan.port, plan.path)
        return [found] if found is not None else []
