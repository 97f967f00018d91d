"""What connections to upstream servers have in common, whatever protocol they speak.

A connection ends through `quit`, `end_quietly`, `abort` or the prelude's `give_back`; each gives its place in the pool
back, once. What went wrong once, every later wait gets too.
"""

from __future__ import annotations

import asyncio
import binascii
import ipaddress
import re
from abc import ABC, abstractmethod
from base64 import b64decode
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, ClassVar, Literal

from gateway.observe.redaction import SHORT_SECRET
from gateway.protocol.errors import LocalError, PeerError
from gateway.protocol.smtp import Ehlo, Reply
from gateway.relay.wire import Wire, WireTimeout
from gateway.stage import SaslStep

if TYPE_CHECKING:
    from gateway.observe.transcript import Transcript
    from gateway.upstream.pool import Pool
    from gateway.upstream.server import Server

Kind = Literal["down", "lost", "busy", "garbage", "tls", "timeout"]
Expect = Callable[[Reply], None]

QUIT_SECONDS = 2.0
_BEARER = re.compile(rb"(?i)auth=bearer +([!-~]+)")
NO_MECHANISM = Reply.of("504 5.5.4 the server offers no way to log in with a password")
_ending: set[asyncio.Task[None]] = set()


class UpstreamError(Exception):
    """An upstream server failed us; `kind` says how, `server` is its URL. The text is for logs only.

    `reply` is the server's own, where it refused in words.
    """

    def __init__(self, kind: Kind, server: str, text: str, reply: Reply | None = None) -> None:
        super().__init__(f"{server}: {text}" if server else text)
        self.reply = reply
        self.kind: Kind = kind
        self.server = server
        self.text = text


