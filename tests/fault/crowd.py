"""Very many SMTP clients in a process of their own, which has descriptors of its own: `Crowd` starts and asks it.

The process reads orders from standard input, a line each, and answers each with a line of numbers:
`come N` opens N more connections and reads their greetings, `ask` has a reply to NOOP from all that were greeted,
`mail N` sends a message by each of the first N, `leave N` says QUIT for the N last.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from collections import Counter
from pathlib import Path
from types import TracebackType

A_SOURCE = 5000  # connections from one address: ports end at about 28,000
AT_ONCE = 100

Peer = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Crowd:
    """The process from outside; each order gives its numbers: `greeted`, `421`, `250`, `221`, `lost` and so on."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> Crowd:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, str(Path(__file__)), str(self._port),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        await self._process.wait()

    async def order(self, *words: object) -> Counter[str]:
        """Say it, and wait for the answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(" ".join(map(str, words)).encode() + b"\n")
        return Counter(json.loads(await self._process.stdout.readline()))


class Clients:
    """The process from inside."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._peers: list[Peer] = []
        self._opened = 0

    async def come(self, count: int) -> Counter[str]:
        """Open so many more."""
        room = asyncio.Semaphore(AT_ONCE)

        async def one() -> str:
            async with room:
                return await self._greeted()

        return Counter(await asyncio.gather(*(one() for _ in range(count))))

    async def _greeted(self) -> str:
        source = f"127.0.0.{2 + self._opened // A_SOURCE}"
        self._opened += 1
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port, local_addr=(source, 0), limit=1024)
            greeting = await reader.readline()
        except OSError as error:
            return type(error).__name__
        if greeting.startswith(b"220"):
            self._peers.append((reader, writer))
            return "greeted"
        rest = await reader.read()
        writer.close()
        return greeting[:3].decode() if greeting and not rest else "lost"

    async def say(self, peers: list[Peer], line: bytes) -> Counter[str]:
        """The codes of the replies to this line."""
        return Counter(await self._replies(peers, line))

    async def _replies(self, peers: list[Peer], line: bytes) -> list[str]:
        for _, writer in peers:
            writer.write(line + b"\r\n")
        return [await _reply(reader) for reader, _ in peers]

    async def mail(self, count: int) -> Counter[str]:
        """A message by each of the first ones, all at once: the replies to their ends, or what ended them before."""
        peers, ended = self._peers[:count], Counter[str]()
        for line in (b"HELO crowd.test", b"MAIL FROM:<a@x.test>", b"RCPT TO:<b@local.test>", b"DATA"):
            codes = await self._replies(peers, line)
            ended.update(code for code in codes if code[0] not in "23")
            peers = [peer for peer, code in zip(peers, codes, strict=True) if code[0] in "23"]
        return ended + await self.say(peers, b"Subject: x\r\n\r\ntext\r\n.")

    async def leave(self, count: int) -> Counter[str]:
        """The last ones say QUIT."""
        leaving, self._peers = self._peers[-count:], self._peers[:-count]
        said = await self.say(leaving, b"QUIT")
        for reader, writer in leaving:
            await reader.read()  # the gateway's end of the connection, which is its last
            writer.close()
        return said

    async def obey(self, words: list[str]) -> Counter[str]:
        """One order."""
        match words:
            case ["come", count]:
                return await self.come(int(count))
            case ["ask"]:
                return await self.say(self._peers, b"NOOP")
            case ["mail", count]:
                return await self.mail(int(count))
            case ["leave", count]:
                return await self.leave(int(count))
        raise ValueError(words)


async def _reply(reader: asyncio.StreamReader) -> str:
    try:
        return (await reader.readline())[:3].decode() or "lost"
    except OSError:
        return "lost"


async def _main(port: int) -> None:
    clients, loop = Clients(port), asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        print(json.dumps(await clients.obey(line.split())), flush=True)


if __name__ == "__main__":
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(_main(int(sys.argv[1])))
