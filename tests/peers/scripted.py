"""A TCP peer that follows a script and fails at the step a test chooses, in the test's own loop.

    hi = [Send(b"220 peer\\r\\n"), Expect(rb"EHLO "), Send(b"250 ok\\r\\n"), Expect(rb"MAIL ")]
    async with Scripted([*hi, Reset()], [*hi, Send(b"250 ok\\r\\n")]) as peer:   # first connection, then all later ones
        ...                                                                    # peer.port, peer.seen
        await peer.reached(connection=1, step=4)

After its last step a connection stays open until the other side closes. What a client sees: `Hang` silence, `Reset` a
connection reset, `Close` an end, `Half` an end while its own bytes are still read, `NoRead` nothing until its own
buffers are full.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

LIMIT = 1 << 26
_LINGER_0 = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True)
class Send:
    """Send these bytes."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Drip:
    """Send these bytes one by one; `gap` in seconds."""

    data: bytes
    gap: float = 0.0


@dataclass(frozen=True, slots=True)
class Garbage:
    """Send that many random bytes."""

    size: int


@dataclass(frozen=True, slots=True)
class Expect:
    """Read a line; it must match from its start, whatever the case, or `failures` tells of it."""

    pattern: bytes


@dataclass(frozen=True, slots=True)
class Until:
    """Read up to and including these bytes."""

    end: bytes


@dataclass(frozen=True, slots=True)
class Wait:
    """Go on when the event is set."""

    event: asyncio.Event


@dataclass(frozen=True, slots=True)
class Hang:
    """Keep the connection, read and say nothing more."""


@dataclass(frozen=True, slots=True)
class NoRead:
    """Keep the connection and let the peer's bytes pile up."""


@dataclass(frozen=True, slots=True)
class Half:
    """Send FIN and go on reading."""


@dataclass(frozen=True, slots=True)
class Close:
    """Close."""


@dataclass(frozen=True, slots=True)
class Reset:
    """Send RST."""


Step = Send | Drip | Garbage | Expect | Until | Wait | Hang | NoRead | Half | Close | Reset


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with RST."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
    writer.transport.abort()


class Scripted:
    """The peer. Each connection runs its script, those beyond the last script run the last one again.

    `seen`: (connection, bytes) of what was read, b"" for the other side's end. `failures`: what an `Expect` did not
    like; leaving the context raises AssertionError with them.
    """

    def __init__(self, *scripts: Sequence[Step]) -> None:
        self._scripts = scripts or ((),)
        self.connections = 0
        self.seen: list[tuple[int, bytes]] = []
        self.failures: list[str] = []
        self._steps: set[tuple[int, int]] = set()
        self._progress = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Scripted:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=LIMIT)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if kind is None:
            assert not self.failures, self.failures

    async def reached(self, step: int, connection: int = 1) -> None:
        """Wait until a connection (the first is 1) begins a step (the first is 0; the number of steps is the end)."""
        while (connection, step) not in self._steps:
            self._progress.clear()
            await self._progress.wait()

    async def gone(self, connection: int = 1) -> None:
        """Wait until the other side closed or reset a connection."""
        while (connection, b"") not in self.seen:
            self._progress.clear()
            await self._progress.wait()

    def _saw(self, connection: int, data: bytes) -> None:
        self.seen.append((connection, data))
        self._progress.set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        number = self.connections = self.connections + 1
        script = self._scripts[min(number, len(self._scripts)) - 1]
        try:
            for place, step in enumerate(script):
                self._steps.add((number, place))
                self._progress.set()
                if not await self._run(step, number, reader, writer):
                    return
            self._steps.add((number, len(script)))
            self._progress.set()
            while data := await reader.read(65536):
                self._saw(number, data)
            self._saw(number, b"")
        except (ConnectionError, asyncio.IncompleteReadError):
            self._saw(number, b"")
        except asyncio.CancelledError:
            pass  # the streams of 3.11 log a cancelled handler as an error
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _run(
        self, step: Step, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Run one step; False ends the connection."""
        match step:
            case Send(data):
                writer.write(data)
                await writer.drain()
            case Drip(data, gap):
                for i in range(len(data)):
                    if writer.is_closing():  # uvloop's transports raise where asyncio's warn
                        return False
                    writer.write(data[i : i + 1])
                    await writer.drain()
                    await asyncio.sleep(gap)
            case Garbage(size):
                writer.write(os.urandom(size))
                await writer.drain()
            case Expect(pattern):
                line = await reader.readline()
                self._saw(number, line)
                if line and not re.match(pattern, line, re.IGNORECASE):
                    self.failures.append(f"connection {number}: {line!r} is not {pattern!r}")
                    return False
                return bool(line)
            case Until(end):
                self._saw(number, await reader.readuntil(end))
            case Wait(event):
                await event.wait()
            case Hang():
                await asyncio.Event().wait()
            case NoRead():
                writer.transport.pause_reading()  # type: ignore[attr-defined]  # a transport of both directions
                await asyncio.Event().wait()
            case Half():
                writer.write_eof()
            case Reset():
                reset(writer)
                return False
            case Close():
                return False
        return True