class UpstreamConnection(ABC):
    """A connection to an upstream server; what stages see of it is `gateway.stage.Peer`.

    `tls`: encrypted as the pool demands it (required, and verified unless `verify: false`), so that credentials may
    pass; `encrypted`: encrypted somehow. `ehlo` is what the server last announced, in the form of an EHLO (IMAP and
    POP3: capabilities), None where nothing was asked; `extensions` what is believed of it now, `greeted` whether the
    conversation may go on. `reusable`: no later session is hindered by what was said; `speaks_for_client`: the server
    was told who the client is; `logged_in`: somebody is; `in_exchange`: the server waits for a SASL message.
    `closing`: of no further use (421, BYE, out of step, lost). `on_end` is called once when the connection ends or is
    put aside. Stores: `login_answer` is the octets of the answer to a login that succeeded, which are the client's;
    IMAP: `client_tag` is what the login command is to be tagged with.
    """

    __slots__ = (
        "_fault", "_secrets", "client_tag", "closing", "command_timeout", "ehlo", "encrypted", "extensions", "greeted",
        "greeting", "hostname", "idle_timer", "in_exchange", "logged_in", "login_answer", "on_end", "pool", "reusable",
        "server", "speaks_for_client", "tls", "transcript", "wire",
    )  # fmt: skip

    starttls: ClassVar[bytes] = b"STARTTLS"  # keyword and command
    starttls_code: ClassVar[int] = 250

    def __init__(
        self,
        wire: Wire,
        server: Server,
        *,
        hostname: str,
        command_timeout: float = 300.0,
        transcript: Transcript | None = None,
    ) -> None:
        self.wire = wire
        self.server = server
        self.hostname = hostname
        self.command_timeout = command_timeout
        self.transcript = transcript
        self.pool: Pool | None = None
        self.on_end: Callable[[], None] | None = None
        self.idle_timer: asyncio.TimerHandle | None = None
        self.greeting: Reply | None = None
        self.ehlo: Ehlo | None = None
        self.extensions: dict[str, str] = {}
        self.greeted = False
        self.encrypted = False
        self.tls = False
        self.reusable = True
        self.speaks_for_client = False
        self.logged_in = False
        self.in_exchange = False
        self.login_answer = b""
        self.client_tag = b""
        self.closing = False
        self._fault: UpstreamError | None = None
        self._secrets: list[bytes] = []

    # -- what a protocol adds

    @abstractmethod
    async def read_greeting(self, timeout: float) -> Reply:
        """The greeting, as SMTP would say it: 220, 421 for a server that is busy, 5xx. Raises UpstreamError."""

    @abstractmethod
    async def command(self, line: bytes, *, secret: bool = False, timeout: float | None = None) -> Reply:
        """One command line (without its end) and its reply; secrets are kept out of the transcript and the reply.

        Raises UpstreamError; LocalError for CR, LF or NUL in the line.
        """

    @abstractmethod
    async def hello(self, name: str = "", *, esmtp: bool = True, timeout: float | None = None) -> Reply:
        """Ask what the server announces, in SMTP by introducing ourselves. Raises UpstreamError, LocalError."""

    @abstractmethod
    def forget_hello(self) -> None:
        """What the server announced counts no more."""

    @abstractmethod
    def before_mail(self, line: bytes, expect: Expect | None = None) -> None:
        """A command to go with the next MAIL; LocalError where there is none."""

    @abstractmethod
    async def sasl(self, mechanism: str, initial: bytes | None) -> SaslStep:
        """Begin an exchange; the initial response goes with the command where server and line take it.

        `initial` is not encoded. Raises UpstreamError; LocalError for what is no mechanism's name.
        """

    @abstractmethod
    async def sasl_answer(self, data: bytes) -> SaslStep:
        """The next message of the exchange, not encoded. Raises UpstreamError."""

    @abstractmethod
    async def sasl_cancel(self) -> SaslStep:
        """Give the exchange up; the reply is the server's. Raises UpstreamError."""

    @abstractmethod
    async def login(self, user: bytes, password: bytes) -> Reply:
        """Log in with a password as the server announced it: 2xx, or its refusal; 504 where it takes no password.

        Raises UpstreamError; LocalError for CR, LF or NUL in either.
        """

    @property
    @abstractmethod
    def between_commands(self) -> bool:
        """Whether the last thing said was a whole reply, so that a command may follow."""

    @property
    @abstractmethod
    def farewell(self) -> bytes:
        """The command that ends the conversation, with its end."""

    @abstractmethod
    def unasked(self) -> UpstreamError:
        """Give the connection up for what the server said though nothing was asked."""

    @abstractmethod
    def _take(self, data: bytes) -> None:
        """Read these bytes of the server. Raises PeerError for what is none of its protocol."""

    @property
    @abstractmethod
    def _answered(self) -> bool:
        """Whether a reply has been read."""

    # -- what stages ask

    @property
    def url(self) -> str:
        """The server's URL."""
        return self.server.url

    @property
    def protocol(self) -> str:
        """smtp, lmtp, imap or pop3."""
        return self.server.protocol

    @property
    def local(self) -> bool:
        """Nothing leaves this machine: a unix socket, or the peer's address is loopback."""
        if self.server.local:
            return True
        try:
            return ipaddress.ip_address(self.wire.peername[0]).is_loopback
        except ValueError:
            return False

    @property
    def takes_secrets(self) -> bool:
        """Whether passwords may pass: TLS as the pool demands it, nothing leaves the machine, or the pool says so."""
        return self.tls or self.local or (self.pool is not None and self.pool.settings.allow_plaintext_login)

    @property
    def address(self) -> tuple[str, int]:
        """The server's address and port; `("unix:", 0)` for a unix socket."""
        return self.wire.peername

    @property
    def local_address(self) -> tuple[str, int]:
        """Our address and port on this connection."""
        return self.wire.sockname

    @property
    def idle(self) -> bool:
        """No reply is owed, none came unasked, and the peer is still there."""
        quiet = self.between_commands and not self.in_exchange
        return quiet and not (self.closing or self.wire.eof or self.wire.buffered)

    @property
    def in_transaction(self) -> bool:
        """Whether mail was begun there and not ended, so that nobody may log in (RFC 4954 4)."""
        return False

    def hand_over(self) -> None:
        """The client speaks with the server from now on: forget what served our own conversation with it."""
        self.greeting = self.ehlo = None
        self.extensions = {}
        self.login_answer = b""
        self._secrets.clear()

    # -- talking

    def write(self, data: bytes) -> None:
        """Bytes in front of the conversation: the PROXY header."""
        self.identified()
        self.wire.write(data)

    def identified(self) -> None:
        """The connection speaks for this client now (XCLIENT, a login, PROXY): no other session may have it."""
        self.reusable = False
        self.speaks_for_client = True

    async def _read(self, timeout: float) -> None:
        """Read until there is a whole reply. Raises UpstreamError."""
        wire = self.wire
        wire.set_deadline(timeout)
        try:
            while not self._answered:
                data = await self._next_bytes()
                if not data:
                    raise self.failed("lost", str(wire.error or "closed the connection"))
                self._take(data)
        except WireTimeout:
            raise self.failed("timeout", f"no reply within {timeout:g}s") from None
        except PeerError as error:
            raise self.failed("garbage", str(error)) from None
        wire.set_deadline(None)

    async def _next_bytes(self) -> bytes:
        """What the server sent, b"" once it has closed."""
        return await self.wire.read()

    def _hide(self, message: bytes) -> None:
        """No reply, and no line of the transcript, shows the password or token in this SASL message."""
        bearer = _BEARER.search(message)
        before, _, last = message.rpartition(b"\0")
        secret = bearer[1] if bearer is not None else last if before else b""  # or it is the user's name, for LOGIN
        if len(secret) >= SHORT_SECRET:
            self._secrets.append(secret)
            if self.transcript is not None:
                self.transcript.hide(secret)

    def failed(self, kind: Kind, text: str) -> UpstreamError:
        """Give the connection up: the error that ends this connection; every later wait gets it too."""
        self.closing = True
        self.reusable = False
        self._fault = UpstreamError(kind, self.server.url, text)
        return self._fault

    def _step(self, reply: Reply) -> SaslStep:
        """One step of an exchange: a challenge (334), or the end. Raises UpstreamError for what is no base64."""
        self.in_exchange = reply.code == 334
        if not self.in_exchange:
            return SaslStep(None, reply)
        try:
            return SaslStep(b64decode(reply.lines[0]), None)
        except binascii.Error:
            raise self.failed("garbage", "a challenge that is not base64") from None

    async def ended(self, step: SaslStep) -> Reply:
        """The reply that ends an exchange which has nothing more to say. Raises UpstreamError."""
        if step.reply is None:
            step = await self.sasl_cancel()
        if step.reply is None:
            raise self.failed("garbage", "an exchange that does not end")
        return step.reply

    async def start_tls(self, handshake: Callable[[Wire], Awaitable[None]]) -> None:
        """Give the wire to the handshake, unless the server sent anything that would be trusted as coming from it.

        Raises UpstreamError of kind `tls` for such bytes (RFC 3207 and the response injection it does not name).
        """
        if self.wire.buffered or not (self.greeting is None or self.between_commands):
            raise self.failed("tls", "sent bytes between STARTTLS and the handshake")
        await handshake(self.wire)
        self.encrypted = True
        self.forget_hello()

    def stop_waiting(self) -> None:
        """No longer kept for reuse: its clock and what watched the server meanwhile."""
        if self.idle_timer is not None:
            self.idle_timer.cancel()
            self.idle_timer = None
        self.wire.on_gone = self.wire.on_data = None

    # -- the end

    @property
    def _beyond_words(self) -> bool:
        """Nothing can be said any more: out of step, gone, or inside content or an exchange."""
        return self.closing or self.wire.eof or self.in_exchange

    async def quit(self) -> None:
        """Say goodbye and close, within seconds; a connection that is out of step, gone or amid content just closes.

        Never raises but for cancellation.
        """
        if self._beyond_words:
            self.abort()
            return
        farewell = self.farewell
        self.closing = True
        try:
            if self.transcript is not None:
                self.transcript.to_upstream(farewell)
            self.wire.write(farewell)
            await self.wire.aclose(QUIT_SECONDS)
        finally:
            self.abort()

    def end_quietly(self) -> None:
        """`quit` without waiting for it."""
        if self._beyond_words:
            self.abort()
            return
        task = asyncio.get_running_loop().create_task(self.quit())
        _ending.add(task)
        task.add_done_callback(_ending.discard)

    def abort(self) -> None:
        """Close at once, without a word."""
        self.closing = True
        self.wire.abort()
        self.put_aside()

    def put_aside(self) -> None:
        """Give the place in the pool back."""
        on_end, self.on_end = self.on_end, None
        if on_end is not None:
            on_end()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.server.url} closing={self.closing}>"


def check_line(line: bytes) -> None:
    """Raise LocalError for what would be more than one line; its text holds nothing of the line."""
    if b"\n" in line or b"\r" in line or b"\0" in line:
        raise LocalError("a command line with a line end or NUL inside")


def mechanism_name(mechanism: str) -> bytes:
    """A SASL mechanism's name (RFC 4422 3.1). Raises LocalError for what is none: it would be part of a command."""
    name = mechanism.upper()
    if not (name.isascii() and 0 < len(name) <= 20 and name.replace("-", "").replace("_", "").isalnum()):
        raise LocalError("not a SASL mechanism's name")
    return name.encode("ascii")


async def quits_done() -> None:
    """Wait for what `end_quietly` began (at a stop)."""
    while _ending:
        await asyncio.wait(tuple(_ending))
