"""What the processes of a service say to each other: JSON messages over a socket pair, length first.

A `Channel` never waits. `send` writes what the socket takes now and keeps the rest for `flush`; `hear` passes on the
messages that are there. A process without an event loop polls it, one that has a loop calls `attach`. What cannot be
understood, or is not read for too long, ends the connection: both sides then do what they do when the other is gone.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from gateway.observe.logs import get_logger

log = get_logger("gateway.channel")

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]
Message = dict[str, Json]

LONGEST: Final = 32 << 20
MOST_WAITING: Final = 64 << 20  # octets that the other end has not read: it is stopped, or in trouble
_LENGTH = struct.Struct("!I")
_READS_AT_ONCE: Final = 64  # then others have their turn: who writes without end must not hold us up
_AT_ONCE: Final = 200  # descriptors a message; the kernel takes 253 (SCM_MAX_FD)


class Channel:
    """One end. `closed` is set once the other end is gone."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.closed = False
        self._in = bytearray()
        self._out = bytearray()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._writing = False

    @property
    def pending(self) -> bool:
        """Something waits to be written: `flush` when the socket takes more."""
        return bool(self._out)

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: Mapping[str, Json]) -> None:
        """Send, or keep for later; to an end that is gone nothing is sent."""
        if self.closed:
            return
        data = json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        if len(data) > LONGEST:
            log.error("internal_error", error=f"a message {message['op']} of {len(data)} octets is too long to send")
            return
        self._out += _LENGTH.pack(len(data)) + data
        self.flush()
        if len(self._out) > MOST_WAITING:
            self._break(f"the other process does not read: {len(self._out)} octets wait for it")

    def flush(self) -> None:
        """Write what the socket takes."""
        try:
            while self._out:
                del self._out[: self.socket.send(self._out[: 1 << 20])]
        except BlockingIOError:
            pass
        except OSError:
            self._out.clear()  # `receive` meets the end, too
        if self._loop is not None and self._writing is not self.pending:
            self._writing = self.pending
            if self._writing:
                self._loop.add_writer(self.socket, self.flush)
            else:
                self._loop.remove_writer(self.socket)

    def receive(self) -> list[Message]:
        """The messages that have arrived. At the end of the stream `closed` is set."""
        try:
            for _ in range(_READS_AT_ONCE):
                data = self.socket.recv(1 << 20)
                if not data:
                    self.closed = True
                    break
                self._in += data
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        messages: list[Message] = []
        while len(self._in) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._in)
            if length > LONGEST:
                self._break(f"a message of {length} octets")
                break
            if len(self._in) < _LENGTH.size + length:
                break
            text = bytes(self._in[_LENGTH.size : _LENGTH.size + length])
            del self._in[: _LENGTH.size + length]
            try:
                messages.append(_message(text))
            except (ValueError, RecursionError) as error:
                self._break(f"a message that is none: {error}")
                break
        return messages

    def hear(self, heard: Callable[[Message], None]) -> None:
        """Call `heard` with each message that has arrived; its exceptions are logged, and the next one follows."""
        for message in self.receive():
            try:
                heard(message)
            except Exception as error:
                log.exception("internal_error", error=f"message {message['op']}: {type(error).__name__}: {error}")

    def attach(
        self, loop: asyncio.AbstractEventLoop, heard: Callable[[Message], None], ended: Callable[[], None]
    ) -> None:
        """Let the loop call `heard` with each message, and `ended` once when the other end is gone."""
        self._loop = loop

        def readable() -> None:
            self.hear(heard)
            if self.closed and self._loop is not None:
                self.detach()
                ended()

        loop.add_reader(self.socket, readable)

    def detach(self) -> None:
        """The loop watches it no more."""
        if self._loop is not None and self.socket.fileno() >= 0:
            self._loop.remove_reader(self.socket)
            self._loop.remove_writer(self.socket)
        self._loop = None

    def close(self) -> None:
        """Close this end."""
        self.detach()
        self.closed = True
        with contextlib.suppress(OSError):
            self.socket.close()

    def _break(self, why: str) -> None:
        """End the connection for both; who attached it here hears of the end from the loop."""
        log.error("internal_error", error=f"connection between processes ended: {why}")
        self._in.clear()
        self._out.clear()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)


def _message(text: bytes) -> Message:
    """Raises ValueError."""
    message = json.loads(text.decode("utf-8", "surrogatepass"))
    if not isinstance(message, dict) or not isinstance(message.get("op"), str):
        raise ValueError("no object with `op`")
    return message


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends for two processes."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def send_sockets(over: socket.socket, sockets: Sequence[socket.socket]) -> None:
    """Hand descriptors to the process at the other end, which knows their number (unix(7), SCM_RIGHTS).

    Never waits: thousands fit into the buffer. Raises OSError, also when they do not.
    """
    over.setblocking(False)
    descriptors = [sock.fileno() for sock in sockets]
    for start in range(0, len(descriptors), _AT_ONCE):
        socket.send_fds(over, [b"\0"], descriptors[start : start + _AT_ONCE])


def receive_sockets(over: socket.socket, count: int) -> list[socket.socket]:
    """Take `count` sockets, which no program that this process executes inherits.

    Raises ConnectionError when the other end is gone, OSError when this process may not have so many descriptors.
    """
    over.setblocking(True)
    sockets: list[socket.socket] = []
    while len(sockets) < count:
        data, ancillary, flags, _ = over.recvmsg(1, socket.CMSG_SPACE(_AT_ONCE * 4), socket.MSG_CMSG_CLOEXEC)
        for level, kind, raw in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                sockets += [socket.socket(fileno=descriptor) for descriptor in array.array("i", raw)]
        if not data:
            raise ConnectionError("the other process is gone")
        if flags & socket.MSG_CTRUNC:
            raise OSError(f"{len(sockets)} of {count} sockets came: the limit of open files (ulimit -n) is too low")
    return sockets
