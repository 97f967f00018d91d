"""One question to one name server: a datagram, and a stream where the answer was too long for one.

Every question has a socket of its own, and with it a source port that nobody can guess; the socket is connected,
so that the kernel drops what comes from elsewhere. What still comes and does not match id and question is no
answer. No task is started: a cancelled question closes its socket on the way out.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from gateway.protocol import dns
from gateway.protocol.errors import PeerError

RESOLV_CONF: Final = Path("/etc/resolv.conf")
MAX_SERVERS: Final = 3
"""Name servers taken from resolv.conf, as the C library does."""


class GarbageError(Exception):
    """A name server sent something, and it was no answer to the question."""


class Server(NamedTuple):
    """A name server's socket address."""

    family: socket.AddressFamily
    address: tuple[str, int] | tuple[str, int, int, int]


def servers_of(addresses: Sequence[tuple[str, int]]) -> tuple[Server, ...]:
    """Servers by numeric address (a zone such as `%eth0` is fine) and port. Raises ValueError."""
    servers = []
    for host, port in addresses:
        try:
            if not 0 < port < 65536:
                raise OverflowError
            family, _, _, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
            )[0]
        except (OSError, OverflowError):
            raise ValueError(f"{host!r} port {port} is not the address of a name server") from None
        servers.append(Server(family, address))  # type: ignore[arg-type]  # str address: IPv4 and IPv6 only
    return tuple(servers)


def system_servers(path: Path = RESOLV_CONF) -> tuple[Server, ...]:
    """The name servers of resolv.conf; this machine's own where it names none (resolv.conf(5))."""
    try:
        lines = path.read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    found: list[Server] = []
    for line in lines:
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver" and len(found) < MAX_SERVERS:
            try:
                found += servers_of([(words[1], 53)])
            except ValueError:
                continue  # the C library skips what it cannot read, too
    return tuple(found) or servers_of([("127.0.0.1", 53)])


def _answer(data: bytes, number: int, name: str, qtype: int) -> dns.Answer | None:
    """The answer in `data` if it is one to this question; a server that says no need not repeat the question."""
    try:
        answer = dns.parse(data)
    except PeerError:
        return None
    asked, asked_type = answer.question
    if answer.question == ("", 0):
        matches = answer.rcode not in (dns.NOERROR, dns.NXDOMAIN)
    else:
        matches = asked_type == qtype and canonical(asked) == name
    return answer if matches and answer.id == number else None


def canonical(name: str) -> str:
    """A name for comparing: lower case, without the last dot."""
    return name.removesuffix(".").lower()


class Question:
    """A question to one server. `garbage`: something came that was no answer, whatever came after it."""

    def __init__(self, server: Server, name: str, qtype: int) -> None:
        self._server = server
        self._asked = secrets.randbits(16), name, qtype
        self.garbage = False

    async def ask(self) -> dns.Answer:
        """Wait for the answer, without a limit of its own.

        Raises OSError if the network says no, GarbageError if the stream does not hold an answer, `ProtocolError`
        if the name cannot be asked.
        """
        wire = dns.query(*self._asked)
        answer = await self._over_udp(wire)
        return await self._over_tcp(wire) if answer.truncated else answer

    async def _over_udp(self, wire: bytes) -> dns.Answer:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[dns.Answer] = loop.create_future()
        with socket.socket(self._server.family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.connect(self._server.address)
            sock.send(wire)
            loop.add_reader(sock, self._readable, sock, answered)
            try:
                return await answered
            finally:
                loop.remove_reader(sock)

    def _readable(self, sock: socket.socket, answered: asyncio.Future[dns.Answer]) -> None:
        if answered.done():
            return
        try:
            data = sock.recv(65535)
        except BlockingIOError:
            return
        except OSError as error:
            answered.set_exception(error)
            return
        answer = _answer(data, *self._asked)
        if answer is None:
            self.garbage = True
        else:
            answered.set_result(answer)

    async def _over_tcp(self, wire: bytes) -> dns.Answer:
        """RFC 7766 section 8: the same question on a stream, each message behind its length."""
        loop = asyncio.get_running_loop()
        with socket.socket(self._server.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            await loop.sock_connect(sock, self._server.address)
            await loop.sock_sendall(sock, len(wire).to_bytes(2, "big") + wire)
            data = b""
            while len(data) < 2 or len(data) < 2 + int.from_bytes(data[:2], "big"):
                block = await loop.sock_recv(sock, 65537 - len(data))
                if not block:
                    raise GarbageError
                data += block
        answer = _answer(data[2:], *self._asked)
        if answer is None:
            raise GarbageError
        return answer
