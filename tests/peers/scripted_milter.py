"""A filter that follows a script and fails at the event a test chooses, in the test's own loop.

    async with ScriptedMilter({"mail": Answer(REJECT), "body:2": Reset()}) as milter:   # milter.address
        await milter.reached("body:2")
    async with ScriptedMilter({"eom": Hang()}, {}) as milter: ...      # the first connection, then all later ones

A script has a step, or several, for an event (`body`, each time) or for its nth time in a connection (`body:2`); to
all others the answer is `continue`. Events are optneg, macro, connect, helo, mail, rcpt, data, header, eoh, body, eom,
abort, unknown, quit, quit_nc. It speaks the protocol by itself, so that it can judge an MTA's side.
"""

from __future__ import annotations

import asyncio
import os
import struct
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.peers.scripted import Close, Drip, Garbage, Hang, Reset, Wait, reset

EVENTS = {
    b"O": "optneg", b"D": "macro", b"C": "connect", b"H": "helo", b"M": "mail", b"R": "rcpt", b"T": "data",
    b"L": "header", b"N": "eoh", b"B": "body", b"E": "eom", b"A": "abort", b"U": "unknown", b"Q": "quit",
    b"K": "quit_nc",
}  # fmt: skip
NO_REPLY = ("macro", "abort", "quit", "quit_nc")
# Bits of the protocol mask by which a filter says that it will not reply.
PROMISES = {
    "connect": 0x1000, "helo": 0x2000, "mail": 0x4000, "rcpt": 0x8000, "data": 0x10000, "unknown": 0x20000,
    "eoh": 0x40000, "header": 0x80, "body": 0x80000,
}  # fmt: skip
# Bits by which it asks not to be told.
OMIT = {
    "connect": 0x01, "helo": 0x02, "mail": 0x04, "rcpt": 0x08, "body": 0x10, "header": 0x20, "eoh": 0x40,
    "unknown": 0x100, "data": 0x200,
}  # fmt: skip
SKIP_BIT, RCPT_REJ, LEADING_SPACE = 0x400, 0x800, 0x100000
ALL_ACTIONS = 0x1FF


def frame(code: bytes, payload: bytes = b"") -> bytes:
    """A packet: its length, its code, its payload."""
    return struct.pack("!I", 1 + len(payload)) + code + payload


def strings(*values: bytes) -> bytes:
    """Each ended by NUL."""
    return b"".join(value + b"\0" for value in values)


def options(
    version: int = 6, actions: int = ALL_ACTIONS, protocol: int = 0, macros: Mapping[int, bytes] | None = None
) -> bytes:
    """The answer to the MTA's offer; `macros` by stage (0 connect, 1 helo, 2 mail, 3 rcpt, 4 data, 5 eom, 6 eoh)."""
    lists = b"".join(struct.pack("!I", stage) + strings(names) for stage, names in (macros or {}).items())
    return frame(b"O", struct.pack("!III", version, actions, protocol) + lists)


def reply(text: bytes) -> bytes:
    """A refusal in words: `550 5.7.1 text`, lines separated by CRLF."""
    return frame(b"y", strings(text))


def add_header(name: bytes, value: bytes) -> bytes:
    """At the end."""
    return frame(b"h", strings(name, value))


def insert_header(index: int, name: bytes, value: bytes) -> bytes:
    """Above the field with this index; 0 is above the MTA's own Received."""
    return frame(b"i", struct.pack("!I", index) + strings(name, value))


def change_header(index: int, name: bytes, value: bytes) -> bytes:
    """The nth of this name; an empty value deletes it."""
    return frame(b"m", struct.pack("!I", index) + strings(name, value))


def replace_body(data: bytes) -> bytes:
    """One piece of the new body."""
    return frame(b"b", data)


def change_sender(address: bytes, parameters: bytes | None = None) -> bytes:
    """A new sender, with ESMTP parameters in one string."""
    return frame(b"e", strings(address, *(() if parameters is None else (parameters,))))


def add_recipient(address: bytes, parameters: bytes | None = None) -> bytes:
    """One more recipient; with parameters it is another packet."""
    return frame(b"+", strings(address)) if parameters is None else frame(b"2", strings(address, parameters))


def delete_recipient(address: bytes) -> bytes:
    """One recipient less."""
    return frame(b"-", strings(address))


def quarantine(reason: bytes) -> bytes:
    """A verdict follows."""
    return frame(b"q", strings(reason))


CONTINUE, ACCEPT, REJECT, TEMPFAIL, DISCARD = (frame(code) for code in (b"c", b"a", b"r", b"t", b"d"))
SKIP, PROGRESS, SHUTDOWN, CONNECTION_FAILED = (frame(code) for code in (b"s", b"p", b"4", b"f"))


@dataclass(frozen=True, slots=True)
class Answer:
    """Send these bytes, packets as a rule (`Answer(PROGRESS, CONTINUE)`); none leaves the MTA without a reply."""

    packets: tuple[bytes, ...]

    def __init__(self, *packets: bytes) -> None:
        object.__setattr__(self, "packets", packets)


