"""The client of a script (nginx_scripts.py): it does the steps and writes down what it was sent.

What it saw has the form of the script itself, so the two can be compared line by line. After the last step it ends
its side and reads what else there is, so nothing that the server says goes unseen.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import struct
from base64 import b64decode
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.interop.nginx_scripts import Step, octets
from tests.peers.recording_upstream import LATE

LIMIT = 8.0
"""Seconds that the client waits for what it is to be sent."""

_CHALLENGE = re.compile(r"<[^<>\s]+@[^<>\s]+>")
_BASE64 = re.compile(r"(?<=[ ])[A-Za-z0-9+/]{16,}={0,2}$")


@dataclass
class Names:
    """Replaces what is different at each run: the salts of challenges, in the order in which they are seen."""

    salts: dict[str, str] = field(default_factory=dict)

    def salt(self, text: str) -> str:
        """A text with its challenges made alike."""
        return _CHALLENGE.sub(self._named, text)

    def _named(self, match: re.Match[str]) -> str:
        host = match[0].rpartition("@")[2]
        return self.salts.setdefault(match[0], f"<SALT{len(self.salts) + 1}@{host}")

    def line(self, text: str) -> str:
        """What a server said: challenges in base64 too, and in the greeting of POP3."""
        if text.startswith("+OK") and _CHALLENGE.search(text):
            return self.salt(text)
        if token := _BASE64.search(text):
            try:
                plain = b64decode(token[0], validate=True).decode("latin-1")
            except ValueError:
                return text
            if _CHALLENGE.fullmatch(plain):
                return f"{text[: token.start()]}base64 of {self.salt(plain)}"
        return text


@dataclass
class Client:
    """One connection to a server. `events`: what `wait` waits for; `stop` comes back when the program is to stop."""

    destination: tuple[str, int] | Path
    source: str
    greeting: Sequence[str]
    substitute: Callable[[str], str]
    certificates: Mapping[str, tuple[Path, Path]]
    events: Mapping[str, asyncio.Event]
    stop: Callable[[], Awaitable[None]]
    names: Names = field(default_factory=Names)
    saw: list[str] = field(default_factory=list)
    port: int = 0
    _reader: asyncio.StreamReader = field(init=False)
    _writer: asyncio.StreamWriter = field(init=False)

    async def play(self, steps: Sequence[Step]) -> list[str]:
        """Do the steps; what was seen, as lines of a script."""
        await self._connect()
        try:
            for step in steps:
                if not await self._step(step):
                    break
            await self._finish()
        finally:
            self._writer.transport.abort()
        return self.saw

    async def _connect(self) -> None:
        if isinstance(self.destination, Path):
            self._reader, self._writer = await asyncio.open_unix_connection(self.destination)
            return
        local = (self.source, 0) if self.source else None
        self._reader, self._writer = await asyncio.open_connection(*self.destination, local_addr=local)
        self.port = int(self._writer.get_extra_info("sockname")[1])

    async def _step(self, step: Step) -> bool:
        """Do one step; False: the rest makes no sense any more."""
        text = self.substitute(step.text).replace("$cport", str(self.port))
        match step.kind:
            case ">" | ">|":
                self.saw.append(str(step))
                self._writer.write(octets(text) + (b"\r\n" if step.kind == ">" else b""))
            case "<<":
                return all([await self._read_line() for _ in self.greeting])
            case "<":
                return await self._read_line()
            case "<|":
                return await self._read_octets(len(octets(text)))
            case "<.":
                return await self._read_line()
            case ">.":
                self.saw.append(">.")
                self._writer.write_eof()
            case ">!":
                self.saw.append(">!")
                sock = self._writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self._writer.transport.abort()
            case "wait":
                await asyncio.wait_for(self.events[text].wait(), LIMIT)
                self.saw.append(str(step))
            case "late":
                await asyncio.sleep(LATE)
                self.saw.append("late")
            case "stop":
                await asyncio.wait_for(self.stop(), LIMIT)
                self.saw.append("stop")
            case "TLS":
                return await self._handshake(text.split())
        return True

    async def _read_line(self) -> bool:
        """Read a line, or the end; False at the end."""
        try:
            line = await asyncio.wait_for(self._reader.readline(), LIMIT)
        except TimeoutError:
            self.saw.append("(nothing comes)")
            return False
        except (ConnectionError, ssl.SSLError):
            line = b""
        self._note(line)
        return line != b""

    async def _read_octets(self, size: int) -> bool:
        data = b""
        try:
            data = await asyncio.wait_for(self._reader.readexactly(size), LIMIT)
        except TimeoutError:
            self.saw.append("(nothing comes)")
            return False
        except asyncio.IncompleteReadError as error:
            data = error.partial
        self._note(data)
        return len(data) == size

    def _note(self, data: bytes) -> None:
        if not data:
            self.saw.append("<.")
            return
        text = self.names.line(escaped(data.removesuffix(b"\r\n")))
        self.saw.append(f"< {text}" if data.endswith(b"\r\n") else f"<| {text}")

    async def _finish(self) -> None:
        """End this side and take down what else the server says."""
        if ">!" in self.saw or (self.saw and self.saw[-1] in ("<.", "(nothing comes)")):
            return
        if self._writer.can_write_eof() and not self._writer.transport.is_closing():
            try:
                self._writer.write_eof()
            except OSError:
                pass  # the server closed already
        elif self._writer.get_extra_info("ssl_object"):
            return  # a TLS connection has no half
        while await self._read_line():
            pass
        if self.saw[-1] == "<.":
            self.saw.pop()

    async def _handshake(self, words: Sequence[str]) -> bool:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        for word in words:
            name, _, value = word.partition("=")
            if name == "cert":
                context.load_cert_chain(*self.certificates[value])
            elif name == "alpn":
                context.set_alpn_protocols(value.split(","))
            elif name == "max":
                context.maximum_version = ssl.TLSVersion[f"TLSv{value.replace('.', '_')}"]
        try:
            await asyncio.wait_for(self._writer.start_tls(context, server_hostname="mx.test"), LIMIT)
        except ssl.SSLError as error:
            wanted = [word for word in words if "=" in word]
            alert = re.search(r"(?<=alert ).*?(?= \()", str(error))
            self.saw.append(" ".join(["TLS", *wanted, "fails:", alert[0] if alert else str(error)]))
            return False
        except ConnectionError:
            self.saw.append("TLS fails by an end")
            return False
        self.saw.append(" ".join(["TLS", *words]))
        return True


def escaped(data: bytes) -> str:
    """Octets as a script writes them."""
    return data.decode("latin-1").encode("unicode_escape").decode("ascii")
