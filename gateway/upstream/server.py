"""One upstream server: where it is, how it does, what it last announced, and its idle connections.

Plain state that the pool, the prelude and the probe read and write; it opens nothing itself.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import deque
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.observe.counters import Count
    from gateway.protocol.smtp import Ehlo
    from gateway.upstream.places import Places
    from gateway.upstream.smtp import Connection

Address = tuple[str, int] | str
"""Numeric host and port, or the path of a unix socket."""

DEFAULT_PORTS = {"smtp": 25, "smtps": 465, "lmtp": 24, "imap": 143, "imaps": 993, "pop3": 110, "pop3s": 995}
IMPLICIT_TLS = ("smtps", "imaps", "pop3s")
FRESH_SECONDS = 60.0
STALE_SECONDS = 600.0
RETRY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Target:
    """A server's URL in parts: `path` of a unix socket, else `host` (no brackets) and `port`."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def protocol(self) -> str:
        """smtp, lmtp, imap or pop3: what is spoken there, whatever it is wrapped in."""
        return self.scheme.removesuffix("s") if self.scheme in IMPLICIT_TLS else self.scheme

    def same_place(self, other: Target) -> bool:
        """Whether both are one address, and its server speaks one protocol, with TLS from the start or not."""
        return (self.protocol, self.host, self.port, self.path) == (other.protocol, other.host, other.port, other.path)

    def __str__(self) -> str:
        if self.path:
            return f"{self.scheme}+unix:{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def parse_server(url: str, default_scheme: str = "smtp") -> Target:
    """Read `smtp://host[:port]`, `imaps://...`, `[lmtp+]unix:/path` or a bare `host[:port]`.

    `default_scheme` is what a bare one and `unix:` mean. IPv6 addresses stand in brackets. Raises ValueError with a
    text for the administrator. Servers come from the pipeline file and from auth servers, so this does not rely on the
    configuration's checks.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = default_scheme, url
        head, unix, path = url.partition("unix:")
        if unix and (not head or (head[-1] == "+" and head[:-1] in DEFAULT_PORTS)):
            if not path.startswith("/") or "\0" in path:
                raise ValueError(f"{url!r}: unix: needs an absolute path")
            return Target(head.rstrip("+") or default_scheme, "", 0, "/" + path.lstrip("/"))
    if scheme not in DEFAULT_PORTS:
        raise ValueError(f"{url!r}: unknown scheme {scheme!r}; {', '.join(DEFAULT_PORTS)} and unix are known")
    host, port = _host_and_port(url, rest.removesuffix("/"))
    return Target(scheme, host, DEFAULT_PORTS[scheme] if port is None else port, "")


def _can_be_looked_up(host: str) -> bool:
    """getaddrinfo raises no OSError for a name with a label that is empty or too long."""
    try:
        return bool(host.encode("idna"))
    except UnicodeError:
        return False


def _host_and_port(url: str, text: str) -> tuple[str, int | None]:
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError(f"{url!r}: an IPv6 address is written [address]:port")
        try:
            host = ipaddress.IPv6Address(host).compressed
        except ValueError:
            raise ValueError(f"{url!r}: {host!r} is no IPv6 address") from None
        port = rest[1:] if rest else None
    else:
        host, colon, digits = text.partition(":")
        port = digits if colon else None
        if port is not None and ":" in port:
            raise ValueError(f"{url!r}: an IPv6 address is written [address]:port")
    if not host or not host.isprintable() or any(c in host for c in " /@?#") or not _can_be_looked_up(host):
        raise ValueError(f"{url!r}: no host name or address")
    if port is None:
        return host.lower(), None
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"{url!r}: {port!r} is no port (1 to 65535)")
    return host.lower(), int(port)


class Idle(deque["Connection"]):
    """Connections kept for reuse, the one used last at the right; `number` is that of this worker in the metrics."""

    number: Count | None = None

    def append(self, connection: Connection) -> None:
        super().append(connection)
        self._add(1)

    def pop(self) -> Connection:  # type: ignore[override]  # no deque pops at a place
        connection = super().pop()
        self._add(-1)
        return connection

    def popleft(self) -> Connection:
        connection = super().popleft()
        self._add(-1)
        return connection

    def remove(self, connection: Connection) -> None:
        super().remove(connection)
        self._add(-1)

    def _add(self, n: int) -> None:
        if self.number is not None:
            self.number.add(n)


class Server:
    """One server of a pool.

    `active` connections of this worker are in use, `idle` ones wait for reuse. `places`, `ejections` and `up` (only
    where the worker probes) are its metrics, once it is in a pool. `weight` is what counts now, `configured_weight`
    what the pipeline says; `drained` by the administrator it gets no new sessions, nor with weight 0.
    `failures` in a row; before `ejected_until` (pool's clock) no session goes there, and for a while after it fewer
    do; `resting_until` see `Pool.failed`. `ejection_told`: other workers know of it, told at `told_at`.
    `down` is the health check's word, `latency` the seconds that the last check took; `changed`: when the server last
    went or came back, None for never. `ehlo` is the last EHLO that the gateway saw in its own state: after TLS,
    before it speaks for a client; of a store its capabilities. `fixed` is the address of a server that has no name to
    look up. `protocol` is smtp, lmtp, imap or pop3; `lmtp`: it speaks LMTP (RFC 2033), not SMTP.
    """

    places: Places
    ejections: Count

    __slots__ = (
        "_addresses", "_fresh_until", "_lookup", "active", "changed", "configured_weight", "down", "drained", "ehlo",
        "ejected_until", "ejection_told", "ejections", "failures", "fixed", "idle", "implicit_tls", "key", "last_error",
        "latency", "lmtp", "local", "places", "protocol", "resting_until", "share", "target", "told_at", "turn", "up",
        "url", "weight",
    )  # fmt: skip

    def __init__(self, url: str, weight: int = 1, default_scheme: str = "smtp") -> None:
        self.target = parse_server(url, default_scheme)
        if weight < 1:
            raise ValueError(f"{url!r}: weight {weight} is less than 1")
        self.url = str(self.target)
        self.key = blake2b(self.url.encode(), digest_size=16).digest()
        self.weight = self.configured_weight = weight
        self.implicit_tls = self.target.scheme in IMPLICIT_TLS
        self.protocol = self.target.protocol
        self.lmtp = self.protocol == "lmtp"
        self.fixed = _fixed(self.target)
        self.local = bool(self.target.path) or (bool(self.fixed) and ipaddress.ip_address(self.target.host).is_loopback)
        self.active = 0
        self.idle = Idle()
        self.drained = False
        self.up: Count | None = None
        self.failures = 0
        self.ejected_until = float("-inf")
        self.resting_until = float("-inf")
        self.ejection_told = False
        self.told_at = float("-inf")
        self.down = False
        self.changed: float | None = None
        self.latency: float | None = None
        self.last_error = ""
        self.ehlo: Ehlo | None = None
        self.share = 0.0
        self.turn = 0
        self._addresses: list[Address] = []
        self._fresh_until = float("-inf")
        self._lookup: asyncio.Task[list[Address]] | None = None

    def available(self, now: float) -> bool:
        """Whether sessions may go there now (it may still be busy)."""
        return self.in_service and not self.down and self.ejected_until <= now and self.resting_until <= now

    @property
    def in_service(self) -> bool:
        """The administrator lets new sessions go there."""
        return not self.drained and self.weight > 0

    def close_idle(self, keep: int = 0) -> None:
        """End connections kept for reuse, those first that were used longest ago, but for `keep` of them."""
        while len(self.idle) > keep:
            connection = self.idle.popleft()
            connection.stop_waiting()
            connection.end_quietly()

    async def addresses(self) -> list[Address]:
        """Where to connect, in order of preference.

        Names are looked up once a minute. An answer of the last ten minutes is used while the next is fetched,
        and longer where that fails. Raises OSError (gaierror) for a name that never resolved.
        """
        if self.fixed:
            return self.fixed
        loop = asyncio.get_running_loop()
        age = loop.time() - self._fresh_until
        if age < 0:
            return self._addresses
        lookup = self._look_up(loop)
        if self._addresses and age < STALE_SECONDS:
            return self._addresses
        return await asyncio.shield(lookup)

    def known_addresses(self) -> list[Address]:
        """The addresses of the last look-up, without waiting; one that is due begins."""
        if self.fixed:
            return self.fixed
        loop = asyncio.get_running_loop()
        if loop.time() >= self._fresh_until:
            self._look_up(loop)
        return self._addresses

    def _look_up(self, loop: asyncio.AbstractEventLoop) -> asyncio.Task[list[Address]]:
        if self._lookup is None:
            self._lookup = loop.create_task(self._resolve(loop))
            self._lookup.add_done_callback(self._looked_up)
        return self._lookup

    async def _resolve(self, loop: asyncio.AbstractEventLoop) -> list[Address]:
        try:
            found = await loop.getaddrinfo(self.target.host, self.target.port, type=1)  # SOCK_STREAM
        except OSError:
            if not self._addresses:
                raise
            self._fresh_until = loop.time() + RETRY_SECONDS
            return self._addresses
        self._addresses = list(dict.fromkeys((str(entry[4][0]), int(entry[4][1])) for entry in found))
        self._fresh_until = loop.time() + FRESH_SECONDS
        return self._addresses

    def _looked_up(self, task: asyncio.Task[list[Address]]) -> None:
        self._lookup = None
        if not task.cancelled():
            task.exception()  # seen here, so that a look-up nobody waited for is not reported as lost

    def __repr__(self) -> str:
        return f"<Server {self.url} active={self.active} failures={self.failures}>"


def _fixed(target: Target) -> list[Address]:
    if target.path:
        return [target.path]
    try:
        ipaddress.ip_address(target.host)
    except ValueError:
        return []
    return [(target.host, target.port)]
