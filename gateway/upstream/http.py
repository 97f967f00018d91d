"""A small HTTP client for questions with short answers: GET, header fields out, header fields in.

It exists because one question a session is most of what a session costs: over `Wire` and `protocol.http1` a call
takes a fraction of a general client's time. Connections are kept alive and bounded; each server's names are looked
up again, its addresses tried in turn, and a server that fails is left alone for a moment while others answer.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import ssl
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gateway.protocol import http1
from gateway.protocol.errors import PeerError
from gateway.protocol.http1 import Response
from gateway.relay.tls import client_context
from gateway.relay.wire import Address, Wire, WireTimeout, connect

__all__ = ["HttpClient", "HttpError", "Response"]

IDLE_SECONDS: Final = 30.0
REST_SECONDS: Final = 5.0
FRESH_SECONDS: Final = 60.0
WAITING: Final = 1000  # questions that may wait for a connection to a server

_URL = re.compile(r"(https?)://(\[[0-9A-Fa-f:.]+\]|[^/?#:@\[\]\s]+)(?::(\d{1,5}))?(/[!-~]*)?")
_UNIX_URL = re.compile(r"(?:http://)?unix:(/[^:\s]*)(?::(/[!-~]*))?")


class HttpError(Exception):
    """No server answered; the text says which and why, and holds nothing of the request."""


class _Busy(HttpError):
    """All connections are in use: no fault of the server's, it is not left alone for that."""


class _Stale(Exception):
    """A kept connection ended before the first byte of the answer: the server had closed it meanwhile."""


@dataclass(frozen=True, slots=True)
class _Url:
    """A server's URL in parts: `path` of a unix socket, else `host` (no brackets) and `port`."""

    tls: bool
    host: str
    port: int
    path: str
    target: str


def _parse_url(url: str) -> _Url:
    unix = _UNIX_URL.fullmatch(url)
    if unix is not None:
        return _Url(False, "localhost", 0, unix[1], unix[2] or "/")
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError(f"{url!r} is not an HTTP address; write http://host:port/path, https://... or unix:/path:/uri")
    tls = match[1] == "https"
    port = int(match[3]) if match[3] else 443 if tls else 80
    if not 0 < port < 65536:
        raise ValueError(f"{url!r}: {port} is no port")
    return _Url(tls, match[2].strip("[]"), port, "", match[4] or "/")


class _Connection:
    """A connection to one server; while it is idle it is the wire's relay, and ends when anything happens."""

    __slots__ = ("reused", "server", "since", "wire")

    def __init__(self, wire: Wire, server: _Server) -> None:
        self.wire = wire
        self.server = server
        self.since = 0.0
        self.reused = False

    def received(self, data: bytes) -> None:
        """Bytes that nobody asked for."""
        self.drop()

    def ended(self) -> None:
        """The server closed it."""
        self.drop()

    def lost(self, error: BaseException | None) -> None:
        """It is gone."""
        if self in self.server.idle:
            self.server.idle.remove(self)

    def drop(self) -> None:
        """Close an idle connection."""
        self.lost(None)
        self.wire.relay = None
        self.wire.close()

    def write_paused(self) -> None:
        """Nothing is written while idle."""

    def write_resumed(self) -> None:
        """Nothing is written while idle."""


