"""A mail server for tests that records every byte it is sent, and answers from a table: SMTP, IMAP or POP3.

The table names a reply for each verb, or several that are taken in turn, the last one again and again; `GREETING` and
`END` (of a message) count as verbs. A reply is bytes in which `$tag` stands for the tag of an IMAP command and
`$late` for a pause. Its end may say what follows it: ` !close`, ` !reset`, ` !half` (FIN, and goes on reading), ` !hang` (reads no more).
Replies that are not in the table are those of a server to which everything is welcome.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Mapping, Sequence
from types import TracebackType

from tests.peers.scripted import reset

LATE = 0.7
"""Seconds of a pause: shorter than a clock of one second, and two of them are longer."""

Table = Mapping[str, Sequence[bytes]]

USUAL: dict[str, dict[str, bytes]] = {
    "smtp": {
        "GREETING": b"220 up.test ESMTP\r\n", "XCLIENT": b"220 up.test ESMTP\r\n", "AUTH": b"235 2.7.0 welcome\r\n",
        "DATA": b"354 go ahead\r\n", "END": b"250 2.0.0 queued\r\n", "QUIT": b"221 2.0.0 up bye\r\n !close",
        "RCPT": b"250 2.1.5 recipient ok\r\n", "": b"250 2.0.0 up ok\r\n",
    },
    "imap": {
        "GREETING": b"* OK up ready\r\n", "LOGIN": b"$tag OK logged in\r\n",
        "LOGOUT": b"* BYE up\r\n$tag OK logout\r\n !close", "": b"$tag OK up done\r\n",
    },
    "pop3": {
        "GREETING": b"+OK up ready\r\n", "PASS": b"+OK logged in\r\n", "QUIT": b"+OK up bye\r\n !close",
        "RETR": b"+OK message\r\nline\r\n.\r\n", "": b"+OK up ok\r\n",
    },
}  # fmt: skip

_LITERAL = re.compile(rb"\{(\d+)(\+?)\}\r?\n$")


class RecordingUpstream:
    """Listens on 127.0.0.1, on a free port if none is given. `received`: the bytes of each connection; `arrived`: some came."""

    def __init__(self, protocol: str, replies: Table | None = None, port: int = 0) -> None:
        self._protocol = protocol
        self.port = port
        self._replies = dict(replies or {})
        self._taken: dict[str, int] = {}
        self.received: list[bytearray] = []
        self.arrived = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> RecordingUpstream:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port, limit=1 << 20)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def settled(self) -> None:
        """Wait until the other side ended each connection that was made."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def _reply(self, verb: str) -> bytes:
        listed = self._replies.get(verb)
        if listed is None:
            usual = USUAL[self._protocol]
            return usual.get(verb, usual[""])
        number = self._taken[verb] = self._taken.get(verb, 0) + 1
        return listed[min(number, len(listed)) - 1]

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        record = bytearray()
        self.received.append(record)
        try:
            with contextlib.suppress(ConnectionError):
                await self._converse(reader, writer, record)
        except asyncio.CancelledError:
            pass  # the streams of 3.11 log a cancelled handler as an error
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _converse(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, record: bytearray
    ) -> None:
        if not await self._say("GREETING", b"", writer, reader, record):
            return
        in_message = False
        while True:
            tag, verb = b"", ""
            line = await reader.readline()
            record += line
            self.arrived.set()
            if line.startswith(b"PROXY ") and len(record) == len(line):
                continue
            if record == b"\r\n":  # so begins a PROXY header of version 2
                record += await reader.readexactly(14)
                record += await reader.readexactly(int.from_bytes(record[-2:], "big"))
                continue
            while self._protocol == "imap" and (literal := _LITERAL.search(line)):
                tag, verb = (tag, verb) if verb else _words(line, self._protocol)
                if not literal[2] and not await self._say("LITERAL", b"", writer, reader, record, b"+ OK\r\n"):
                    return
                with contextlib.suppress(asyncio.IncompleteReadError):
                    record += await reader.readexactly(int(literal[1]))
                line = await reader.readline()
                record += line
            if not line:
                return
            if in_message:
                if line.rstrip(b"\r\n") != b".":
                    continue
                in_message, verb = False, "END"
            tag, verb = (tag, verb) if verb else _words(line, self._protocol)
            in_message = in_message or (self._protocol == "smtp" and verb == "DATA")
            if not await self._say(verb, tag, writer, reader, record):
                return

    async def _say(
        self,
        verb: str,
        tag: bytes,
        writer: asyncio.StreamWriter,
        reader: asyncio.StreamReader,
        record: bytearray,
        usual: bytes = b"",
    ) -> bool:
        """Send the reply of a verb and do what it says then; False ends the connection."""
        reply = usual if usual and verb not in self._replies else self._reply(verb)
        text, _, then = reply.partition(b" !")
        for number, part in enumerate(text.replace(b"$tag", tag).split(b"$late")):
            await asyncio.sleep(LATE if number else 0)
            writer.write(part)
            await writer.drain()
        match then:
            case b"close":
                return False
            case b"reset":
                reset(writer)
                return False
            case b"half":
                writer.write_eof()
            case b"hang":
                while data := await reader.read(65536):
                    record += data
                return False
        return True


def _words(line: bytes, protocol: str) -> tuple[bytes, str]:
    """The tag (IMAP) and the verb, in upper case."""
    words = line.split(None, 2)
    if protocol != "imap":
        return b"", words[0].decode("latin-1").upper() if words else ""
    return words[0] if words else b"", words[1].decode("latin-1").upper() if len(words) > 1 else ""
