"""What connections to mail stores, IMAP and POP3, have in common: one command at a time, a login, its answer.

Answers are read line by line, so that what a server says behind the answer to the login stays in the wire, for the
client.
"""

from __future__ import annotations

from abc import abstractmethod
from base64 import b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.observe.logs import SHORT_SECRET
from gateway.observe.transcript import without
from gateway.protocol.errors import LocalError
from gateway.protocol.smtp import Ehlo, Reply
from gateway.stage import SaslStep
from gateway.upstream.connection import Expect, UpstreamConnection, UpstreamError, check_line

if TYPE_CHECKING:
    from gateway.observe.transcript import Transcript
    from gateway.relay.wire import Wire
    from gateway.upstream.server import Server

ASSUMED = Reply.of("250 capabilities are assumed")
TEMPORARY = frozenset(("UNAVAILABLE", "SYS/TEMP", "IN-USE", "LIMIT", "SERVERBUG", "LOGIN-DELAY"))
"""Response codes of refusals that are no verdict on the login (RFC 5530, RFC 2449, RFC 3206)."""

_SASL_CODES = {250: 235, 550: 535, 450: 454, 500: 501}


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a command: as an SMTP reply, and its octets; a continuation (334) has none."""

    reply: Reply
    raw: bytes = b""


class StoreConnection(UpstreamConnection):
    """A connection to an IMAP or POP3 server.

    It is never reused, since it exists for one login. `assumed`: capabilities that are believed, so that the server
    is not asked; None asks.
    """

    __slots__ = ("_final", "_owed", "assumed")

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
        self.reusable = False
        self.assumed: dict[str, str] | None = None
        self._owed = True  # the greeting
        self._final: Answer | None = None

    # -- what a protocol adds

    @abstractmethod
    async def ask_capabilities(self, timeout: float | None = None) -> Reply:
        """Ask what the server can do; the answer to the question. Raises UpstreamError."""

    @abstractmethod
    def _expect(self, line: bytes) -> None:
        """This command goes out now."""

    @property
    @abstractmethod
    def _spoke_unasked(self) -> bool:
        """Whether something came that would be taken for the next answer."""

    # -- one command at a time

    @property
    def between_commands(self) -> bool:
        """No answer is owed, and no exchange is under way."""
        return not (self._owed or self.in_exchange)

    @property
    def _beyond_words(self) -> bool:
        return super()._beyond_words or self._owed

    @property
    def _answered(self) -> bool:
        return self._final is not None

    async def _next_bytes(self) -> bytes:
        data = await self.wire.read()
        end = data.find(b"\n") + 1
        if 0 < end < len(data):
            self.wire.unread(data[end:])
            return data[:end]
        return data

    async def _answer(self, timeout: float | None) -> Answer:
        """The answer that is owed, with secrets removed. Raises UpstreamError."""
        if self._fault is not None:
            raise self._fault
        await self._read(self.command_timeout if timeout is None else timeout)
        final, self._final = self._final, None
        assert final is not None
        self._owed = False
        reply = final.reply
        self.in_exchange = reply.code == 334
        if reply.code == 421:
            self.closing = True
        if self._secrets:
            reply = Reply(reply.code, tuple(without(line, self._secrets) for line in reply.lines))
            return Answer(reply, final.raw)  # which is for the client alone, to the octet
        return final

    async def _say(
        self, line: bytes, *, secret: bool = False, secrets: Iterable[bytes] = (), timeout: float | None = None
    ) -> Answer:
        """Send one command, or the next part of one, with its end, and read the answer. Raises UpstreamError.

        `secret` keeps the line out of the transcript; `secrets` are those in it, which no answer may repeat.
        """
        if self._fault is None and self._spoke_unasked:
            self.unasked()
        if self._fault is not None:
            raise self._fault
        if self._owed:
            raise LocalError("something to say while an answer is owed")
        self._secrets += [word for word in secrets if len(word) >= SHORT_SECRET]
        self._expect(line)
        self._owed = True
        if self.transcript is not None:
            if secret:
                self.transcript.to_upstream_secret(b" ".join(secrets))
            else:
                self.transcript.to_upstream(line)
        self.wire.write(line)
        return await self._answer(timeout)

    def _check_command(self, line: bytes) -> None:
        """Raise LocalError for what is no line, and inside an exchange, where it would be taken for an answer."""
        check_line(line)
        if self.in_exchange and self._fault is None:
            raise LocalError("a command inside an exchange")

    def unasked(self) -> UpstreamError:
        """What a server said out of turn."""
        return self.failed("garbage", "sent an answer to nothing")

    # -- capabilities

    async def hello(self, name: str = "", *, esmtp: bool = True, timeout: float | None = None) -> Reply:
        """Ask what the server can do, unless that is believed; nobody is introduced here."""
        if self.assumed is None:
            return await self.ask_capabilities(timeout)
        self.extensions = dict(self.assumed)
        self.greeted = True
        return ASSUMED

    def announced(self, capabilities: Mapping[str, str]) -> None:
        """The server said what it can do."""
        self.extensions = dict(capabilities)
        self.ehlo = Ehlo(self.server.target.host, dict(capabilities))
        self.greeted = True

    def forget_hello(self) -> None:
        """What was said before TLS counts no more (RFC 3501 6.2.1, RFC 2595 4)."""
        self.ehlo = None
        self.extensions = {}
        self.greeted = False

    def before_mail(self, line: bytes, expect: Expect | None = None) -> None:
        """There is no mail to go before."""
        raise LocalError(f"no mail is sent to a {self.protocol} server")

    # -- SASL

    async def sasl_answer(self, data: bytes) -> SaslStep:
        """One line of base64."""
        encoded = b64encode(data)
        return self._sasl_step(await self._say(encoded + b"\r\n", secret=True, secrets=(encoded,)))

    async def sasl_cancel(self) -> SaslStep:
        """`*` (RFC 3501 6.2.2, RFC 5034 4)."""
        return self._sasl_step(await self._say(b"*\r\n"))

    def _sasl_step(self, answer: Answer) -> SaslStep:
        self._logged(answer)
        reply = answer.reply
        return self._step(Reply(_SASL_CODES.get(reply.code, reply.code), reply.lines))

    def _logged(self, answer: Answer) -> Reply:
        """The answer to a login, or to a part of one."""
        self.identified()
        if answer.reply.code == 250:
            self.logged_in = True
            self.login_answer = answer.raw
        return answer.reply

    @staticmethod
    def _code(ok: bool, response_code: str) -> int:
        """The SMTP code of a success or refusal."""
        return 250 if ok else 450 if response_code.upper() in TEMPORARY else 550
