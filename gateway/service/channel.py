"""What the processes of a service say to each other: JSON messages over a socket pair, length first.

A `Channel` never waits. `send` writes what the socket takes now and keeps the rest for `flush`; `receive` gives the
messages that are there. A process without an event loop polls it, one that has a loop calls `attach`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Final

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]
Message = dict[str, Json]

LONGEST: Final = 64 << 20
_LENGTH = struct.Struct("!I")
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
        self._out += _LENGTH.pack(len(data)) + data
        self.flush()

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
            while True:
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
                self.closed = True
                break
            if len(self._in) < _LENGTH.size + length:
                break
            text = bytes(self._in[_LENGTH.size : _LENGTH.size + length])
            del self._in[: _LENGTH.size + length]
            messages.append(json.loads(text.decode("utf-8", "surrogatepass")))
        return messages

    def attach(
        self, loop: asyncio.AbstractEventLoop, heard: Callable[[Message], None], ended: Callable[[], None]
    ) -> None:
        """Let the loop call `heard` with each message, and `ended` once when the other end is gone."""
        self._loop = loop

        def readable() -> None:
            for message in self.receive():
                heard(message)
            if self.closed:
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


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends for two processes."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def send_sockets(over: socket.socket, sockets: Sequence[socket.socket]) -> None:
    """Hand descriptors to the process at the other end, which knows their number (unix(7), SCM_RIGHTS)."""
    over.setblocking(True)
    descriptors = [sock.fileno() for sock in sockets]
    for start in range(0, len(descriptors), _AT_ONCE):
        socket.send_fds(over, [b"\0"], descriptors[start : start + _AT_ONCE])


def receive_sockets(over: socket.socket, count: int) -> list[socket.socket]:
    """Take `count` sockets. Raises ConnectionError when the other end is gone."""
    over.setblocking(True)
    descriptors: list[int] = []
    while len(descriptors) < count:
        data, found, _, _ = socket.recv_fds(over, 1, _AT_ONCE)
        if not data:
            raise ConnectionError("the other process is gone")
        descriptors += found
    return [socket.socket(fileno=descriptor) for descriptor in descriptors]
