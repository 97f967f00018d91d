"""Numbered mail: a client that paces sessions and notes every answer; bench/counting.py is the sink.

`python -m bench.numbered JSON` runs in a process of its own, on one event loop. A message's number stands in its last
line: one that was cut short has none. Client and sink keep an octet for each number and write them to a file at the
end; `compare` says what became of each message.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

import uvloop

from bench.clients import context

SENT, ACKNOWLEDGED = 1, 2
LINE = b"x" * 78 + b"\r\n"
HEAD = b"From: <a@example.org>\r\nTo: <b@example.net>\r\nSubject: soak\r\nX-Spam-Flag: YES\r\nMIME-Version: 1.0\r\n"
SMALL = HEAD + b"\r\n" + LINE * 11
LARGE = HEAD + b"Content-Type: text/plain\r\n\r\n" + LINE * 13_100
IDLE_SECONDS = 15.0
END_SECONDS = 60.0  # for what is open at the end
MOST_OPEN = 400  # fewer than may wait to be accepted
SESSIONS_AN_ADDRESS = 4
NO_PORT_YET = 24  # IP_BIND_ADDRESS_NO_PORT, ip(7)

Step = tuple[bytes, bytes]
"""What is said, and what the last line of the answer begins with; b"" for any answer."""


# -- the client


@dataclass(frozen=True)
class Orders:
    """`rate` sessions a second, or 0 for `together` that begin the next one when one ends. `first`: the first number.

    `idlers` IMAP sessions idle all the time; `marks` is the file for what became of the numbers. Without the other
    ports all sessions are short ones of SMTP in clear text.
    """

    smtp: int
    seconds: float
    marks: str
    smtps: int = 0
    content: int = 0
    imap: int = 0
    first: int = 0
    rate: float = 0.0
    together: int = 40
    idlers: int = 0


@dataclass
class Result:
    """Sessions by kind and by how they ended; of each kind milliseconds (as text, for JSON) to sessions that took them.

    `longest` is the longest wait for one answer, in seconds, `said` what clients were told that were refused.
    """

    started: dict[str, int] = field(default_factory=Counter)
    ended: dict[str, int] = field(default_factory=Counter)
    said: dict[str, int] = field(default_factory=Counter)
    sessions: dict[str, dict[str, int]] = field(default_factory=dict)
    longest: float = 0.0
    longest_step: str = ""
    not_started: int = 0
    seconds: float = 0.0


class Client:
    """One run."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.result = Result()
        self.marks = bytearray()
        self.tls = context()
        self.open: set[asyncio.Task[None]] = set()
        self.count = 0
        self.over = False

    async def run(self) -> None:
        """All sessions, to their ends: then `result` and `marks` are whole."""
        begun = time.monotonic()
        idlers = [asyncio.create_task(self._idler(index)) for index in range(self.orders.idlers)]
        if self.orders.rate:
            await self._paced(begun)
        else:
            await asyncio.gather(*(self._one_by_one(begun) for _ in range(self.orders.together)))
        self.result.seconds = time.monotonic() - begun
        self.over = True
        if self.open:
            await asyncio.wait(self.open, timeout=END_SECONDS)
        for idler in idlers:
            idler.cancel()
        if idlers:
            await asyncio.wait(idlers)

    async def _paced(self, begun: float) -> None:
        """As many as are due, whether earlier ones have ended or not; far too many open ones are not added to."""
        while (passed := time.monotonic() - begun) < self.orders.seconds:
            due = int(passed * self.orders.rate) - self.count - self.result.not_started
            for _ in range(due):
                if len(self.open) >= MOST_OPEN:
                    self.result.not_started += 1
                    continue
                task = asyncio.create_task(self._session())
                self.open.add(task)
                task.add_done_callback(self.open.discard)
            await asyncio.sleep(0.005)

    async def _one_by_one(self, begun: float) -> None:
        while time.monotonic() - begun < self.orders.seconds:
            await self._session()

    async def _session(self) -> None:
        """The next one: of a hundred 82 short ones, 5 under TLS, 1 large one, 10 of IMAP, 2 of a client that errs."""
        index = self.count
        self.count += 1
        address = _address(index // SESSIONS_AN_ADDRESS)
        place = index % 100 if self.orders.smtps else 0
        if place % 10 == 3:
            await self._talk("imap", self.orders.imap, IMAP, address)
        elif place in (21, 71):
            await self._talk("erring", self.orders.smtp, ERRING, f"127.250.0.{index // 50 % 16 + 1}")
        elif place == 50:
            await self._message("1 MB", self.orders.content, LARGE, address)
        elif place % 20 == 5:
            await self._message("TLS", self.orders.smtps, SMALL, address, self.tls)
        else:
            await self._message("1 kB", self.orders.smtp, SMALL, address)

    async def _message(
        self, kind: str, port: int, content: bytes, address: str, tls: ssl.SSLContext | None = None
    ) -> None:
        number = len(self.marks)
        self.marks.append(0)
        last = b"%09d\r\n.\r\n" % (self.orders.first + number)
        steps = (*OPENING, (content + last, b"250"), (b"QUIT\r\n", b"221"))
        await self._talk(kind, port, steps, address, tls, number)

    async def _talk(
        self, kind: str, port: int, steps: Sequence[Step], address: str, tls: ssl.SSLContext | None = None,
        number: int | None = None,
    ) -> None:  # fmt: skip
        self.result.started[kind] += 1
        begun = time.monotonic()
        session = Talk(steps)
        try:
            await session.open(port, address, tls)
            ended = await session.done
        except OSError as error:
            ended = f"no connection: {type(error).__name__}"
        if number is not None and session.step > len(OPENING):
            self.marks[number] = ACKNOWLEDGED
        elif number is not None and session.step == len(OPENING):
            self.marks[number] = SENT  # no answer, or not a good one
        if session.longest > self.result.longest:
            self.result.longest, self.result.longest_step = session.longest, f"{kind}: {session.longest_step}"
        self.result.ended[f"{kind}: {ended}"] += 1
        if ended not in ("done", "lost"):
            said = session.answer.decode("latin-1").strip().partition(" (")[0]  # without the session's id
            self.result.said[f"{kind}: {said[:120]}"] += 1
        times = self.result.sessions.setdefault(kind, Counter())
        times[str(round((time.monotonic() - begun) * 1000))] += 1

    async def _idler(self, index: int) -> None:
        """Logs in, idles, logs out, again and again; begun at different times."""
        await asyncio.sleep(index * IDLE_SECONDS / max(1, self.orders.idlers))
        while not self.over:
            self.result.started["idle"] += 1
            session = Talk(IDLING[:3])
            await session.open(self.orders.imap, _address(60_000 + index), None)
            session.keep_open = True
            ended = await session.done
            if ended == "done":
                session.again(IDLING[3:])
                try:
                    ended = await asyncio.wait_for(asyncio.shield(session.done), IDLE_SECONDS)
                except TimeoutError:
                    session.say()
                    ended = await session.done
            self.result.ended[f"idle: {ended}"] += 1


OPENING: tuple[Step, ...] = (
    (b"", b"220"), (b"EHLO source.test\r\n", b"250"), (b"MAIL FROM:<a@example.org>\r\n", b"250"),
    (b"RCPT TO:<b@example.net>\r\n", b"250"), (b"DATA\r\n", b"354"),
)  # fmt: skip
ERRING: tuple[Step, ...] = ((b"", b"220"), (b"HELP ME\r\n", b""), (b"FOO\r\n", b""), (b"BAR\r\n", b""),
                            (b"QUIT\r\n", b"221"))  # fmt: skip
LOGIN = b"a LOGIN anna@example.org secret-word\r\n"
IMAP: tuple[Step, ...] = ((b"", b"* OK"), (LOGIN, b"a OK"), (b"b FETCH 1 BODY[]\r\n", b"b OK"),
                          (b"c LOGOUT\r\n", b"c OK"))  # fmt: skip
IDLING: tuple[Step, ...] = ((b"", b"* OK"), (LOGIN, b"a OK"), (b"b IDLE\r\n", b"+ "), (b"DONE\r\n", b"b OK"),
                            (b"c LOGOUT\r\n", b"c OK"))  # fmt: skip


class Talk(asyncio.Protocol):
    """One session: `done` says how it ended; `step` is how many answers were right."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.steps = steps
        self.step, self.answer = 0, b""
        self.longest, self.longest_step = 0.0, ""
        self.keep_open = False
        self.done: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def open(self, port: int, address: str, tls: ssl.SSLContext | None) -> None:
        """Connect from that address. Raises OSError."""
        loop = asyncio.get_running_loop()
        sock = socket.socket()
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.IPPROTO_IP, NO_PORT_YET, 1)
            sock.setblocking(False)
            sock.bind((address, 0))
            self.asked = time.monotonic()
            await loop.sock_connect(sock, ("127.0.0.1", port))
            await loop.create_connection(
                lambda: self, sock=sock, ssl=tls, server_hostname="gateway.test" if tls else None
            )
        except BaseException:
            sock.close()
            raise

    def again(self, steps: Sequence[Step]) -> None:
        """More steps of the same session, once `say` is called."""
        self.steps, self.step, self.keep_open = steps, 0, False
        self.done = asyncio.get_running_loop().create_future()

    def say(self) -> None:
        """The next step."""
        self.asked = time.monotonic()
        self.transport.write(self.steps[self.step][0])

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The greeting comes by itself."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        """The next step once the answer to this one is whole and right."""
        if self.done.done():
            return
        answer = self.answer = self.answer + data
        last = answer[answer.rfind(b"\n", 0, -1) + 1 :]
        if not answer.endswith(b"\r\n") or last[3:4] == b"-":
            return
        wanted = self.steps[self.step][1]
        if not last.startswith(wanted):
            if not (wanted[1:2] == b" " and last.startswith((b"* ", b")", b"x"))):  # IMAP: more is to come
                self._end("refused")
            return
        waited = time.monotonic() - self.asked
        if waited > self.longest:
            self.longest, self.longest_step = waited, self.steps[self.step][0][:12].decode("latin-1").strip()
        self.answer = b""
        self.step += 1
        if self.step < len(self.steps):
            self.say()
        elif self.keep_open:
            self.done.set_result("done")
        else:
            self._end("done")

    def _end(self, how: str) -> None:
        self.done.set_result(how)
        self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        """Too early: what was read is kept."""
        if not self.done.done():
            self.done.set_result("lost")


def _address(index: int) -> str:
    """Clients come from ever new addresses of the loopback network."""
    return f"127.{16 + (index >> 16) % 200}.{index >> 8 & 255}.{index & 255 or 1}"


# -- the comparison


class Fate(NamedTuple):
    """How many: begun, acknowledged, at the sink; acknowledged but not there, there twice, there without a word."""

    messages: int
    acknowledged: int
    arrived: int
    lost: int
    doubled: int
    silent: int


def compare(parts: Sequence[tuple[int, bytes]], counts: bytes) -> Fate:
    """`parts` are first numbers and marks of the clients, `counts` the sink's. No message is sent twice."""
    acknowledged = lost = doubled = silent = arrived = total = 0
    for first, marks in parts:
        there = counts[first : first + len(marks)].ljust(len(marks), b"\0")
        total += len(marks)
        for mark, count in zip(marks, there, strict=True):
            acknowledged += mark == ACKNOWLEDGED
            arrived += count > 0
            lost += mark == ACKNOWLEDGED and not count
            doubled += count > 1
            silent += count > 0 and mark != ACKNOWLEDGED
    return Fate(total, acknowledged, arrived, lost, doubled, silent)


def main() -> None:
    """Run by its orders; the result is printed."""
    orders = Orders(**json.loads(sys.argv[1]))

    async def run() -> Client:
        client = Client(orders)
        await client.run()
        return client

    client = uvloop.run(run())
    Path(orders.marks).write_bytes(client.marks)
    print(json.dumps(vars(client.result)))


if __name__ == "__main__":
    main()