class _Server:
    """One server: its addresses, its idle connections (the last used last), who waits for one."""

    __slots__ = ("_addresses", "_fresh_until", "_lookup", "active", "idle", "resting_until", "text", "url", "waiting")

    def __init__(self, url: str) -> None:
        self.url = _parse_url(url)
        self.text = url.partition("?")[0]  # for errors: a query may hold a key
        self.active = 0
        self.idle: list[_Connection] = []
        self.waiting: deque[asyncio.Future[None]] = deque()
        self.resting_until = float("-inf")
        self._addresses: list[Address | str] = []
        self._fresh_until = float("-inf")
        self._lookup: asyncio.Task[list[Address | str]] | None = None
        if self.url.path:
            self._addresses, self._fresh_until = [self.url.path], float("inf")
        elif _numeric(self.url.host):
            self._addresses, self._fresh_until = [(self.url.host, self.url.port)], float("inf")

    async def addresses(self) -> list[Address | str]:
        """Where to connect; names are looked up once a minute. Raises OSError (gaierror)."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._fresh_until:
            return self._addresses
        if self._lookup is None:
            self._lookup = loop.create_task(self._resolve(loop))
            self._lookup.add_done_callback(self._looked_up)
        return await asyncio.shield(self._lookup)

    async def _resolve(self, loop: asyncio.AbstractEventLoop) -> list[Address | str]:
        try:
            found = await loop.getaddrinfo(self.url.host, self.url.port, type=1)  # SOCK_STREAM
        except OSError:
            if not self._addresses:
                raise
            self._fresh_until = loop.time() + REST_SECONDS  # the last known ones may still serve
            return self._addresses
        self._addresses = list(dict.fromkeys((str(entry[4][0]), int(entry[4][1])) for entry in found))
        self._fresh_until = loop.time() + FRESH_SECONDS
        return self._addresses

    def _looked_up(self, task: asyncio.Task[list[Address | str]]) -> None:
        self._lookup = None
        if not task.cancelled():
            task.exception()  # seen, also where nobody waits any more

    def release(self) -> None:
        """Give a place for a connection to whoever waits longest."""
        while self.waiting:
            future = self.waiting.popleft()
            if not future.done():
                future.set_result(None)
                return
        self.active -= 1


def _numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class HttpClient:
    """Asks the first of several servers that answers.

    `servers` are URLs (`http://host:port/path`, `https://...`, `unix:/path:/uri`) in order of preference. `timeout`
    in seconds bounds a whole `get`; a server gets an equal share of what is left with those behind it.
    `max_connections` a server; further questions wait, at most 1000. `ca_file` (PEM) instead of the system's
    authorities for https, which is always verified. Raises ValueError for what is no such URL. One event loop uses
    an object.
    """

    def __init__(
        self, servers: Sequence[str], *, timeout: float = 15.0, max_connections: int = 32, ca_file: str | None = None
    ) -> None:
        if not servers:
            raise ValueError("no HTTP server given")
        self._servers = [_Server(url) for url in servers]
        self._timeout = timeout
        self._max_connections = max_connections
        self._ca_file = ca_file
        self._tls: ssl.SSLContext | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    async def get(self, headers: Sequence[tuple[str, bytes]]) -> Response:
        """Ask with these header fields, in this order behind Host.

        The answer is whatever a server says, its status too. Raises HttpError where none answers, LocalError for a
        value with CR, LF or NUL.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        end = now + self._timeout
        servers = self._servers
        if len(servers) > 1:
            servers = [server for server in servers if server.resting_until <= now] or servers
        failures: list[str] = []
        for position, server in enumerate(servers):
            request = http1.request("GET", server.url.target, [("Host", _host(server.url)), *headers])
            until = now + (end - now) / (len(servers) - position)
            try:
                return await self._ask(server, request, until)
            except HttpError as error:
                now = loop.time()
                if not isinstance(error, _Busy):
                    server.resting_until = now + REST_SECONDS
                failures.append(str(error))
        raise HttpError("; ".join(failures))

    async def aclose(self) -> None:
        """Close what is idle; nobody asks any more."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for server in self._servers:
            for connection in list(server.idle):
                connection.drop()

    async def _ask(self, server: _Server, request: bytes, until: float) -> Response:
        """One server's answer before the loop's time `until`."""
        if server.active < self._max_connections:
            server.active += 1
        else:
            await self._wait_for_place(server, until)
        try:
            if server.idle:
                connection = server.idle.pop()
                connection.wire.relay = None
                try:
                    return await self._exchange(connection, request, until)
                except _Stale:
                    pass  # GET may be repeated (RFC 9110 section 9.2.2)
            return await self._exchange(await self._open(server, until), request, until)
        finally:
            server.release()

    async def _wait_for_place(self, server: _Server, until: float) -> None:
        if len(server.waiting) >= WAITING:
            raise _Busy(f"{server.text}: too many questions wait for an answer")
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        server.waiting.append(place)
        try:
            async with asyncio.timeout_at(until):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled():
                server.release()
            elif place in server.waiting:
                server.waiting.remove(place)
            if isinstance(error, TimeoutError):
                raise _Busy(f"{server.text}: all {self._max_connections} connections are in use") from None
            raise

    async def _exchange(self, connection: _Connection, request: bytes, until: float) -> Response:
        """Send the request and read the response; the connection is idle or closed afterwards."""
        wire, server = connection.wire, connection.server
        parser = http1.ResponseParser()
        answered = reusable = False
        try:
            wire.set_deadline(until - asyncio.get_running_loop().time())
            wire.write(request)
            while not parser.done:
                data = await wire.read()
                if data:
                    answered = True
                    parser.feed(data)
                elif connection.reused and not answered:
                    raise _Stale
                else:
                    parser.eof()
            reusable = parser.reusable and not wire.eof
            return parser.response
        except WireTimeout:
            return _cut_short(parser, server)
        except PeerError as error:
            raise HttpError(f"{server.text}: {wire.error or error}") from None
        finally:
            if reusable:
                self._keep(connection)
            else:
                wire.close()

    def _keep(self, connection: _Connection) -> None:
        loop = asyncio.get_running_loop()
        connection.reused = True
        connection.since = loop.time()
        connection.wire.relay = connection
        connection.server.idle.append(connection)
        if self._sweeper is None:
            self._sweeper = loop.call_later(IDLE_SECONDS, self._sweep, loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close what was idle for too long; come back while anything is idle."""
        self._sweeper = None
        old = loop.time() - IDLE_SECONDS
        for server in self._servers:
            for connection in [one for one in server.idle if one.since <= old]:
                connection.drop()
        if any(server.idle for server in self._servers):
            self._sweeper = loop.call_later(IDLE_SECONDS / 2, self._sweep, loop)

    async def _open(self, server: _Server, until: float) -> _Connection:
        """Connect to the first of the server's addresses that takes it, and shake hands. Raises HttpError."""
        loop = asyncio.get_running_loop()
        error: OSError = TimeoutError()
        try:
            async with asyncio.timeout_at(until):
                addresses = await server.addresses()
        except OSError as failure:  # TimeoutError is one
            raise HttpError(f"{server.text}: cannot look up {server.url.host}: {_reason(failure)}") from None
        for position, address in enumerate(addresses):
            left = (until - loop.time()) / (len(addresses) - position)
            if left <= 0:
                break
            try:
                wire = await connect(address, timeout=left)
            except OSError as failure:
                error = failure
                continue
            if not server.url.tls:
                return _Connection(wire, server)
            try:
                wire.set_deadline(until - loop.time())
                await wire.start_tls_client(self._context(), server.url.host)
            except BaseException as failure:
                wire.abort()
                if not isinstance(failure, OSError):
                    raise
                error = failure
                continue
            return _Connection(wire, server)
        raise HttpError(f"{server.text}: cannot connect: {_reason(error)}")

    def _context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = client_context(self._ca_file, verify=True)
        return self._tls


def _host(url: _Url) -> bytes:
    """Host as nginx sends it, without the port."""
    return (f"[{url.host}]" if ":" in url.host else url.host).encode()


def _cut_short(parser: http1.ResponseParser, server: _Server) -> Response:
    """The deadline passed: an answer whose body alone is missing is one."""
    try:
        parser.eof()
        return parser.response
    except PeerError:
        raise HttpError(f"{server.text}: no answer in time") from None


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "time-out"
    return error.strerror or str(error) or type(error).__name__
