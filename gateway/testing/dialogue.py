r"""Play a dialogue: a plain-text transcript of client, gateway and upstream against a real listener.

A transcript is a YAML head (the pipeline's keys, and `play:` for the player), a line `---`, and the script:

    C: MAIL FROM:<a@example.org>     the client sends this line (CRLF is added)
    C> 'QUIT\n'                      the client sends exactly these bytes (a Python literal; + and * may join several)
    S: 250 2.1.0 Ok                  the client reads this line; `*` matches anything
    S= 250                           the client reads a whole reply with this code, whatever its lines say
    U< MAIL FROM:<a@example.org>     the upstream reads this line
    U> 250 2.1.0 Ok                  the upstream says this line (bytes, if it is a literal)
    U= ready                         the upstream gets a connection, says 220 and answers EHLO (`play.ehlo`); an IMAP or
                                     POP3 one only greets
    U= connect | close | reset       ... gets a connection; closes; resets it
    U= closed                        ... sees the gateway close
    U= abandoned                     ... sees it close in the middle of content, without an end of data
    U= down                          ... listens no more
    C= close | reset | half          the client closes, resets, shuts down its sending side
    C= again                         the client, which saw the end (S= closed), connects anew
    C= starttls                      the client's TLS handshake
    C= cram-md5 USER PASSWORD        the client answers the challenge (334) that it read last
    C= apop USER PASSWORD            the client says APOP to the timestamp in the line that it read last
    S= closed                        the client sees the end of the connection, and closes too
    S= quiet                         the gateway has said nothing (checked at the next thing it says)
    G= stop                          the gateway is told to stop
    -- a comment

`V` is a second upstream, and `{base64:text}` in a line stands for the base64 of a text with Python's escapes.

`play:` takes `ehlo` (what the upstreams announce), `assume` (what the gateway believes that they announce), `modes`
(of MODES; default plain and bytes), `tls: true` (a certificate for STARTTLS), `source` (client address, 127.0.0.x),
`preface` (what goes before everything, TLS too: a literal), `certificate: true` (the client has one), `client: lmtp`
and `upstream: lmtp` (or `{V: lmtp}`: a single one) for who speaks LMTP, `client: imap` or `pop3` for stores.
Every wait has a limit; a mismatch prints what was played and what came instead; a script must be played to its end.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import fnmatch
import hashlib
import hmac
import re
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

LIMIT = 10.0
MODES = ("plain", "bytes", "starttls", "tls", "asyncio")
"""In clear; each octet written by itself; under STARTTLS; under implicit TLS; in clear on asyncio's own loop."""

GREETINGS = {"imap": b"* OK upstream.test ready\r\n", "pop3": b"+OK upstream.test ready\r\n"}
"""What a store's upstream says first."""

_BASE64 = re.compile(r"\{base64:(.*?)\}")


