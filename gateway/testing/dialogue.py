r"""Play a dialogue: a plain-text transcript of client, gateway and upstream against a real listener.

A transcript is a YAML head (the pipeline's keys, and `play:` for the player), a line `---`, and the script:

    C: MAIL FROM:<a@example.org>     the client sends this line (CRLF is added)
    C> 'QUIT\n'                      the client sends exactly these bytes (a Python literal)
    S: 250 2.1.0 Ok                  the client reads this line; `*` matches anything
    U< MAIL FROM:<a@example.org>     the upstream reads this line
    U> 250 2.1.0 Ok                  the upstream says this line
    U= ready                         the upstream gets a connection and says 220 and EHLO (`play.ehlo`)
    U= connect | close | reset       ... gets a connection; closes; resets it
    U= closed                        ... sees the gateway close
    U= abandoned                     ... sees it close in the middle of content, without an end of data
    C= close | reset | half          the client closes, resets, shuts down its sending side
    S= closed                        the client sees the end of the connection
    S= quiet                         the gateway has said nothing (checked at the next thing it says)
    -- a comment

`play:` takes `ehlo` (what the upstream announces), `modes` (of plain, bytes, starttls, tls; default plain and
bytes), `tls: true` (a certificate for STARTTLS), `source` (client address, 127.0.0.x). Every wait has a limit;
a mismatch prints what was played and what came instead; a script must be played to its end.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import fnmatch
import socket
import ssl
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

LIMIT = 10.0


class DialogueError(AssertionError):
    """The conversation went another way than its transcript."""


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a script: who (`C`, `S`, `U`), how (`:`, `>`, `<`, `=`), what, and its line in the file."""

    who: str
    how: str
    text: str
    line: int


@dataclass(frozen=True, slots=True)
class Transcript:
    """A parsed transcript."""

    path: Path
    pipeline: Mapping[str, object]
    play: Mapping[str, object]
    steps: tuple[Step, ...]

    @property
    def modes(self) -> list[str]:
        """In which ways it is to be played."""
        modes = self.play.get("modes", ["plain", "bytes"])
        assert isinstance(modes, list)
        return modes


def parse(path: Path) -> Transcript:
    """Read a transcript file. Raises DialogueError for a line that is none of the forms above."""
    head, _, script = path.read_text().partition("\n---\n")
    if not script and head.startswith("---\n"):
        head, script = "", head[4:]
    loaded = yaml.safe_load(head) or {}
    play = loaded.pop("play", {})
    first = head.count("\n") + 3
    steps = []
    for number, line in enumerate(script.splitlines(), first):
        if not line.strip() or line.startswith("--"):
            continue
        if line[:1] not in "CSU" or line[1:2] not in ":<>=":
            raise DialogueError(f"{path.name}:{number}: not a line of a transcript: {line}")
        steps.append(Step(line[0], line[1], line[3:] if len(line) > 2 else "", number))
    return Transcript(path, loaded, play, tuple(steps))


@dataclass
class Upstream:
    """The scripted upstream: connections wait in a queue until the script takes them."""

    ehlo: list[str]
    queue: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=asyncio.Queue)
    server: asyncio.Server | None = None
    reader: asyncio.StreamReader | None = None
    writer: asyncio.StreamWriter | None = None
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def start(self) -> int:
        """Listen; the port."""
        self.server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        return int(self.server.sockets[0].getsockname()[1])

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        await self.queue.put((reader, writer))

    def stop(self) -> None:
        """Close everything."""
        assert self.server is not None
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()


