"""From a server's address to an answered EHLO: connect, PROXY header, TLS or greeting + STARTTLS, EHLO.

The same for mail stores, with CAPABILITY or CAPA for EHLO. One server, no stages, no pool: what sessions, health checks
and `gateway probe` have in common.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from gateway.protocol.smtp import Reply
from gateway.relay.tls import TlsError, client_context
from gateway.relay.wire import EndOfStream, Wire, WireTimeout, connect
from gateway.upstream.connection import UpstreamConnection, UpstreamError
from gateway.upstream.imap import ImapConnection
from gateway.upstream.pop3 import Pop3Connection
from gateway.upstream.profile import parse_keywords
from gateway.upstream.smtp import Connection
from gateway.upstream.store import StoreConnection

if TYPE_CHECKING:
    from gateway.observe.transcript import Transcript
    from gateway.upstream.pool import PoolSettings
    from gateway.upstream.server import Address, Server

MOST_ADDRESSES = 4
OUR_SHORTAGE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)  # says nothing of the server
CONNECTIONS: dict[str, type[Connection | ImapConnection | Pop3Connection]] = {
    "smtp": Connection, "lmtp": Connection, "imap": ImapConnection, "pop3": Pop3Connection,
}  # fmt: skip
FIRST_QUESTION = {"smtp": "EHLO", "lmtp": "LHLO", "imap": "CAPABILITY", "pop3": "CAPA"}


class LoopDetected(UpstreamError):
    """The greeting is one of ours: the connection leads back to this gateway."""


class ClientRefused(Exception):
    """A 5xx greeting to a connection that speaks for a client: a verdict on the client, not on the server."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(f"{reply.code} {reply.text}")
        self.reply = reply


@lru_cache(maxsize=64)
def tls_context(ca_file: str | None, verify: bool) -> ssl.SSLContext:
    """The context for these settings; made once, since reading the authorities takes milliseconds."""
    return client_context(ca_file, verify)


async def dial(
    server: Server,
    settings: PoolSettings,
    *,
    hostname: str,
    instance: str = "",
    preface: Callable[[UpstreamConnection], None] | None = None,
    transcript: Transcript | None = None,
    esmtp: bool = True,
) -> UpstreamConnection:
    """Open a connection up to the last EHLO of the gateway's own, or to a store's capabilities.

    A store of a pool that assumes them is not asked, and says STARTTLS if `tls` is required or they name it.

    `esmtp`: the client said EHLO; where it did not, a pool with `hello: as_client` gets HELO. `instance` is what our
    own greetings contain. `preface` may write a PROXY header. Raises UpstreamError, of kind `busy` for a 421 (RFC 5321
    3.8) and else for what speaks against the server; ClientRefused; what `preface` raises.
    """
    wire = await _connect(server, settings)
    connection: UpstreamConnection = CONNECTIONS[server.protocol](
        wire, server, hostname=hostname, command_timeout=settings.command_timeout, transcript=transcript
    )
    if isinstance(connection, StoreConnection) and settings.assume is not None:
        connection.assumed = parse_keywords(settings.assume)
    try:
        if preface is not None:
            preface(connection)
        await _greet(connection, settings, instance)
        await _hello(connection, settings, esmtp=esmtp or settings.hello == "ehlo")
        if settings.tls != "off" and not server.implicit_tls:
            await _start_tls(connection, settings)
        if connection.closing:
            raise connection.unasked()
    except (UpstreamError, ClientRefused):
        connection.end_quietly()
        raise
    except BaseException:
        connection.abort()
        raise
    return connection


async def _connect(server: Server, settings: PoolSettings) -> Wire:
    """The first of the server's addresses that takes a connection."""
    failure = UpstreamError("down", server.url, "the name has no address")
    for address in (server.fixed or await _look_up(server, settings))[:MOST_ADDRESSES]:
        try:
            return await connect(address, timeout=settings.connect_timeout, source=settings.source)
        except TimeoutError:
            failure = UpstreamError("timeout", server.url, f"no connection within {settings.connect_timeout:g}s")
        except OSError as error:
            kind: Literal["busy", "down"] = "busy" if error.errno in OUR_SHORTAGE else "down"
            failure = UpstreamError(kind, server.url, f"cannot connect: {error.strerror or error}")
    raise failure


