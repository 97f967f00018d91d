"""Load with numbered messages: who sends it, who counts it, and who looks whether the service still accepts.

Every message has a recipient of its own, by which it is known at both ends.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

from tests.peers.require import require

EHLO = b"250-sink.test\r\n250-PIPELINING\r\n250-8BITMIME\r\n250 SIZE 100000000\r\n"
Fate = Literal["acknowledged", "refused", "dropped"]


class CountingSink:
    """A server that takes everything and throws it away; `taken` counts the messages of each recipient.

    A message is counted before it is acknowledged. It listens on a unix socket in the folder, or on `sock`.
    """

    def __init__(self, folder: Path, sock: socket.socket | None = None) -> None:
        self._path = str(folder / "sink.sock")
        self._sock = sock
        self.taken: Counter[bytes] = Counter()

    async def __aenter__(self) -> CountingSink:
        loop = asyncio.get_running_loop()
        if self._sock is not None:
            self._server = await loop.create_server(lambda: _Taker(self.taken), sock=self._sock)
        else:
            self._server = await loop.create_unix_server(lambda: _Taker(self.taken), self._path, backlog=1024)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()

    def pool(self, **more: object) -> dict[str, object]:
        """The `upstreams` of a pipeline that has this one alone."""
        url = f"smtp+unix:{self._path}"
        if self._sock is not None:
            host, port = self._sock.getsockname()
            url = f"smtp://{host}:{port}"
        return {"sink": {"servers": [url], "max_connections": 1000, **more}}

    def twice(self) -> list[bytes]:
        """Recipients of messages that came more than once."""
        return [recipient for recipient, count in self.taken.items() if count > 1]


class _Taker(asyncio.Protocol):
    """One connection to the sink."""

    def __init__(self, taken: Counter[bytes]) -> None:
        self._taken = taken
        self._unread = b""
        self._recipient = b""
        self._content = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._transport.write(b"220 sink.test ESMTP\r\n")

    def data_received(self, data: bytes) -> None:
        *lines, self._unread = (self._unread + data).split(b"\r\n")
        replies = [reply for line in lines if (reply := self._reply(line))]
        self._transport.write(b"".join(replies))
        if lines and lines[-1] == b"QUIT" and not self._content:
            self._transport.close()

    def _reply(self, line: bytes) -> bytes:
        if self._content:
            if line != b".":
                return b""
            self._content = False
            self._taken[self._recipient] += 1
            return b"250 2.0.0 taken\r\n"
        verb = line[:4].upper()
        if verb == b"RCPT":
            self._recipient = line[line.index(b"<") + 1 : line.index(b">")]
        elif verb == b"DATA":
            self._content = True
            return b"354 go\r\n"
        elif verb == b"EHLO":
            return EHLO
        return b"221 2.0.0 bye\r\n" if verb == b"QUIT" else b"250 2.0.0 ok\r\n"


async def smtp_source(port: int, name: str, messages: int, sessions: int, *options: str) -> tuple[int, str]:
    """`smtp-source` with messages to `<0NAME@local.test>`, `<1NAME@local.test>`, ...; its exit status and words."""
    process = await asyncio.create_subprocess_exec(
        require("smtp-source"), "-N", "-f", "a@x.test", "-t", f"{name}@local.test", "-M", "client.test",
        "-m", str(messages), "-s", str(sessions), *options, f"127.0.0.1:{port}",
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        _, said = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode is not None
    return process.returncode, said.decode("utf-8", "replace")


@dataclass
class Senders:
    """Clients that send message after message, a few a connection, each once, and note what became of it.

    They end after `messages` of them, or when told to. `fates` has every message that was begun, by its recipient;
    `replies` the refusals.
    """

    port: int
    messages: int = sys.maxsize
    each: int = 5
    fates: dict[bytes, Fate] = field(default_factory=dict)
    replies: Counter[str] = field(default_factory=Counter)
    _next: int = 0

    async def send(self, clients: int) -> None:
        """All of them, by so many clients at a time."""
        await asyncio.gather(*(self._client() for _ in range(clients)))

    def stop(self) -> None:
        """After the messages that are under way."""
        self.messages = 0

    def of(self, fate: Fate) -> set[bytes]:
        """The recipients of all messages with this fate."""
        return {recipient for recipient, theirs in self.fates.items() if theirs == fate}

    async def _client(self) -> None:
        while self._next < self.messages:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                if await self._say(reader, writer, b"", b"220") and await self._say(reader, writer, b"HELO x", b"250"):
                    await self._connected(reader, writer)
            except ConnectionError:
                pass
            finally:
                writer.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(self.each):
            if self._next >= self.messages:
                break
            recipient = b"%d@local.test" % self._next
            self._next += 1
            self.fates[recipient] = "dropped"
            for line, code in (
                (b"MAIL FROM:<a@x.test>", b"250"),
                (b"RCPT TO:<%b>" % recipient, b"250"),
                (b"DATA", b"354"),
                (b"Subject: x\r\n\r\ntext\r\n.", b"250"),
            ):
                if not await self._say(reader, writer, line, code):
                    self.fates[recipient] = "refused"
                    return
            self.fates[recipient] = "acknowledged"
        await self._say(reader, writer, b"QUIT", b"221")

    async def _say(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, line: bytes, code: bytes) -> bool:
        """Whether the reply is that one. Raises ConnectionError where none comes."""
        if line:
            writer.write(line + b"\r\n")
        reply = await reader.readline()
        if not reply.endswith(b"\n"):
            raise ConnectionError("no reply")
        if not reply.startswith(code):
            self.replies[reply.decode("utf-8", "replace").partition(" (")[0]] += 1
        return reply.startswith(code)


class Prober:
    """Asks all the time whether the service greets; `longest` is the longest time without a greeting, in seconds.

    It has a thread of its own, since the load keeps the event loop busy.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._probe)
        self.longest = 0.0
        self.greetings = 0
        self.failures: Counter[str] = Counter()

    def __enter__(self) -> Prober:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _probe(self) -> None:
        last = time.monotonic()
        while not self._end.is_set():
            if self._greeted():
                self.greetings += 1
                now = time.monotonic()
                self.longest, last = max(self.longest, now - last), now
                self._end.wait(0.005)
        self.longest = max(self.longest, time.monotonic() - last)

    def _greeted(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self._port), 10) as sock:
                if sock.recv(3) != b"220":
                    self.failures["no 220"] += 1
                    return False
                sock.sendall(b"QUIT\r\n")
                return True
        except OSError as error:
            self.failures[type(error).__name__] += 1
            return False