class Player:
    """Plays one transcript against the listener at `port`, whose upstream is `upstream`."""

    def __init__(self, transcript: Transcript, port: int, upstream: Upstream, mode: str = "plain") -> None:
        self.transcript = transcript
        self.port = port
        self.upstream = upstream
        self.mode = mode
        self.played: list[str] = []
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def play(self) -> None:
        """The whole script. Raises DialogueError."""
        source = self.transcript.play.get("source")
        local = (str(source), 0) if source else None
        context = _client_context() if self.mode == "tls" else None
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=local, ssl=context)
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        steps = list(self.transcript.steps)
        try:
            if self.mode == "starttls":
                await self._start_tls()
                steps = steps[1:]  # the greeting
            for step in steps:
                await self._step(step)
            if self.upstream.queue.qsize():
                raise DialogueError("the gateway opened an upstream connection that the script does not know")
        except (TimeoutError, DialogueError, ConnectionError, asyncio.IncompleteReadError) as error:
            raise DialogueError(self._explained(error)) from None
        finally:
            self.writer.transport.abort()

    async def _step(self, step: Step) -> None:
        async with asyncio.timeout(LIMIT):
            match step.who + step.how:
                case "C:":
                    await self._send(step.text.encode("utf-8", "surrogateescape") + b"\r\n")
                case "C>":
                    await self._send(_literal(step.text))
                case "S:":
                    self._expect(step, await self.reader.readline(), "S")
                case "U<":
                    assert self.upstream.reader is not None
                    self._expect(step, await self.upstream.reader.readline(), "U")
                case "U>":
                    assert self.upstream.writer is not None
                    text = step.text
                    data = _literal(text) if text[:2] in ("b'", 'b"', "'\\") else text.encode() + b"\r\n"
                    self.upstream.writer.write(data)
                    await self.upstream.writer.drain()
                case _:
                    await self._event(step)
        self.played.append(f"{step.who}{step.how} {step.text}")

    async def _event(self, step: Step) -> None:
        upstream = self.upstream
        match step.who, step.text:
            case "U", "connect":
                upstream.reader, upstream.writer = await upstream.queue.get()
            case "U", "ready":
                await self._upstream_ready(step)
            case "U", "close":
                assert upstream.writer is not None
                upstream.writer.close()
            case "U", "reset":
                assert upstream.writer is not None
                _reset(upstream.writer)
            case "U", "closed":
                assert upstream.reader is not None
                self._expect_end(step, await _rest(upstream.reader))
            case "U", "abandoned":
                assert upstream.reader is not None
                rest = await _rest(upstream.reader)
                if rest.endswith(b".\r\n"):
                    raise DialogueError(f"line {step.line}: the upstream got an end of data: {rest!r}")
            case "C", "close":
                self.writer.close()
            case "C", "half":
                self.writer.write_eof()
            case "C", "reset":
                _reset(self.writer)
            case "S", "closed":
                self._expect_end(step, await _rest(self.reader))
            case "S", "quiet":
                if self.reader._buffer:  # type: ignore[attr-defined]
                    raise DialogueError(f"line {step.line}: the gateway spoke: {self.reader._buffer!r}")  # type: ignore[attr-defined]
            case _:
                raise DialogueError(f"line {step.line}: unknown event {step.who}= {step.text}")

    async def _upstream_ready(self, step: Step) -> None:
        upstream = self.upstream
        upstream.reader, upstream.writer = await upstream.queue.get()
        upstream.writer.write(b"220 upstream.test ESMTP\r\n")
        self._expect(Step("U", "<", "EHLO *", step.line), await upstream.reader.readline(), "U")
        lines = ["upstream.test", *upstream.ehlo]
        upstream.writer.write(
            "".join(f"250{'-' if index < len(lines) - 1 else ' '}{line}\r\n" for index, line in enumerate(lines)).encode()
        )

    async def _send(self, data: bytes) -> None:
        if self.mode == "bytes":
            for index in range(len(data)):
                self.writer.write(data[index : index + 1])
                await asyncio.sleep(0)
        else:
            self.writer.write(data)
        await self.writer.drain()

    async def _start_tls(self) -> None:
        """Greeting, EHLO, STARTTLS and the handshake, which the script does not show."""
        async with asyncio.timeout(LIMIT):
            await self.reader.readline()
            self.writer.write(b"EHLO starttls.test\r\n")
            while (await self.reader.readline())[3:4] == b"-":
                pass
            self.writer.write(b"STARTTLS\r\n")
            answer = await self.reader.readline()
            if not answer.startswith(b"220"):
                raise DialogueError(f"STARTTLS: {answer!r}")
            await self.writer.start_tls(_client_context())

    def _expect(self, step: Step, got: bytes, who: str) -> None:
        text = got.decode("utf-8", "backslashreplace")
        if text.endswith("\r\n"):
            text = text[:-2]
        elif text:
            text = f"{text!r} (no CRLF)"
        if step.text == text or fnmatch.fnmatchcase(text, _pattern(step.text)):
            return
        raise DialogueError(f"line {step.line}: {who} should be  {step.text!r}\n         but was     {text!r}")

    def _expect_end(self, step: Step, rest: bytes) -> None:
        if rest:
            raise DialogueError(f"line {step.line}: the end was due, but there came {rest!r}")

    def _explained(self, error: BaseException) -> str:
        name = f"{self.transcript.path.name} ({self.mode})"
        told = str(error) or f"{type(error).__name__} at step {len(self.played) + 1}"
        return f"{name}: {told}\nplayed so far:\n  " + "\n  ".join(self.played)


def _pattern(text: str) -> str:
    """Only `*` is special."""
    return text.replace("[", "[[]").replace("?", "[?]")


def _literal(text: str) -> bytes:
    value = ast.literal_eval(text if text.startswith("b") else f"b{text}")
    assert isinstance(value, bytes)
    return value


async def _rest(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(-1)
    except ConnectionError:
        return b""


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _client_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
