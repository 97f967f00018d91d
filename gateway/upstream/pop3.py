"""The server's side of a POP3 conversation up to the login (RFC 1939, RFC 2449, RFC 5034)."""

from __future__ import annotations

from base64 import b64encode
from typing import TYPE_CHECKING, ClassVar

from gateway.protocol import pop3
from gateway.protocol.errors import PeerError
from gateway.protocol.sasl import shows_secret
from gateway.protocol.smtp import Reply
from gateway.stage import SaslStep
from gateway.upstream.connection import mechanism_name
from gateway.upstream.store import Answer, StoreConnection

if TYPE_CHECKING:
    from gateway.observe.transcript import Transcript
    from gateway.relay.wire import Wire
    from gateway.upstream.server import Server

MAX_COMMAND = 255  # octets of a command with its end (RFC 2449 section 4)


class Pop3Connection(StoreConnection):
    """A connection to a POP3 server."""

    __slots__ = ("_lines", "_reader")

    starttls: ClassVar[bytes] = b"STLS"

    def __init__(
        self,
        wire: Wire,
        server: Server,
        *,
        hostname: str,
        command_timeout: float = 300.0,
        transcript: Transcript | None = None,
    ) -> None:
        super().__init__(wire, server, hostname=hostname, command_timeout=command_timeout, transcript=transcript)
        self._reader = pop3.ResponseReader()
        self._lines: tuple[bytes, ...] = ()

    # -- reading

    def _take(self, data: bytes) -> None:
        for response in self._reader.feed(data):
            if self._final is not None:
                raise PeerError("more than one answer")
            if self.transcript is not None:
                self.transcript.from_upstream(b"+ [removed]\r\n" if response.continuation else response.raw)
            if response.continuation:
                self._final = Answer(Reply(334, (response.text,)))
            else:
                self._lines = response.lines
                code = self._code(response.ok, pop3.response_code(response.text))
                self._final = Answer(Reply(code, (response.text,)), response.raw)

    @property
    def _spoke_unasked(self) -> bool:
        return not self._owed and self.wire.buffered > 0

    def _expect(self, line: bytes) -> None:
        if not self.in_exchange:
            self._reader.expect(line == b"CAPA\r\n")

    # -- talking

    @property
    def farewell(self) -> bytes:
        """QUIT."""
        return b"QUIT\r\n"

    async def read_greeting(self, timeout: float) -> Reply:
        """+OK is 220; -ERR is 421 where its code says that it may pass, else 554. Raises UpstreamError."""
        reply = (await self._answer(timeout)).reply
        if reply.code == 334:
            raise self.failed("garbage", "a greeting that is none")
        code = {250: 220, 450: 421}.get(reply.code, 554)
        self.greeting = Reply(code, reply.lines)
        return self.greeting

    async def command(self, line: bytes, *, secret: bool = False, timeout: float | None = None) -> Reply:
        """One command line without its end, and its answer. Raises UpstreamError, LocalError."""
        self._check_command(line)
        secrets = line.split() if secret else ()
        return (await self._say(line + b"\r\n", secret=secret, secrets=secrets, timeout=timeout)).reply

    async def ask_capabilities(self, timeout: float | None = None) -> Reply:
        """CAPA; a server that does not know it has none (RFC 2449). Raises UpstreamError."""
        reply = await self.command(b"CAPA", timeout=timeout)
        if not self.in_exchange:
            self.announced(pop3.parse_capa(self._lines) if reply.code == 250 else {})
        return reply

    # -- logging in

    async def login(self, user: bytes, password: bytes) -> Reply:
        """USER and PASS; AUTH PLAIN where that is announced and USER is not. Raises UpstreamError, LocalError."""
        name, secret = pop3.user_command(user), pop3.pass_command(password)
        if "USER" not in self.extensions and "PLAIN" in self.extensions.get("SASL", "").upper().split():
            return await self.ended(await self.sasl("PLAIN", b"\0" + user + b"\0" + password))
        self.identified()
        reply = (await self._say(name + b"\r\n")).reply
        if reply.code != 250:
            return reply
        return self._logged(await self._say(secret + b"\r\n", secret=True, secrets=(password,)))

    async def sasl(self, mechanism: str, initial: bytes | None) -> SaslStep:
        """AUTH; an initial response that does not fit the line waits for the continuation (RFC 5034 4)."""
        line = b"AUTH " + mechanism_name(mechanism)
        response = b"" if initial is None else b64encode(initial) or b"="
        if initial is not None and shows_secret(mechanism):
            self._hide(initial)
        if response and len(line) + 1 + len(response) + 2 <= MAX_COMMAND:
            return self._sasl_step(await self._say(line + b" " + response + b"\r\n", secret=True, secrets=(response,)))
        step = self._sasl_step(await self._say(line + b"\r\n"))
        return await self.sasl_answer(initial) if step.reply is None and initial is not None else step
