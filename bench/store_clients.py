"""Mail clients of a bench run: short sessions, large fetches, logins that are timed, sessions that idle.

`python -m bench.store_clients sessions imap|pop3 PORT COUNT` and `fetch plain|tls PORT COUNT` run in a process of
their own: its CPU is nobody's.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import sys
import time
from typing import cast

import uvloop

from bench.clients import context
from bench.store_server import MESSAGE

CLIENTS = 10
LOGIN = b"a LOGIN anna@example.org secret-word\r\n"
SESSIONS = {
    "imap": ((b"", b"* OK"), (LOGIN, b"a OK"), (b"b NOOP\r\n", b"b OK"), (b"c LOGOUT\r\n", b"c OK")),
    "pop3": (
        (b"", b"+OK"), (b"USER anna@example.org\r\n", b"+OK"), (b"PASS secret-word\r\n", b"+OK"),
        (b"NOOP\r\n", b"+OK"), (b"QUIT\r\n", b"+OK"),
    ),
}  # fmt: skip
"""What a session says, and what the last line of each answer begins with."""


def sessions(protocol: str, port: int, count: int) -> float:
    """Short sessions, ten at a time, one login each; how many a second."""
    return float(_elsewhere("sessions", protocol, str(port), str(count)))


def fetches(port: int, count: int, tls: bool) -> None:
    """One session that fetches 25 MB `count` times."""
    _elsewhere("fetch", "tls" if tls else "plain", str(port), str(count))


def _elsewhere(*arguments: str) -> str:
    argv = [sys.executable, "-m", "bench.store_clients", *arguments]
    return subprocess.run(argv, check=True, timeout=300, stdout=subprocess.PIPE, text=True).stdout


class Session(asyncio.Protocol):
    """One session of the script; `done` when the last answer was read."""

    def __init__(self, script: tuple[tuple[bytes, bytes], ...], done: asyncio.Future[None]) -> None:
        self.script, self.done = script, done
        self.step, self.answer = 0, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The greeting comes by itself."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        """The next step once the answer to this one is whole."""
        self.answer += data
        if not self.answer.endswith(b"\r\n"):
            return
        last = self.answer[self.answer.rfind(b"\n", 0, -1) + 1 :]
        if not last.startswith(self.script[self.step][1]):
            if not last.startswith(b"* "):
                self.done.set_exception(RuntimeError(f"{self.script[self.step]}: {self.answer!r}"))
                self.transport.abort()
            return
        self.answer = b""
        self.step += 1
        if self.step < len(self.script):
            self.transport.write(self.script[self.step][0])
        else:
            self.transport.close()
            self.done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        """Too early is an error."""
        if not self.done.done():
            self.done.set_exception(RuntimeError(f"closed in step {self.step}: {error}"))


async def _sessions(protocol: str, port: int, count: int) -> None:
    loop = asyncio.get_running_loop()
    left = iter(range(count))

    async def one() -> None:
        session = Session(SESSIONS[protocol], loop.create_future())
        await loop.create_connection(lambda: session, "127.0.0.1", port)
        await session.done

    async def client() -> None:
        for _ in left:
            await one()

    begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    print(count / (time.perf_counter() - begun))


class Client:
    """An IMAP client on a blocking socket, without a reader's buffer, so that thousands cost little."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        raw = socket.create_connection(("127.0.0.1", port), 120)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = tls.wrap_socket(raw) if tls is not None else raw
        self.answer(b"* OK")

    def answer(self, wanted: bytes) -> None:
        """Read until the last line begins like that."""
        said = b""
        while not said.endswith(b"\r\n") or not said[said.rfind(b"\n", 0, -1) + 1 :].startswith(wanted):
            data = self.sock.recv(65536)
            if not data:
                raise RuntimeError(f"closed: {said!r}")
            said += data

    def say(self, line: bytes) -> None:
        """A command, and its OK."""
        self.sock.sendall(line)
        self.answer(line.partition(b" ")[0] + b" OK")

    def close(self) -> None:
        """Close."""
        self.sock.close()


def logged_in(port: int, count: int, tls: bool) -> list[Client]:
    """Clients that logged in and then do nothing."""
    made = context() if tls else None
    clients = []
    for _ in range(count):
        client = Client(port, made)
        client.say(LOGIN)
        clients.append(client)
    return clients


def login_time(port: int) -> float:
    """Milliseconds from connecting to the answer to LOGIN."""
    begun = time.perf_counter()
    client = Client(port)
    client.say(LOGIN)
    taken = (time.perf_counter() - begun) * 1000
    client.say(b"c LOGOUT\r\n")
    client.close()
    return taken


def _fetch(port: int, count: int, tls: bool) -> None:
    client = Client(port, context() if tls else None)
    client.say(LOGIN)
    wanted, room = len(MESSAGE) + len(b"f OK done\r\n"), memoryview(bytearray(1 << 18))
    for _ in range(count):
        client.sock.sendall(b"f FETCH 1 BODY[]\r\n")
        got = 0
        while got < wanted:
            size = client.sock.recv_into(room)
            if not size:
                raise RuntimeError(f"closed after {got} octets")
            got += size
    client.say(b"c LOGOUT\r\n")
    client.close()


if __name__ == "__main__":
    job, kind, to, number = sys.argv[1:]
    if job == "sessions":
        uvloop.run(_sessions(kind, int(to), int(number)))
    else:
        _fetch(int(to), int(number), kind == "tls")