Step = Answer | Drip | Garbage | Wait | Hang | Close | Reset
Script = Mapping[str, Step | Sequence[Step]]


class ScriptedMilter:
    """The filter. Each connection runs its script, those beyond the last script run the last one again.

    `inet` takes a port, else it is a Unix socket. `seen` has (connection, event, payload) of every packet. `offers`
    has (version, actions, protocol) of each negotiation. `greeting` is the answer to it, unless the script has
    one; promises of no reply in it are kept.
    """

    def __init__(self, *scripts: Script, greeting: bytes = options(), inet: bool = False) -> None:
        self._scripts = scripts or ({},)
        self._greeting = greeting
        self._inet = inet
        self.connections = 0
        self.seen: list[tuple[int, str, bytes]] = []
        self.offers: list[tuple[int, int, int]] = []
        self._reached: set[tuple[int, str]] = set()
        self._gone: set[int] = set()
        self._progress = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> ScriptedMilter:
        self._folder = tempfile.TemporaryDirectory(prefix="milter-")
        if self._inet:
            self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
            self.address = f"inet:127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        else:
            Path(self._folder.name).chmod(0o755)
            path = Path(self._folder.name) / "milter.sock"
            self._server = await asyncio.start_unix_server(self._connected, path)
            path.chmod(0o666)
            self.address = f"unix:{path}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._folder.cleanup()

    def refuse_connections(self) -> None:
        """Listen no longer; sessions go on."""
        self._server.close()

    def drop(self) -> None:
        """End every connection, as a filter that is killed does."""
        for writer in self._writers:
            reset(writer)

    async def reached(self, event: str, connection: int = 1) -> None:
        """Wait until an event arrived (`body`, or its nth time `body:2`) in a connection; the first is 1."""
        while (connection, event) not in self._reached:
            self._progress.clear()
            await self._progress.wait()

    async def gone(self, connection: int = 1) -> None:
        """Wait until a connection has ended, whoever ended it."""
        while connection not in self._gone:
            self._progress.clear()
            await self._progress.wait()

    def events(self, connection: int = 1) -> list[str]:
        """The names of a connection's events, macros left out."""
        return [event for number, event, _ in self.seen if number == connection and event != "macro"]

    def payloads(self, event: str, connection: int = 1) -> list[bytes]:
        """What came with each of a connection's events of this name."""
        return [payload for number, name, payload in self.seen if (number, name) == (connection, event)]

    def macros(self, before: str, connection: int = 1) -> dict[bytes, bytes]:
        """What the last packet of macros for an event said (`mail`, `rcpt`, ...)."""
        codes = {event: code for code, event in EVENTS.items()}
        last = [payload[1:] for payload in self.payloads("macro", connection) if payload[:1] == codes[before]][-1]
        parts = last.split(b"\0")[:-1]
        return dict(zip(parts[::2], parts[1::2], strict=True))

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        number = self.connections = self.connections + 1
        script = self._scripts[min(number, len(self._scripts)) - 1]
        try:
            await self._serve(number, script, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the MTA has gone
        except asyncio.CancelledError:
            pass  # the streams of 3.11 log a cancelled handler as an error
        finally:
            self._gone.add(number)
            self._progress.set()
            writer.close()
            self._writers.discard(writer)
            self._tasks.discard(task)

    async def _serve(
        self, number: int, script: Script, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        times: Counter[str] = Counter()
        promised = 0
        while True:
            (length,) = struct.unpack("!I", await reader.readexactly(4))
            packet = await reader.readexactly(length)
            event = EVENTS.get(packet[:1], repr(packet[:1]))
            times[event] += 1
            if event == "optneg":
                version, actions, protocol = struct.unpack_from("!III", packet, 1)
                self.offers.append((version, actions, protocol))
                promised = _promises(self._greeting)
            self.seen.append((number, event, packet[1:]))
            this_time = f"{event}:{times[event]}"
            self._reached |= {(number, event), (number, this_time)}
            self._progress.set()
            steps = script.get(this_time, script.get(event, self._usual(event, promised)))
            for step in steps if isinstance(steps, Sequence) else (steps,):
                if not await self._run(step, reader, writer):
                    return
            if event == "quit":
                return

    def _usual(self, event: str, promised: int) -> Answer:
        if event == "optneg":
            return Answer(self._greeting)
        if event in NO_REPLY or PROMISES.get(event, 0) & promised:
            return Answer()
        return Answer(CONTINUE)

    async def _run(self, step: Step, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Run one step; False ends the connection."""
        match step:
            case Answer(packets):
                writer.write(b"".join(packets))
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
            case Wait(event):
                await event.wait()
            case Hang():
                while await reader.read(1 << 16):
                    pass
                return False
            case Reset():
                reset(writer)
                return False
            case Close():
                return False
        return True


def _promises(greeting: bytes) -> int:
    return int(struct.unpack_from("!I", greeting, 13)[0]) if len(greeting) >= 17 else 0
