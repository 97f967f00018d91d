"""One buffered connection, read by one coroutine.

A `Wire` is the protocol of one asyncio transport, TCP or unix, clear or TLS. It exists because streams cost twice as
much a line, cannot put TLS on bytes that came already, and cannot give their socket away. Invariants:

- One coroutine waits to read (`line`, `read`, `wait_readable`, `aclose`), one may wait to write (`drain`, `flush`).
- Unread bytes are bounded: reading pauses above `high` (one read of the loop, 256 KiB, may come on top); what is
  beyond the limit of an over-long line is dropped as it comes.
- There is one deadline and one timer. Moving the deadline later stores a float; the timer re-arms itself when it
  fires early. An expired deadline fails every wait until it is set anew. Bytes that have come count first: nothing
  that can be answered from the buffer ever fails with WireTimeout.
- A `Relay` put on the wire receives everything in the buffer's stead: that is how splicing and lingering work.

TCP_NODELAY is set by both event loops. SO_KEEPALIVE is set here on connections that we open; accepted ones inherit
it from their listening socket.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Iterable
from ssl import SSLContext
from typing import Protocol, cast

from gateway.observe import metrics
from gateway.relay import descriptors
from gateway.relay.tls import ClientSession, ServerContext, TlsError, TlsInfo, TlsSession

__all__ = ["Address", "EndOfStream", "LineTooLong", "Relay", "Wire", "WireTimeout", "connect"]

Address = tuple[str, int]

HIGH = 65536
LINGER_BYTES = 262144
OVERHEAD = 65536  # cipher bytes without content after which alerts and key updates of ours are flushed
PIECES = 64  # unread blocks that are kept apart before they are joined, against one-byte segments
IP_BIND_ADDRESS_NO_PORT = 24  # Linux; not in Python's socket module


class EndOfStream(ConnectionError):
    """The peer closed or reset; `partial` is what it sent of an unfinished line."""

    def __init__(self, partial: bytes = b"") -> None:
        super().__init__("the peer closed the connection")
        self.partial = partial


class LineTooLong(ValueError):
    """A line was longer than the limit; it has been skipped up to and with its end."""


class WireTimeout(TimeoutError):
    """The deadline of the wire passed."""


class Relay(Protocol):
    """What stands in for the reading coroutine; all calls come from the event loop and must not block."""

    def received(self, data: bytes) -> None:
        """Clear bytes came (never none)."""

    def ended(self) -> None:
        """The peer ended its direction: FIN or close_notify."""

    def lost(self, error: BaseException | None) -> None:
        """The connection is gone, by a reset if `error` is given; called once, the last of all."""

    def write_paused(self) -> None:
        """The write buffer is above its high water mark."""

    def write_resumed(self) -> None:
        """The write buffer is down at its low water mark."""


class Wire(asyncio.Protocol):
    """One connection. Make it through a protocol factory or `connect`; not thread-safe.

    Public attributes: `bytes_in`, `bytes_out` (octets on the network, TLS included); `bare_lf` (the last line ended
    in LF without CR); `eof` (nothing more will come, though there may be unread bytes); `error` (why the connection
    was lost, if by a reset); `tls` (what the handshake settled, None in clear); `high` (unread bytes above which
    reading pauses).
    `on_data` is called when bytes come while nobody waits; `on_gone` when the connection is lost though nothing of
    `close`, `aclose`, `abort` was called. `relay` receives everything in the buffer's stead, see `Relay`.
    """

    __slots__ = (
        "_at",
        "_closing",
        "_data",
        "_deadline",
        "_expired",
        "_limit",
        "_loop",
        "_lost",
        "_more",
        "_more_size",
        "_on_connect",
        "_paused",
        "_peername",
        "_received",
        "_sent",
        "_session",
        "_skipped",
        "_skipping",
        "_sockname",
        "_timer",
        "_tls_error",
        "_waiter",
        "_write_paused",
        "_writer",
        "_wrote_eof",
        "bare_lf",
        "bytes_in",
        "bytes_out",
        "eof",
        "error",
        "high",
        "on_data",
        "on_gone",
        "relay",
        "tls",
        "transport",
    )

    def __init__(self, loop: asyncio.AbstractEventLoop, on_connect: Callable[[Wire], None] | None = None) -> None:
        self._loop = loop
        self._on_connect = on_connect
        self.transport: asyncio.Transport
        self._peername: Address | None = None
        self._sockname: Address | None = None
        self.high = HIGH
        # Unread bytes: _data from _at on, then the blocks of _more (_more_size octets in all).
        self._data = b""
        self._at = 0
        self._more: list[bytes] | None = None
        self._more_size = 0
        self._paused = False
        # The reading coroutine's wait; _limit is that of the line it wants, 0 if any byte will do.
        self._waiter: asyncio.Future[None] | None = None
        self._limit = 0
        # An over-long line: its bytes are being dropped; its end is the first unread byte.
        self._skipping = False
        self._skipped = False
        self._writer: asyncio.Future[None] | None = None
        self._write_paused = False
        self._wrote_eof = False
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._expired = False
        self._session: TlsSession | None = None
        self._tls_error: TlsError | None = None
        self._closing = False
        self._lost = False
        self.relay: Relay | None = None
        self.on_data: Callable[[], None] | None = None
        self.on_gone: Callable[[BaseException | None], None] | None = None
        self.tls: TlsInfo | None = None
        self.bytes_in = 0
        self.bytes_out = 0
        self._received: metrics.Count | None = None
        self._sent: metrics.Count | None = None
        self.bare_lf = False
        self.eof = False
        self.error: BaseException | None = None

    # -- what the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        if self._on_connect is not None:
            on_connect, self._on_connect = self._on_connect, None
            on_connect(self)

    def data_received(self, data: bytes) -> None:
        self.bytes_in += len(data)
        if self._received is not None:
            self._received.add(len(data))
        if self._session is not None:
            self._decrypt(data)
        elif self.relay is not None:
            self.relay.received(data)
        else:
            self._buffer(data)

    def eof_received(self) -> bool:
        if self._closing:
            return False  # the loop closes the transport: lingering is over
        if not self.eof:
            self._ended()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = self.eof = True
        if self.error is None:
            self.error = exc
        self._session = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        on_gone, relay = self.on_gone, self.relay
        self.on_gone = self.on_data = self.relay = None
        self._wake()
        self._wake_writer()
        if relay is not None:
            relay.lost(self.error)
        if on_gone is not None and not self._closing:
            on_gone(self.error)

    def pause_writing(self) -> None:
        self._write_paused = True
        if self.relay is not None:
            self.relay.write_paused()

    def resume_writing(self) -> None:
        self._write_paused = False
        self._wake_writer()
        if self.relay is not None:
            self.relay.write_resumed()

    # -- reading

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that this connection lives on."""
        return self._loop

    @property
    def buffered(self) -> int:
        """Octets that came and were not read."""
        return len(self._data) - self._at + self._more_size

    async def line(self, limit: int) -> bytes:
        """The next line without its end (LF, and a CR before it; RFC 5321 section 2.3.8 is the caller's to judge).

        `limit` is in octets and counts the line end, as RFC 5321 section 4.5.3.1 does. Raises LineTooLong once the
        over-long line has ended, EndOfStream, WireTimeout.
        """
        while True:
            end = self._data.find(b"\n", self._at)
            if end < 0 and self._more is not None:
                self._gather()
                end = self._data.find(b"\n")
            if end >= 0:
                return self._cut(end, limit)
            if self.eof:
                self._skipping = False
                raise EndOfStream(self.take())
            if len(self._data) - self._at >= limit:
                self._skipping = True
                self.take()
            elif self._paused:
                self._resume()  # the limit is above `high`
            if self._expired:
                raise WireTimeout
            self._limit = limit
            waiter = self._waiter = self._loop.create_future()
            try:
                await waiter
            finally:
                self._waiter = None
                self._limit = 0

    def next_line(self, limit: int = HIGH) -> bytes | None:
        """The same without waiting: None unless a whole line is buffered. Raises LineTooLong."""
        if not self.has_line():
            return None
        return self._cut(self._data.find(b"\n", self._at), limit)

    def has_line(self) -> bool:
        """Whether a whole line is buffered."""
        if self._more is not None:
            self._gather()
        return self._data.find(b"\n", self._at) >= 0

    async def read(self, limit: int = 1 << 18) -> bytes:
        """What is buffered, at most `limit` octets, waiting for at least one.

        b"" at the end of the stream, and after a reset (`error` is set then). Raises WireTimeout.
        """
        if not self.buffered:
            await self.wait_readable()
        data = self.take()
        if len(data) > limit:
            self.unread(data[limit:])
            return data[:limit]
        return data

    async def wait_readable(self) -> None:
        """Wait until something is buffered or the stream has ended; consumes nothing. Raises WireTimeout."""
        while not self.eof and not self.buffered:
            if self._expired:
                raise WireTimeout
            waiter = self._waiter = self._loop.create_future()
            try:
                await waiter
            finally:
                self._waiter = None

    def take(self) -> bytes:
        """All unread octets, b"" if there are none."""
        if self._more is not None:
            self._gather()
        data = self._data[self._at :] if self._at else self._data
        self._data = b""
        self._at = 0
        if self._paused:
            self._resume()
        return data

    def peek(self, count: int) -> bytes:
        """The next `count` unread bytes, fewer if there are fewer; nothing is consumed."""
        if self._more is not None and len(self._data) - self._at < count:
            self._gather()
        return self._data[self._at : self._at + count]

    def unread(self, data: bytes) -> None:
        """Put `data` back in front of the unread octets."""
        self._data = data + self._data[self._at :]
        self._at = 0

    def pause(self) -> None:
        """Stop reading from the network until `resume`; for relays (the buffer pauses by itself)."""
        if not self._paused and not self.eof:
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        """Undo `pause`."""
        if self._paused:
            self._resume()

    # -- metrics

    def count(self, received: metrics.Count, sent: metrics.Count) -> None:
        """Count octets there too, those that passed already and those to come."""
        received.add(self.bytes_in)
        sent.add(self.bytes_out)
        self._received, self._sent = received, sent

    def count_received(self, octets: int) -> None:
        """Octets came past the wire (the kernel moved them)."""
        self.bytes_in += octets
        if self._received is not None:
            self._received.add(octets)

    def count_sent(self, octets: int) -> None:
        """Octets are sent, or were past the wire."""
        self.bytes_out += octets
        if self._sent is not None:
            self._sent.add(octets)

    # -- deadline

    def set_deadline(self, seconds: float | None) -> None:
        """From now on, waits end with WireTimeout once `seconds` have passed; None: they never do."""
        self._expired = False
        if seconds is None or self._closing or self._lost:
            self._deadline = None
            return
        self._deadline = deadline = self._loop.time() + seconds
        if self._timer is not None:
            if self._timer.when() <= deadline:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(deadline, self._tick)

    def drop_deadline(self) -> None:
        """No wait ends by time, and none will for long: not even the timer stays."""
        self.set_deadline(None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- writing

    def write(self, data: bytes) -> None:
        """Send `data` in order, sometime; ignored once the connection is lost or our direction ended."""
        if self._lost or self._wrote_eof or not data:
            return
        if self._session is not None:
            data = self._seal(data)
        self.count_sent(len(data))
        self.transport.write(data)

    def writelines(self, parts: Iterable[bytes]) -> None:
        """Send all parts in one write."""
        self.write(b"".join(parts))

    def write_eof(self) -> None:
        """End our direction after what was written: close_notify where there is TLS, then FIN."""
        if self._lost or self._wrote_eof or self.transport.is_closing():
            return
        if self._session is not None:
            self._send(self._session.close_notify())
        self._wrote_eof = True
        try:
            self.transport.write_eof()
        except OSError as error:  # asyncio shuts down at once: the peer has reset and we had not read it yet
            self.error = error
            self.transport.abort()

    @property
    def write_buffered(self) -> int:
        """Octets written that the kernel has not taken yet."""
        return 0 if self._lost else self.transport.get_write_buffer_size()

    @property
    def write_paused(self) -> bool:
        """Whether `drain` would wait."""
        return self._write_paused

    async def drain(self) -> None:
        """Wait until the write buffer is below its low water mark. Raises EndOfStream, WireTimeout."""
        while self._write_paused and not self._lost:
            if self._expired:
                raise WireTimeout
            self._writer = self._loop.create_future()
            try:
                await self._writer
            finally:
                self._writer = None
        if self._lost:
            raise EndOfStream

    async def flush(self) -> None:
        """Wait until the kernel has taken everything written. Raises EndOfStream, WireTimeout."""
        if self.write_buffered:
            self.notice_flushed(True)
            try:
                await self.drain()
            finally:
                self.notice_flushed(False)
        elif self._lost:
            raise EndOfStream

    def notice_flushed(self, exact: bool) -> None:
        """Let pause_writing and resume_writing tell of any unsent byte (exact), or of the usual water marks."""
        if not self._lost:
            if exact:
                self.transport.set_write_buffer_limits(0)
            else:
                self.transport.set_write_buffer_limits()

    # -- TLS

    async def start_tls_server(self, context: ServerContext) -> None:
        """Shake hands as server; unread bytes are taken as the client's hello (implicit TLS behind a PROXY header).

        After STARTTLS the caller must have made sure that `buffered` is 0, or what an attacker put behind the
        command would be trusted. Raises TlsError (the alert is sent), EndOfStream, WireTimeout.
        """
        await self._shake_hands(context.session(), "client")

    async def start_tls_client(self, context: SSLContext, server_name: str | None) -> None:
        """Shake hands as client; `server_name` is sent as SNI and verified if the context verifies.

        The same errors, and the same rule about bytes that came before.
        """
        await self._shake_hands(ClientSession(context, server_name), "upstream")

    # -- the end

    async def aclose(self, linger: float = 2.0) -> None:
        """Close so that what was written arrives, and return when the descriptor is closed.

        A close with unread input makes the kernel send a reset, which can destroy a reply that is still on its way.
        So: end our direction, drop what comes until the peer closes too, give up after `linger` seconds or 256 KiB.
        Large replies to slow peers want `flush` first. Never raises but for cancellation.
        """
        if self.eof:
            self.close(linger)
        elif not self._closing:
            self.write_eof()
            self._start_closing(linger)
            self._session = None  # what still comes is not worth decrypting
            self.take()
            self.relay = _Discard(self.transport)
        try:
            while not self._lost:
                self._waiter = self._loop.create_future()
                await self._waiter
        except asyncio.CancelledError:
            self.abort()
            raise

    def close(self, linger: float = 2.0) -> None:
        """Close without waiting for the peer; what was written is still sent if it goes within `linger` seconds."""
        if self._closing or self._lost:
            return
        if self._session is not None and not self._wrote_eof:
            self._send(self._session.close_notify())
        self._wrote_eof = True
        self._start_closing(linger)
        self.transport.close()

    def abort(self) -> None:
        """Close at once; unsent octets are lost."""
        self._closing = True
        if not self._lost:
            self.transport.abort()

    @property
    def closed(self) -> bool:
        """Whether the connection is gone."""
        return self._lost

    @property
    def peername(self) -> Address:
        """The peer's address, asked for when first wanted."""
        if self._peername is None:
            self._peername = ("", 0) if self._lost else _address(self.transport.get_extra_info("peername"))
        return self._peername

    @property
    def sockname(self) -> Address:
        """Our own address on this connection."""
        if self._sockname is None:
            self._sockname = ("", 0) if self._lost else _address(self.transport.get_extra_info("sockname"))
        return self._sockname

    # -- inside

    def _buffer(self, data: bytes) -> None:
        """Append to the unread bytes and wake the reader if it can go on."""
        if self._skipping:
            end = data.find(b"\n")
            if end < 0:
                return
            data = data[end:]
            self._skipping = False
            self._skipped = True
        if self._more is not None:
            self._more.append(data)
            self._more_size += len(data)
            if len(self._more) > PIECES:
                self._gather()
        elif self._at < len(self._data):
            self._more = [data]
            self._more_size = len(data)
        else:
            self._data = data
            self._at = 0
        limit = self._limit
        if limit and b"\n" not in data and self.buffered < limit:
            return  # the reader wants a whole line
        if self._waiter is not None:
            self._wake()
        elif self.on_data is not None:
            self.on_data()
        if self.buffered > self.high:
            self.pause()

    def _gather(self) -> None:
        """Make one block of all unread bytes."""
        assert self._more is not None
        self._data = b"".join([self._data[self._at :], *self._more])
        self._at = 0
        self._more = None
        self._more_size = 0

    def _cut(self, end: int, limit: int) -> bytes:
        """Consume up to the LF at `end` and return the line in front of it."""
        data = self._data
        start = self._at
        if end + 1 == len(data):
            self._data = b""
            self._at = 0
        else:
            self._at = end + 1
        if self._paused and self.buffered <= self.high >> 1:
            self._resume()
        if self._skipped or end - start >= limit:
            self._skipped = False
            raise LineTooLong
        if end > start and data[end - 1] == 13:
            self.bare_lf = False
            return data[start : end - 1]
        self.bare_lf = True
        return data[start:end]

    def _resume(self) -> None:
        self._paused = False
        if not self.eof and not self.transport.is_closing():
            self.transport.resume_reading()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _wake_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None and not writer.done():
            writer.set_result(None)

    def _ended(self) -> None:
        self.eof = True
        self._wake()
        if self.relay is not None:
            self.relay.ended()

    def _tick(self) -> None:
        """The timer fired: expire, or wait for the rest of a deadline that has moved."""
        self._timer = None
        deadline = self._deadline
        if deadline is None:
            return
        if self._loop.time() + 0.001 < deadline:  # uvloop's clock counts milliseconds
            self._timer = self._loop.call_at(deadline, self._tick)
            return
        self._expired = True
        for waiting in (self._waiter, self._writer):
            if waiting is not None and not waiting.done():
                waiting.set_exception(WireTimeout())

    def _start_closing(self, linger: float) -> None:
        self._closing = True
        self._abort_after(linger)

    def _abort_after(self, linger: float) -> None:
        """From here on only this clock counts; it replaces the deadline's."""
        self._deadline = None
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(linger, self.transport.abort)

    def _send(self, data: bytes) -> None:
        """Write past TLS."""
        if data and not self._lost:
            self.count_sent(len(data))
            self.transport.write(data)

    async def _shake_hands(self, session: TlsSession, side: str) -> None:
        """The handshake with a client or an upstream, counted."""
        try:
            await self._handshake(session)
        finally:
            info = self.tls
            if info is None:
                metrics.counter("gateway_tls_failures_total", side=side).add()
            else:
                resumed = "yes" if info.resumed else "no"
                metrics.counter(
                    "gateway_tls_handshakes_total", side=side, version=info.version, resumed=resumed
                ).add()

    async def _handshake(self, session: TlsSession) -> None:
        self._session = session
        self._send(session.start())
        waiting = self.take()
        if waiting:
            self._decrypt(waiting)
        while session.info is None:
            if self._tls_error is not None:
                raise self._tls_error
            if self.eof:
                raise EndOfStream
            if self._expired:
                raise WireTimeout
            waiter = self._waiter = self._loop.create_future()
            try:
                await waiter
            finally:
                self._waiter = None
        self.tls = session.info

    def _decrypt(self, cipher: bytes) -> None:
        session = self._session
        assert session is not None
        shaking = session.info is None
        try:
            clear = session.feed(cipher)
        except TlsError as error:
            self._tls_failed(session, error)
            return
        if shaking or session.overhead > OVERHEAD:
            session.overhead = 0
            self._send(session.outgoing())
            if shaking and session.info is not None:
                self._wake()
        if clear:
            if self.relay is not None:
                self.relay.received(clear)
            else:
                self._buffer(clear)
        if session.closed and not self.eof:
            self._ended()

    def _seal(self, clear: bytes) -> bytes:
        assert self._session is not None
        try:
            return self._session.seal(clear)
        except TlsError as error:
            self._tls_failed(self._session, error)
            return b""

    def _tls_failed(self, session: TlsSession, error: TlsError) -> None:
        """Send the alert and close: after a broken record nothing that comes can be trusted."""
        self.error = self._tls_error = error
        self._send(session.outgoing())
        self._session = None
        self._wrote_eof = self.eof = True
        self._abort_after(2.0)
        self._wake()  # before `on_gone` is called: whoever waits hears of this error
        self.transport.close()


class _Discard:
    """The relay of a wire that lingers: drops what comes, up to a bound."""

    __slots__ = ("_left", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._left = LINGER_BYTES

    def received(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            self._transport.abort()

    def ended(self) -> None:
        """Not called: a closing wire leaves the end to its transport."""

    def lost(self, error: BaseException | None) -> None:
        """Nothing to do: the closing coroutine is woken by the wire."""

    def write_paused(self) -> None:
        """Nothing to do: nothing is written any more."""

    def write_resumed(self) -> None:
        """Nothing to do: nothing is written any more."""


def _address(name: object) -> Address:
    """What the transport knows of an end, as (host, port): IPv4-mapped addresses as IPv4, no scope, ("unix:", 0)."""
    if isinstance(name, tuple):
        host, port = name[:2]
        if ":" in host:
            host = host.partition("%")[0]
            if host.startswith("::ffff:") and "." in host:
                host = host[7:]
        return (host, port)
    return ("unix:", 0) if isinstance(name, (str, bytes)) else ("", 0)  # None: gone before it could be asked


async def connect(address: Address | str, *, timeout: float, source: str | None = None) -> Wire:
    """Open a connection to (numeric host, port) or to the unix socket at a path.

    `timeout` in seconds; `source` is the numeric local address to connect from. Raises OSError (EMFILE before the
    last descriptor is taken, see `gateway.relay.descriptors`), TimeoutError.
    """
    wire = await _open(address, timeout, source)
    if not wire.closed and descriptors.too_high(wire.transport.get_extra_info("socket").fileno()):
        wire.abort()
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return wire


async def _open(address: Address | str, timeout: float, source: str | None) -> Wire:
    loop = asyncio.get_running_loop()
    if isinstance(address, str):
        return await _connect_unix(loop, address)
    try:
        async with asyncio.timeout(timeout):
            if source is not None:
                return await _connect_from(loop, source, address)
            # The loop's own way costs least; it looks nothing up, since the host is numeric.
            _, wire = await loop.create_connection(lambda: Wire(loop, _keep_alive), *address)
            return wire
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno)) from None  # one text on every loop


def _keep_alive(wire: Wire) -> None:
    wire.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


async def _connect_from(loop: asyncio.AbstractEventLoop, source: str, address: Address) -> Wire:
    """Connect from a local address, its port left to connect(): ports are then shared between destinations."""
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets NODELAY only on named TCP
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
        sock.bind((source, 0))
        await _connected(loop, sock, address)
        _, wire = await loop.create_connection(lambda: Wire(loop, _keep_alive), sock=sock)
    except BaseException:
        sock.close()
        raise
    return wire


async def _connect_unix(loop: asyncio.AbstractEventLoop, path: str) -> Wire:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.connect(path)  # at once, or EAGAIN where the listen queue is full
        _, wire = await loop.create_unix_connection(lambda: Wire(loop), sock=sock)
    except BaseException:
        sock.close()
        raise
    return wire


async def _connected(loop: asyncio.AbstractEventLoop, sock: socket.socket, address: Address) -> None:
    """Connect a non-blocking socket. uvloop's own `sock_connect` asks a thread for the address it already has."""
    try:
        sock.connect(address)
        return
    except BlockingIOError:
        pass
    connected: asyncio.Future[None] = loop.create_future()
    descriptor = sock.fileno()
    loop.add_writer(descriptor, _connect_ended, connected, sock)
    try:
        await connected
    finally:
        loop.remove_writer(descriptor)


def _connect_ended(connected: asyncio.Future[None], sock: socket.socket) -> None:
    if not connected.done():
        error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            connected.set_exception(OSError(error, os.strerror(error)))
        else:
            connected.set_result(None)