class DialogueError(AssertionError):
    """The conversation went another way than its transcript."""


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a script: who (`C`, `S`, `U`, `V`, `G`), how (`:`, `>`, `<`, `=`), what, and its line in the file."""

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

    def protocol(self, who: str) -> str:
        """What the client (`C`) or an upstream (`U`, `V`) speaks: smtp or lmtp."""
        client = self.play.get("client", "smtp")
        spoken = client if who == "C" else self.play.get("upstream", client if client in ("imap", "pop3") else "smtp")
        return str(spoken.get(who, "smtp") if isinstance(spoken, Mapping) else spoken)


def parse(path: Path) -> Transcript:
    """Read a transcript file. Raises DialogueError for a line or a mode that is none of the above."""
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
        if line[:1] not in "CSUVG" or line[1:2] not in ":<>=":
            raise DialogueError(f"{path.name}:{number}: not a line of a transcript: {line}")
        text = _BASE64.sub(_encoded, line[3:]) if len(line) > 2 else ""
        steps.append(Step(line[0], line[1], text, number))
    transcript = Transcript(path, loaded, play, tuple(steps))
    for mode in transcript.modes:
        if mode not in MODES:
            raise DialogueError(f"{path.name}: no mode {mode!r}")
    return transcript


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

    def down(self) -> None:
        """Listen no more."""
        assert self.server is not None
        self.server.close()

    def stop(self) -> None:
        """Close everything."""
        self.down()
        for writer in self.writers:
            writer.transport.abort()


class Player:
    """Plays one transcript against the listener at `port`.

    `upstream` is U, or a mapping of U and V. `stop` is what `G= stop` runs, beside the script; `certificate` a PEM
    file with the client's certificate and key.
    """

    def __init__(
        self,
        transcript: Transcript,
        port: int,
        upstream: Upstream | Mapping[str, Upstream],
        mode: str = "plain",
        *,
        stop: Callable[[], Awaitable[None]] | None = None,
        certificate: Path | None = None,
    ) -> None:
        self.transcript = transcript
        self.port = port
        self.upstreams = {"U": upstream} if isinstance(upstream, Upstream) else dict(upstream)
        self.mode = mode
        self.stop = stop
        self.context = _client_context(certificate)
        self.played: list[str] = []
        self.last = b""  # what the client read last
        self.stopping: asyncio.Future[None] | None = None
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def play(self) -> None:
        """The whole script. Raises DialogueError."""
        await self._connect()
        steps = list(self.transcript.steps)
        try:
            if self.mode == "starttls":
                await self._start_tls()
                steps = steps[1:]  # the greeting
            for step in steps:
                await self._step(step)
            for upstream in self.upstreams.values():
                if upstream.queue.qsize():
                    raise DialogueError("the gateway opened an upstream connection that the script does not know")
        except (TimeoutError, DialogueError, ConnectionError, asyncio.IncompleteReadError) as error:
            raise DialogueError(self._explained(error)) from None
        finally:
            self.writer.transport.abort()
            if self.stopping is not None:
                await self.stopping

    async def _connect(self) -> None:
        play = self.transcript.play
        source = play.get("source")
        local = (str(source), 0) if source else None
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port, local_addr=local)
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        preface = play.get("preface")
        if preface:
            await self._send(_literal(str(preface)))
        if self.mode == "tls":
            async with asyncio.timeout(LIMIT):
                await self.writer.start_tls(self.context)

    async def _step(self, step: Step) -> None:
        async with asyncio.timeout(LIMIT):
            match step.who + step.how:
                case "C:":
                    await self._send(step.text.encode("utf-8", "surrogateescape") + b"\r\n")
                case "C>":
                    await self._send(_literal(step.text))
                case "S:":
                    self.last = await self.reader.readline()
                    self._expect(step, self.last, "S")
                case "U<" | "V<":
                    reader = self.upstreams[step.who].reader
                    assert reader is not None
                    self._expect(step, await reader.readline(), step.who)
                case "U>" | "V>":
                    writer = self.upstreams[step.who].writer
                    assert writer is not None
                    text = step.text
                    writer.write(_literal(text) if text[:1] in "'\"" else text.encode() + b"\r\n")
                    await writer.drain()
                case "U=" | "V=":
                    await self._upstream_event(step, self.upstreams[step.who])
                case _:
                    await self._event(step)
        self.played.append(f"{step.who}{step.how} {step.text}")

    async def _event(self, step: Step) -> None:
        match step.who, *step.text.split(" "):
            case "C", "close":
                self.writer.close()
            case "C", "half":
                self.writer.write_eof()
            case "C", "reset":
                _reset(self.writer)
            case "C", "again":
                await self._connect()
            case "C", "starttls":
                await self.writer.start_tls(self.context)
            case "C", "cram-md5", user, password:
                challenge = base64.b64decode(self.last.removeprefix(b"334 ").removeprefix(b"+ "))
                digest = hmac.digest(password.encode(), challenge, "md5").hex()
                await self._send(base64.b64encode(f"{user} {digest}".encode()) + b"\r\n")
            case "C", "apop", user, password:
                timestamp = self.last[self.last.rindex(b"<") :].strip()
                digest = hashlib.md5(timestamp + password.encode(), usedforsecurity=False).hexdigest()
                await self._send(f"APOP {user} {digest}\r\n".encode())
            case "S", "closed":
                self._expect_end(step, await _rest(self.reader))
                self.writer.close()
            case "S", "quiet":
                if self.reader._buffer:  # type: ignore[attr-defined]
                    raise DialogueError(f"line {step.line}: the gateway spoke: {self.reader._buffer!r}")  # type: ignore[attr-defined]
            case "S", code if len(code) == 3 and code.isdigit():
                separator = "-"
                while separator == "-":
                    self.last = await self.reader.readline()
                    separator = self.last[3:4].decode("ascii", "replace")
                    self._expect(Step("S", ":", f"{code}{separator}*", step.line), self.last, "S")
            case "G", "stop":
                assert self.stop is not None
                self.stopping = asyncio.ensure_future(self.stop())
            case _:
                raise DialogueError(f"line {step.line}: unknown event {step.who}= {step.text}")

    async def _upstream_event(self, step: Step, upstream: Upstream) -> None:
        match step.text:
            case "connect":
                upstream.reader, upstream.writer = await upstream.queue.get()
            case "ready":
                await self._upstream_ready(step, upstream)
            case "down":
                upstream.down()
            case "close" | "reset":
                assert upstream.writer is not None
                upstream.writer.close() if step.text == "close" else _reset(upstream.writer)
            case "closed":
                assert upstream.reader is not None and upstream.writer is not None
                self._expect_end(step, await _rest(upstream.reader))
                upstream.writer.close()
            case "abandoned":
                assert upstream.reader is not None and upstream.writer is not None
                rest = b"\r\n" + await _rest(upstream.reader)
                if rest.endswith(b"\r\n.\r\n"):
                    raise DialogueError(f"line {step.line}: the upstream got an end of data: {rest!r}")
                upstream.writer.close()
            case _:
                raise DialogueError(f"line {step.line}: unknown event {step.who}= {step.text}")

    async def _upstream_ready(self, step: Step, upstream: Upstream) -> None:
        upstream.reader, upstream.writer = await upstream.queue.get()
        protocol = self.transcript.protocol(step.who)
        if protocol in GREETINGS:
            upstream.writer.write(GREETINGS[protocol])
            return
        upstream.writer.write(b"220 upstream.test ESMTP\r\n")
        hello = _hello(self.transcript.protocol(step.who))
        self._expect(Step(step.who, "<", f"{hello} *", step.line), await upstream.reader.readline(), step.who)
        *lines, last = "upstream.test", *upstream.ehlo
        upstream.writer.write("".join([*(f"250-{line}\r\n" for line in lines), f"250 {last}\r\n"]).encode())

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
        protocol = self.transcript.protocol("C")
        async with asyncio.timeout(LIMIT):
            await self.reader.readline()
            if protocol in GREETINGS:
                self.writer.write(b"t0 STARTTLS\r\n" if protocol == "imap" else b"STLS\r\n")
                answer = await self.reader.readline()
                if not answer.startswith((b"t0 OK", b"+OK")):
                    raise DialogueError(f"STARTTLS: {answer!r}")
                await self.writer.start_tls(self.context)
                return
            self.writer.write(f"{_hello(self.transcript.protocol('C'))} starttls.test\r\n".encode())
            while (await self.reader.readline())[3:4] == b"-":
                pass
            self.writer.write(b"STARTTLS\r\n")
            answer = await self.reader.readline()
            if not answer.startswith(b"220"):
                raise DialogueError(f"STARTTLS: {answer!r}")
            await self.writer.start_tls(self.context)

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
        next_step = self.transcript.steps[min(len(self.played), len(self.transcript.steps) - 1)]
        told = str(error) or f"line {next_step.line}: {type(error).__name__}"
        return f"{name}: {told}\nplayed so far:\n  " + "\n  ".join(self.played)


def _hello(protocol: str) -> str:
    return "LHLO" if protocol == "lmtp" else "EHLO"


def _pattern(text: str) -> str:
    """Only `*` is special."""
    return text.replace("[", "[[]").replace("?", "[?]")


def _encoded(match: re.Match[str]) -> str:
    return base64.b64encode(_literal("'" + match[1].replace("'", r"\'") + "'")).decode()


def _literal(text: str) -> bytes:
    """The octets of Python literals joined by `+` and repeated by `*`."""

    def value(node: ast.expr) -> bytes:
        match node:
            case ast.Constant(value=bytes(data)):
                return data
            case ast.Constant(value=str(data)):
                return data.encode("latin-1")
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=ast.Constant(value=int(count))):
                return value(left) * count
        raise DialogueError(f"not a literal: {text}")

    return value(ast.parse(text, mode="eval").body)


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


def _client_context(certificate: Path | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if certificate is not None:
        context.load_cert_chain(certificate)
    return context