async def _look_up(server: Server, settings: PoolSettings) -> list[Address]:
    try:
        async with asyncio.timeout(settings.connect_timeout):
            return await server.addresses()
    except TimeoutError:
        raise UpstreamError("timeout", server.url, "the name could not be looked up in time") from None
    except OSError as error:
        raise UpstreamError("down", server.url, f"the name does not resolve: {error.strerror or error}") from None


async def _greet(connection: UpstreamConnection, settings: PoolSettings, instance: str) -> None:
    """Implicit TLS, then the greeting, which must be 220 (OK, +OK) and not our own."""
    if connection.server.implicit_tls:
        await _shake_hands(connection, settings, verify=settings.verify)
        connection.tls = True
    greeting = await connection.read_greeting(settings.greeting_timeout)
    url = connection.url
    if instance and any(instance.encode() in line for line in greeting.lines):
        raise LoopDetected("garbage", url, "the server is this gateway itself")
    if greeting.code == 220:
        return
    text = f"greeting {greeting.code} {greeting.text}"
    if greeting.code >= 500 and connection.speaks_for_client:
        raise ClientRefused(greeting)
    raise UpstreamError(_kind(connection, greeting), url, text, greeting)


def _kind(connection: UpstreamConnection, reply: Reply) -> Literal["busy", "down"]:
    """Whether a refused greeting or EHLO speaks against the server: not a 421, nor where it may mean the client."""
    return "busy" if reply.code == 421 or connection.speaks_for_client else "down"


async def _hello(connection: UpstreamConnection, settings: PoolSettings, *, esmtp: bool = True) -> None:
    reply = await connection.hello(esmtp=esmtp, timeout=settings.greeting_timeout)
    if not connection.greeted:
        text = f"{FIRST_QUESTION[connection.protocol]} refused: {reply.code} {reply.text}"
        raise UpstreamError(_kind(connection, reply), connection.url, text, reply)


async def _start_tls(connection: UpstreamConnection, settings: PoolSettings) -> None:
    """STARTTLS and another EHLO (RFC 3207). Without `required`, only an offer that is taken back leaves it clear."""
    required = settings.tls == "required"
    url, verb = connection.url, connection.starttls.decode("ascii")
    if verb not in connection.extensions:
        if not required:
            return
        if not isinstance(connection, StoreConnection) or connection.assumed is None:
            raise UpstreamError("tls", url, f"{verb} is not offered, but the pool requires TLS")
    reply = await connection.command(connection.starttls, timeout=settings.greeting_timeout)
    if reply.code == 421:
        raise UpstreamError("busy", url, f"{verb}: 421 {reply.text}")
    if reply.code != connection.starttls_code:
        if required:
            raise UpstreamError("tls", url, f"{verb} refused: {reply.code} {reply.text}")
        return
    await _shake_hands(connection, settings, verify=required and settings.verify)
    connection.tls = required
    await _hello(connection, settings)


async def _shake_hands(connection: UpstreamConnection, settings: PoolSettings, *, verify: bool) -> None:
    name = settings.server_name or connection.server.target.host or None

    async def handshake(wire: Wire) -> None:
        context = tls_context(settings.ca_file, verify)
        wire.set_deadline(settings.greeting_timeout)
        await wire.start_tls_client(context, name)

    try:
        await connection.start_tls(handshake)
    except WireTimeout:
        raise connection.failed("timeout", "the TLS handshake took too long") from None
    except EndOfStream:
        raise connection.failed("tls", "closed the connection during the TLS handshake") from None
    except (TlsError, ValueError) as error:
        raise connection.failed("tls", f"TLS: {error}") from None
