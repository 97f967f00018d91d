"""An upstream that takes everything, and waits at one step until the test lets it go on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from types import TracebackType

EHLO = ["PIPELINING", "SIZE 100000000", "8BITMIME"]
REPLIES = {
    b"MAIL": b"250 2.1.0 Ok",
    b"RCPT": b"250 2.1.5 Ok",
    b"DATA": b"354 go",
    b"QUIT": b"221 Bye",
    b"RSET": b"250 Ok",
    b"XCLI": b"220 upstream.test",
}


class Upstream:
    """`wait` names the step: a verb, `content` (nothing of it is read) or `end` (of data).

    `reached` is set when the step is reached, `release` sets it free. `messages` are those whose end arrived
    (empty ones unless `keep`), `commands` all lines that were commands.
    """

    def __init__(self, wait: str = "", *, keep: bool = True, ehlo: Sequence[str] = EHLO) -> None:
        self.wait, self.keep, self.ehlo = wait, keep, list(ehlo)
        self.arm()
        self.messages: list[bytes] = []
        self.commands: list[bytes] = []
        self.connections = 0
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Upstream:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port, limit=1 << 16)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Die; `async with` again is the return, at the same port."""
        await self.__aexit__(None, None, None)

    def pool(self, **more: object) -> dict[str, object]:
        """The `upstreams` of a pipeline that has this one alone."""
        servers = [f"smtp://127.0.0.1:{self.port}"]
        return {"mta": {"servers": servers, "capabilities": {"assume": self.ehlo}, **more}}

    def arm(self) -> None:
        """Wait at the step from now on."""
        self.reached, self.released = asyncio.Event(), asyncio.Event()

    def release(self) -> None:
        """Let every connection go on."""
        self.released.set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await self._talk(reader, writer)
        writer.close()
        self._tasks.discard(task)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 upstream.test\r\n")
        while line := await reader.readline():
            self.commands.append(line.rstrip())
            verb = line[:4].upper()
            await self._step(verb.decode("ascii", "replace"))
            if verb == b"EHLO":
                writer.write(b"".join(b"250-" + word.encode() + b"\r\n" for word in self.ehlo) + b"250 HELP\r\n")
                continue
            writer.write(REPLIES.get(verb, b"250 2.0.0 Ok") + b"\r\n")
            if verb == b"QUIT":
                return
            if verb == b"DATA":
                await self._step("content")
                self.messages.append(await self._content(reader))
                await self._step("end")
                writer.write(b"250 2.0.0 queued\r\n")

    async def _content(self, reader: asyncio.StreamReader) -> bytes:
        content = []
        while (line := await reader.readuntil(b"\n")) != b".\r\n":
            if self.keep:
                content.append(line)
        return b"".join(content)

    async def _step(self, name: str) -> None:
        if name == self.wait:
            self.reached.set()
            await self.released.wait()
