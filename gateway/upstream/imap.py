"""The server's side of an IMAP conversation up to the login (RFC 3501, RFC 9051)."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from gateway.protocol import imap
from gateway.protocol.errors import PeerError
from gateway.protocol.sasl import shows_secret
from gateway.protocol.smtp import Reply
from gateway.stage import SaslStep
from gateway.upstream.connection import NO_MECHANISM, UpstreamError, mechanism_name
from gateway.upstream.store import Answer, StoreConnection

if TYPE_CHECKING:
    from gateway.observe.transcript import Transcript
    from gateway.relay.wire import Wire
    from gateway.upstream.server import Server

MAX_LINE = 8192  # octets of a command (RFC 7162 section 4)
MAX_UNTAGGED = 65536  # octets of untagged responses to one command
SAID_IN_GREETING = Reply.of("250 said in the greeting")
BUSY = frozenset(("UNAVAILABLE", "LIMIT", "IN-USE"))


class ImapConnection(StoreConnection):
    """A connection to an IMAP server.

    `client_tag` is the tag of the login command, so that its answer is one to the client's command; ours without.
    """

    __slots__ = ("_last", "_number", "_reader", "_size", "_tag", "_untagged")

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
        self._reader = imap.ResponseReader()
        self._untagged: list[imap.Response] = []
        self._last: imap.Response | None = None
        self._size = 0
        self._number = 0
        self._tag = b"*"  # of the command whose answer is owed; the greeting has none

    # -- reading

    def _take(self, data: bytes) -> None:
        """A tagged response, a continuation or BYE ends an answer; any number of untagged ones may stand before it."""
        for response in self._reader.feed(data):
            self._show(response)
            self._last = response
            if response.tag == b"*" and self._tag != b"*" and response.status != "BYE":
                self._untagged.append(response)
                self._size += len(response.raw)
                if self._size > MAX_UNTAGGED:
                    raise PeerError("untagged responses without an end")
            elif response.tag == b"+":
                self._final = Answer(Reply(334, (response.text,)))
            elif response.tag in (b"*", self._tag):
                raw = b"".join(untagged.raw for untagged in self._untagged) + response.raw
                self._final = Answer(self._as_reply(response), raw)
            else:
                raise PeerError("an answer to a command that was not sent")

    def _show(self, response: imap.Response) -> None:
        if self.transcript is not None:
            self.transcript.from_upstream(b"+ [removed]\r\n" if response.tag == b"+" else response.raw)

    def _as_reply(self, response: imap.Response) -> Reply:
        """The text keeps its response code."""
        word = response.code.split(b" ", 1)[0].decode("ascii", "replace")
        text = b"[%b] %b" % (response.code, response.text) if response.code else response.text
        match response.status:
            case "OK" | "NO":
                code = self._code(response.status == "OK", word)
            case "BYE":
                code = 421
            case _:
                code = 500
        return Reply(code, (text,))

    @property
    def _spoke_unasked(self) -> bool:
        """Untagged responses come when they like; an answer before the command is none."""
        came = self.wire.peek(self.wire.buffered)
        return not self.in_exchange and any(line and line[:1] != b"*" for line in came.split(b"\n"))

    def hand_over(self) -> None:
        """And its last responses."""
        super().hand_over()
        self._untagged.clear()
        self._last = None

    def _expect(self, line: bytes) -> None:
        if not self.in_exchange:
            self._untagged = []
            self._size = 0

    # -- talking

    def _next_tag(self) -> bytes:
        self._number += 1
        self._tag = b"g%d" % self._number
        return self._tag

    @property
    def farewell(self) -> bytes:
        """LOGOUT."""
        return self._next_tag() + b" LOGOUT\r\n"

    async def read_greeting(self, timeout: float) -> Reply:
        """OK is 220, with its capabilities if it has some. Raises UpstreamError, also for PREAUTH."""
        reply = (await self._answer(timeout)).reply
        response = self._last
        if response is None or response.status not in ("OK", "BYE", "PREAUTH"):
            raise self.failed("garbage", "a greeting that is none")
        if response.status == "PREAUTH":
            # Whoever is logged in there, it is not our client; and TLS could not begin any more.
            raise self.failed("down", "PREAUTH: the server takes the gateway for somebody who is logged in already")
        if response.status == "BYE":
            word = response.code.split(b" ", 1)[0].decode("ascii", "replace").upper()
            self.greeting = Reply(421 if word in BUSY else 554, reply.lines)
            return self.greeting
        capabilities = _said_in_greeting(response) if self.assumed is None else None
        if capabilities is not None:
            self.announced(capabilities)
        self.greeting = Reply(220, reply.lines)
        return self.greeting

    async def command(self, line: bytes, *, secret: bool = False, timeout: float | None = None) -> Reply:
        """One command line without tag and end, and its answer. Raises UpstreamError, LocalError."""
        self._check_command(line)
        secrets = line.split() if secret else ()
        answer = await self._say(self._next_tag() + b" " + line + b"\r\n", secret=secret, secrets=secrets,
                                 timeout=timeout)  # fmt: skip
        return answer.reply

    async def ask_capabilities(self, timeout: float | None = None) -> Reply:
        """CAPABILITY, unless the greeting said it already. Raises UpstreamError."""
        if self.ehlo is not None:
            return SAID_IN_GREETING
        reply = await self.command(b"CAPABILITY", timeout=timeout)
        if reply.code == 421:
            return reply
        capabilities: dict[str, str] = {}
        for response in self._untagged:
            capabilities = imap.capabilities_of(response) or capabilities
        self.announced(capabilities)
        return reply

    # -- logging in

    async def login(self, user: bytes, password: bytes, *, tag: bytes = b"") -> Reply:
        """LOGIN; AUTHENTICATE PLAIN where LOGIN is disabled; 504 where neither will do.

        Literals where a quoted string cannot carry a value, and for both where nothing is known of the server. Raises
        UpstreamError, LocalError.
        """
        imap.check_login(user)
        imap.check_login(password)
        if tag:
            self.client_tag = tag
        known = self.extensions
        if "LOGINDISABLED" in known:
            if "PLAIN" not in known.get("AUTH", "").split():
                return NO_MECHANISM
            return await self.ended(await self.sasl("PLAIN", b"\0" + user + b"\0" + password))
        plus = "LITERAL+" in known or "LITERAL-" in known
        self._tag = self.client_tag or self._next_tag()
        first, *rest = imap.login_steps(self._tag, user, password, literal_plus=plus, literals=not known)
        secrets = (password, imap.quoted(password) or b"")
        answer = await self._say(first, secret=True, secrets=secrets)
        for piece in rest:
            if answer.reply.code != 334:
                break
            answer = await self._say(piece, secret=True, secrets=secrets)
        if answer.reply.code == 334:
            raise self._asks_for_more()
        return self._logged(answer)

    def _asks_for_more(self) -> UpstreamError:
        return self.failed("garbage", "LOGIN: asks for more than a user and a password")

    async def sasl(self, mechanism: str, initial: bytes | None) -> SaslStep:
        """AUTHENTICATE; the initial response goes along where SASL-IR is announced (RFC 4959)."""
        name = mechanism_name(mechanism)
        self._tag = self.client_tag or self._next_tag()
        line = self._tag + b" AUTHENTICATE " + name
        response = b"" if initial is None else b64encode(initial) or b"="
        if initial is not None and shows_secret(mechanism):
            self._hide(initial)
        along = bool(response) and "SASL-IR" in self.extensions and len(line) + len(response) + 3 <= MAX_LINE
        if along:
            return self._sasl_step(await self._say(line + b" " + response + b"\r\n", secret=True, secrets=(response,)))
        step = self._sasl_step(await self._say(line + b"\r\n"))
        return await self.sasl_answer(initial) if step.reply is None and initial is not None else step


@lru_cache(maxsize=32)
def _said_in_greeting(response: imap.Response) -> Mapping[str, str] | None:
    """Its capabilities: a server greets every session with the same words."""
    return imap.capabilities_of(response)
