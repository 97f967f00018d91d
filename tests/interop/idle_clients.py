"""Many IMAP clients that wait in IDLE, in the test's own loop, and the message that wakes them all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

from tests.peers.dovecot_store import User

LIMIT = 30.0


class IdleClient:
    """One connection: `await client.idle()`, later `await client.woken()`."""

    def __init__(self, port: int, user: User) -> None:
        self._port, self._user = port, user

    async def __aenter__(self) -> IdleClient:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._writer.transport.abort()

    async def idle(self) -> None:
        """Log in, and be in IDLE (RFC 2177) on the inbox. Raises AssertionError if the server will not."""
        await self.line()
        password = self._user.password.replace("\\", "\\\\").replace('"', '\\"')
        await self.command("a", f'LOGIN "{self._user.name}" "{password}"')
        await self.command("b", "SELECT INBOX")
        self.send("c IDLE\r\n")
        while not (await self.line()).startswith("+"):
            pass

    async def woken(self) -> None:
        """Wait until the server tells of a message, and leave IDLE."""
        while " EXISTS" not in await self.line():
            pass
        self.send("DONE\r\n")
        await self._end("c")

    async def command(self, tag: str, command: str) -> None:
        """Say a command and wait for its OK."""
        self.send(f"{tag} {command}\r\n")
        await self._end(tag)

    async def _end(self, tag: str) -> None:
        while not (line := await self.line()).startswith(f"{tag} "):
            pass
        assert line.startswith(f"{tag} OK"), line

    async def line(self) -> str:
        """A line of the server. Raises AssertionError if it closed."""
        line = await self._reader.readline()
        assert line, "closed"
        return line.decode("utf-8", "replace")

    def send(self, text: str) -> None:
        """Say this."""
        self._writer.write(text.encode())


async def all_wake(port: int, user: User, count: int, wake: Callable[[], None]) -> None:
    """So many clients are in IDLE at once; `wake` brings a message, and each of them hears of it."""
    async with AsyncExitStack() as stack, asyncio.timeout(LIMIT):
        clients = [await stack.enter_async_context(IdleClient(port, user)) for _ in range(count)]
        await asyncio.gather(*(client.idle() for client in clients))
        wake()
        await asyncio.gather(*(client.woken() for client in clients))
