"""A mail store that logs everybody in, for tests that walk tables or throw dirt: it judges what it reads."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

TAG = rb"[!#$&',\-./0-9:;<=>?@A-Z\[\]^_`a-z|}~]+"
STRING = re.compile(rb' (?:"((?:[^"\\\r\n]|\\["\\])*)"|\{([0-9]+)(\+?)\})')


@dataclass
class ObligingStore:
    """`logins` are the (user, password) of each login; `commands` the names of what it read, over all connections.

    `wrong` tells of each octet that was no well-formed command before the login. `after` is what came behind it.
    """

    protocol: str
    logins: list[tuple[bytes, ...]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    wrong: list[bytes] = field(default_factory=list)
    after: list[bytes] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    port: int = 0

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[ObligingStore]:
        """Listen on `port`."""
        writers: list[asyncio.StreamWriter] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await (self._imap if self.protocol == "imap" else self._pop3)(reader, writer)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 20)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for writer in writers:
                writer.transport.abort()

    def clear(self) -> None:
        """Forget what was seen."""
        for seen in (self.logins, self.commands, self.wrong, self.after, self.lines):
            seen.clear()

    async def _line(self, reader: asyncio.StreamReader) -> bytes:
        line = await reader.readline()
        if line:
            self.lines.append(line)
        if line and (not line.endswith(b"\r\n") or b"\0" in line or b"\r" in line[:-2]):
            self.wrong.append(line)
        return line[:-2]

    async def _imap(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"* OK obliging\r\n")
        while line := await self._line(reader):
            match = re.match(rb"(%b) ([A-Z]+)" % TAG, line)
            if match is None:
                self.wrong.append(line)
                return
            tag, name, rest = match[1], match[2].decode(), line[match.end() :]
            self.commands.append(name)
            if name in ("LOGIN", "ID"):
                strings = await self._strings(rest, reader, writer)
                if name == "LOGIN" and (strings is None or len(strings) != 2):
                    self.wrong.append(line)
                    return
                if name == "LOGIN" and strings is not None:
                    self.logins.append(tuple(strings))
            elif name == "AUTHENTICATE":
                mechanism, _, response = rest[1:].partition(b" ")
                if not response:
                    writer.write(b"+ \r\n")
                    response = await self._line(reader)
                self._sasl(mechanism, response)
            elif rest:
                self.wrong.append(line)
            writer.write(b"%b OK done\r\n" % tag)
            if name in ("LOGIN", "AUTHENTICATE"):
                await self._spliced(reader)
                return

    async def _strings(
        self, rest: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> list[bytes] | None:
        """The strings behind a command's name, to its end; None for what is none. A list of ID is only looked through."""
        if rest[:2] == b" (" and rest[-1:] == b")":
            rest = b" " + rest[2:-1]
        strings = []
        while rest:
            if rest.startswith(b" NIL"):
                rest = rest[4:]
                continue
            match = STRING.match(rest)
            if match is None:
                self.wrong.append(rest)
                return None
            rest = rest[match.end() :]
            if match[2] is None:
                strings.append(re.sub(rb"\\(.)", rb"\1", match[1]))
                continue
            if rest:
                self.wrong.append(rest)
                return None
            if not match[3]:
                writer.write(b"+ go\r\n")
            strings.append(await reader.readexactly(int(match[2])))
            rest = await self._line(reader)
        return strings

    def _sasl(self, mechanism: bytes, response: bytes) -> None:
        try:
            message = base64.b64decode(response, validate=True)
        except binascii.Error:
            self.wrong.append(response)
            return
        if mechanism == b"PLAIN":
            parts = message.split(b"\0")
            if len(parts) != 3:
                self.wrong.append(message)
            self.logins.append(tuple(parts))
        else:
            self.logins.append((message,))

    async def _pop3(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"+OK [XCLIENT] obliging\r\n")
        user = b""
        while line := await self._line(reader):
            name, _, argument = line.partition(b" ")
            self.commands.append(name.decode("latin-1"))
            if name == b"USER" and not user and argument:
                user = argument
            elif name == b"PASS" and user:
                self.logins.append((user, argument))
            elif name == b"AUTH":
                mechanism, _, response = argument.partition(b" ")
                if not response:
                    writer.write(b"+ \r\n")
                    response = await self._line(reader)
                self._sasl(mechanism, response)
            elif name == b"XCLIENT":
                if not re.fullmatch(rb"(?: [A-Z-]+=[!-~]+)+", b" " + argument):
                    self.wrong.append(line)
            elif name != b"QUIT":
                self.wrong.append(line)
            writer.write(b"+OK\r\n")
            if name in (b"PASS", b"AUTH"):
                await self._spliced(reader)
                return

    async def _spliced(self, reader: asyncio.StreamReader) -> None:
        """What the client says itself."""
        while data := await reader.read(65536):
            self.after.append(data)
