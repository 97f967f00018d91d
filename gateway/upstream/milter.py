"""One connection to one milter filter: `protocol.milter_mta` over a wire, with its three clocks.

The names of the clocks are Postfix's (postconf(5) milter_connect_timeout, milter_command_timeout,
milter_content_timeout). Each is the wait for one answer; PROGRESS begins it anew.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from gateway.protocol.milter import (
    DEFAULT_MACROS,
    VERSION,
    ConnFail,
    Continue,
    MilterError,
    Modification,
    Progress,
    ReplaceBody,
    Skip,
    Stage,
    Verdict,
)
from gateway.protocol.milter_mta import MilterMta, Unasked
from gateway.relay.wire import Address, EndOfStream, Wire, WireTimeout, connect

__all__ = ["FilterAddress", "FilterConnection", "FilterLost", "FilterTimeouts"]

CONTINUE = Continue()
HIGH = 1 << 18  # octets that the filter has not taken, above which we wait for it
MAX_CHANGES = 10_000  # to one message, the pieces of a new body aside: they are kept until the verdict
MAX_CHANGES_SIZE = 16 << 20  # octets of them


class FilterLost(OSError):
    """The filter cannot be reached, broke off, was late or broke the protocol; the text says which filter and what."""


@dataclass(frozen=True, slots=True)
class FilterTimeouts:
    """Seconds: to connect, for the answer to a command, for one to header, body and the end of the message."""

    connect: float = 30.0
    command: float = 30.0
    content: float = 300.0


@dataclass(frozen=True, slots=True)
class FilterAddress:
    """Where a filter listens: `path` of a unix socket, else `host` and `port`."""

    text: str
    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> FilterAddress:
        """Read `unix:/path`, `inet:host:port`, `inet6:[address]:port`, or sendmail's `local:/path`, `inet:port@host`.

        Raises ValueError with a text for the administrator.
        """
        scheme, _, rest = text.partition(":")
        if scheme in ("unix", "local"):
            if not rest.startswith("/"):
                raise ValueError(f"{text!r} needs an absolute path; write {scheme}:/path")
            return cls(text, path=rest)
        if scheme not in ("inet", "inet6"):
            raise ValueError(f"{text!r} is not the socket of a filter; write unix:/path or inet:host:port")
        if "@" in rest:
            port, _, host = rest.partition("@")
        else:
            host, _, port = rest.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise ValueError(f"{text!r} needs host and port; write {scheme}:host:port")
        return cls(text, host=host, port=int(port))

    async def resolved(self) -> list[Address | str]:
        """The addresses to try, in order. Raises OSError for a name that does not resolve."""
        if self.path:
            return [self.path]
        try:
            return [(ipaddress.ip_address(self.host).compressed, self.port)]
        except ValueError:
            found = await asyncio.get_running_loop().getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        return [(str(address[0]), self.port) for *_, address in found]


class FilterConnection:
    """A filter's connection for one client session. `mta` is what was said; `lost` why it is of no use any more."""

    __slots__ = ("_sock", "address", "lost", "mta", "timeouts", "wire")

    def __init__(
        self,
        address: FilterAddress,
        timeouts: FilterTimeouts,
        macro_lists: Mapping[Stage, tuple[str, ...]] = DEFAULT_MACROS,
    ) -> None:
        self.address = address
        self.timeouts = timeouts
        self.mta = MilterMta(macro_lists=macro_lists)
        self.wire: Wire
        self.lost = "not connected"
        self._sock: socket.socket | None = None

    async def open(self, version: int = VERSION) -> None:
        """Connect and negotiate. Raises FilterLost."""
        until = asyncio.get_running_loop().time() + self.timeouts.connect
        error: Exception | None = None
        try:
            async with asyncio.timeout_at(until):
                addresses = await self.address.resolved()
        except OSError as unknown:
            raise self._fail(f"cannot look up its name: {unknown.strerror or 'time-out'}") from unknown
        for address in addresses:
            left = max(0.001, until - asyncio.get_running_loop().time())
            try:
                self.wire = await connect(address, timeout=left)
                break
            except (OSError, WireTimeout) as failed:
                error = failed
        else:
            why = "time-out" if isinstance(error, TimeoutError) else _said(error)
            raise self._fail(f"cannot connect: {why}") from error
        self.lost = ""
        if not self.address.path:
            self._sock = self.wire.transport.get_extra_info("socket")
        self.wire.write(self.mta.offer(version))
        async for _ in self._answers(self.timeouts.command):
            pass

    @property
    def usable(self) -> bool:
        """Whether the filter is there still, and has not spoken out of turn."""
        return not self.lost and not self.wire.eof and not self.wire.buffered and not self.mta.expects_reply

    async def say(self, data: bytes, *, content: bool = False) -> Verdict:
        """Write what the machine gave for an event; the filter's answer, `Continue` where none is due.

        Raises FilterLost, also for bytes that came unasked.
        """
        if data:
            self._write(data)
        if not self.mta.expects_reply:
            if data and self.wire.write_buffered > HIGH:
                await self._taken()
            return CONTINUE
        verdict: Verdict = CONTINUE
        async for event in self._answers(self.timeouts.content if content else self.timeouts.command):
            if isinstance(event, Verdict):
                verdict = event
        if self.lost and isinstance(verdict, (Continue, Skip)):
            raise FilterLost(self.lost)  # more is to be said, and it spoke on
        return verdict

    async def end_of_message(self, data: bytes) -> AsyncIterator[Verdict | Modification | Unasked]:
        """Write the end of the message; what the filter answers, changes first, as they come.

        Raises FilterLost, also for more changes than anybody has reason to make.
        """
        self._write(data)
        # A libmilter filter writes its answer in small pieces: without this each waits 40 ms for our delayed ACK.
        if self._sock is not None and hasattr(socket, "TCP_QUICKACK"):
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        changes, size = 0, -self.wire.bytes_in
        async for event in self._answers(self.timeouts.content):
            if isinstance(event, ReplaceBody):
                size -= len(event.data)  # kept as content is, not in memory
            else:
                changes += 1
                if changes > MAX_CHANGES or size + self.wire.bytes_in > MAX_CHANGES_SIZE:
                    raise self._fail("makes too many changes to one message")
            yield event

    def abort(self) -> None:
        """Forget the message, complete or not; a filter that still owes an answer is left."""
        if self.lost:
            return
        if self.mta.expects_reply or self.mta.failure is not None:
            self.close()
            self.lost = "left in the middle of a message"
        elif self.mta.options is not None:
            self.wire.write(self.mta.abort())

    def close(self) -> None:
        """Say QUIT and close."""
        if not self.lost:
            self.wire.write(self.mta.quit())
            self.wire.close()
            self.lost = "closed"

    def _write(self, data: bytes) -> None:
        """Begin an event. What came unasked before it would be taken for its answer."""
        if self.wire.buffered or self.wire.eof:
            raise self._fail("closed the connection" if self.wire.eof else "spoke when no reply was due")
        self.wire.write(data)

    async def _answers(self, seconds: float) -> AsyncIterator[Verdict | Modification | Unasked]:
        """What the filter says until its answer is whole. Raises FilterLost."""
        wire, mta = self.wire, self.mta
        wire.set_deadline(seconds)
        try:
            while mta.expects_reply:
                data = await wire.read()
                if not data:
                    raise self._fail("closed the connection")
                for event in mta.feed(data):
                    if isinstance(event, Progress):
                        wire.set_deadline(seconds)
                    elif isinstance(event, ConnFail):
                        raise self._fail("says that it failed")
                    elif isinstance(event, (Verdict, Modification, Unasked)):
                        yield event
                if mta.failure is not None:
                    if mta.expects_reply:
                        raise mta.failure
                    self._fail(str(mta.failure))  # what came before it counts (rspamd adds fields to a verdict)
                    return
        except FilterLost:
            raise
        except WireTimeout:
            raise self._fail(f"no answer within {seconds:g}s") from None
        except MilterError as error:
            raise self._fail(str(error)) from None
        except (EndOfStream, OSError) as error:
            raise self._fail(f"connection lost: {error}") from None
        wire.set_deadline(None)

    async def _taken(self) -> None:
        """Wait until the filter has taken what was written."""
        self.wire.set_deadline(self.timeouts.content)
        try:
            await self.wire.drain()
        except WireTimeout:
            raise self._fail(f"takes nothing for {self.timeouts.content:g}s") from None
        except (EndOfStream, OSError) as error:
            raise self._fail(f"connection lost: {error}") from None
        self.wire.set_deadline(None)

    def _fail(self, text: str) -> FilterLost:
        """Give the connection up: the error that ends it."""
        self.lost = f"filter {self.address.text}: {text}"
        if hasattr(self, "wire"):
            self.wire.abort()
        return FilterLost(self.lost)


def _said(error: Exception | None) -> str:
    """What went wrong, without the number of the error."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
